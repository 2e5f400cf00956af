"""What is said of a set of scored videos: means, distances to the reference, and how sure these are."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cil.metrics.bootstrap import interval
from cil.metrics.detectors import FVD, INCEPTION_SCORE
from cil.metrics.dynamics import motion_score_error, static_share
from cil.metrics.frechet import FeatureMoments, frechet_replicates, too_small
from cil.metrics.inception_score import SPLITS, ClassMoments, score_replicates, split_of
from cil.metrics.motion import distribution_error
from cil.metrics.spectra import spectral_distance
from pipelines import storage
from pipelines.artifact import Manifest
from pipelines.config import Config
from pipelines.scorer import features_of

KEPT = 10_000  # videos of which features are held in memory, for an interval
MEANS = {  # of a column of the table, what its mean is called
    "motion": "motion",
    "motion_lack": "motion_lack",
    "dynamic": "dynamic_degree",
    "speed": "speed",
    "first_frame_error": "first_frame_error",
    "psnr": "psnr",
    "ssim": "ssim",
    "clip_similarity": "clip_similarity",
    "warp_error": "warp_error",
    "hidden": "hidden",
}
SPECTRA = {"spatial": "spectrum_space", "temporal": "spectrum_time"}
OF_ONE_LENGTH = ". If videos differ in length or size: score.protocol=paper takes as many frames of each"


@dataclass
class Summary:
    values: dict[str, float]
    files: dict[str, Any]
    warnings: list[str]


def summarise(config: Config, ours: Manifest, real: Manifest | None, reference: Manifest | None) -> Summary:
    """The metrics of a set. What cannot be said of it is absent."""
    rows, true, others = (
        storage.read_rows(storage.join(scores.uri, "scores.jsonl")) if scores else []
        for scores in (ours, real, reference)
    )
    found = Summary({"videos": len(rows), "rejects": ours.counts["rejects"]}, {}, [])
    if not rows:
        return found
    values = found.values
    for column, name in MEANS.items():
        if len(told := _column(rows, column)):
            values[name] = float(told.mean())
    motion, speed, lack = (_column(rows, name) for name in ("motion", "speed", "motion_lack"))
    if asked := true or others:
        values["motion_error"] = distribution_error(motion, _column(asked, "motion"))
    if len(lack):
        values["motion_off"] = motion_score_error(torch.zeros_like(lack), lack).off
    values["static_share"] = static_share(speed if len(speed) else motion, config.score.static_below)
    _compare_spectra(found, rows, others)
    if reference and reference.counts["videos"]:
        _measure_distances(config, found, ours, reference)
    if config.score.inception:
        _measure_inception(config, found, ours)
    return found


def _column(rows: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([row[name] for row in rows if row.get(name) is not None], dtype=torch.float64)


def _compare_spectra(found: Summary, rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Means of the videos that have as many frames as most of them; a distance where these are as many in both sets."""
    curves: dict[str, dict[str, list[float]]] = {}
    for column, name in SPECTRA.items():
        means = {who: _mean_spectrum(table, column) for who, table in (("ours", rows), ("reference", others))}
        curves[column] = {who: mean.tolist() for who, mean in means.items() if mean is not None}
        a, b = means["ours"], means["reference"]
        if a is not None and b is not None and a.shape == b.shape:
            found.values[name] = spectral_distance(a, b)
    if any(curves.values()):
        found.files["spectra.json"] = curves


def _mean_spectrum(rows: list[dict[str, Any]], column: str) -> Tensor | None:
    spectra = [row[column] for row in rows if column in row]
    lengths = [len(spectrum) for spectrum in spectra]
    if not spectra:
        return None
    commonest = max(sorted(set(lengths)), key=lengths.count)
    return torch.tensor([s for s in spectra if len(s) == commonest], dtype=torch.float64).mean(0)


def _measure_distances(config: Config, found: Summary, ours: Manifest, reference: Manifest) -> None:
    most = FVD.videos if config.score.protocol == "paper" else None
    for column, name, limit in (("velocity", "frechet", None), ("fvd", "fvd", most)):
        try:
            a, b = (_moments(scores, column, limit) for scores in (ours, reference))
            if a is None or b is None or min(a.count, b.count) < 2:
                continue
            found.values[name] = a.distance(b)
        except ValueError as error:  # a network whose features depend on the video
            found.warnings.append(f"no {name}: {error}{OF_ONE_LENGTH}")
            continue
        if name != "fvd":
            continue
        for who, each in (("this set", a), ("the reference", b)):
            if warning := too_small(each.count, len(each.mean), FVD.videos):
                found.warnings.append(f"fvd: {who} has {warning}")
        if config.score.bootstrap and max(a.count, b.count) <= KEPT:
            x, y = (torch.cat([*_features(scores, column, limit)]) for scores in (ours, reference))
            images = (_images(ours, column, limit), _images(reference, column, limit))
            replicates = frechet_replicates(x, y, config.score.bootstrap, clusters=images)
            found.values["fvd_low"], found.values["fvd_high"] = interval(found.values["fvd"], replicates, least=0)


def _moments(scores: Manifest, column: str, most: int | None) -> FeatureMoments | None:
    """A part at a time: a set may be of any size."""
    parts = map(FeatureMoments.of, _features(scores, column, most))
    first = next(parts, None)
    return first and reduce(FeatureMoments.merge, parts, first)


def _measure_inception(config: Config, found: Summary, ours: Manifest) -> None:
    most = INCEPTION_SCORE.videos if config.score.protocol == "paper" else ours.counts["videos"]
    videos = min(most, ours.counts["videos"])
    splits, state, begin = min(SPLITS, videos), None, 0
    try:
        for p in _features(ours, "classes", videos):
            part = ClassMoments.of(p, split_of(torch.arange(begin, begin + len(p)), videos, splits), splits)
            state, begin = part if state is None else state.merge(part), begin + len(p)
    except ValueError as error:
        found.warnings.append(f"no is: {error}{OF_ONE_LENGTH}")
        return
    assert state is not None
    found.values["is"] = float(state.scores.mean())
    found.values["is_sd"] = float(state.scores.std(unbiased=False))
    if videos < INCEPTION_SCORE.videos:
        told = f"{videos:,} videos, where published figures are of {INCEPTION_SCORE.videos:,}"
        found.warnings.append(f"is: this set has {told}: compare it only with those of sets as large")
    if config.score.bootstrap and videos <= KEPT:
        p = torch.cat([*_features(ours, "classes", videos)])
        split, images = split_of(torch.arange(videos), videos, splits), _images(ours, "classes", videos)
        replicates = score_replicates(p, split, splits, config.score.bootstrap, clusters=images)
        found.values["is_low"], found.values["is_high"] = interval(found.values["is"], replicates, least=1)


def _features(scores: Manifest, column: str, most: int | None = None) -> Iterator[Tensor]:
    """[N, D] of each part, of the first `most` videos in all."""
    for rows in _told(scores, column, most):
        features = [features_of(row[column]) for row in rows]
        if len(sizes := {len(each) for each in features}) > 1:
            raise ValueError(f"features of {' and of '.join(map(str, sorted(sizes)))} dimensions in one set")
        yield torch.from_numpy(np.stack(features))


def _images(scores: Manifest, column: str, most: int | None) -> list[str]:
    """Of the same videos which image each is of: several are where there are several seeds."""
    return [row["clip_id"] for rows in _told(scores, column, most) for row in rows]


def _told(scores: Manifest, column: str, most: int | None) -> Iterator[list[dict[str, Any]]]:
    left = most
    for i in range(scores.counts["parts"]):
        if left == 0:
            return
        rows = storage.read_rows(storage.join(scores.uri, "parts", f"part-{i:05d}.jsonl"))
        if found := [row for row in rows if column in row][:left]:
            left = None if left is None else left - len(found)
            yield found
