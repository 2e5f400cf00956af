"""What is measured on sets of videos, the study's and others: per video, and per set as an evaluate run in MLflow.

A video, its true clip and its conditional image belong together as `pipelines.sets` has it. Where a video has none,
what is measured against them is absent, and the rest is there.
"""

import json
import posixpath
from itertools import chain
from typing import Any

from cil.metrics.alignment import ClipSimilarity
from cil.metrics.raft import Raft
from pipelines import artifact, cluster, storage
from pipelines.artifact import Artifact, Manifest, fingerprint
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.feature_net import feature_net
from pipelines.generate import REAL, REFERENCE
from pipelines.leakage import FILE, measure_leakage
from pipelines.models import refusing_weights
from pipelines.parts import Part, chunks, make_parts
from pipelines.scorer import FEATURES, KNOWN, Scorer, Seen, load_detector
from pipelines.sets import Videos, partner, sets_of
from pipelines.summary import summarise
from pipelines.tracking import Run, answering, refuse_unreachable, runs
from pipelines.video import BadVideo
from pipelines.weights import KIND as WEIGHTS
from pipelines.weights import known_as

KIND = "scores"
VIDEOS_PER_PART = 64
CODE = (
    *("pipelines.score", "pipelines.scorer", "pipelines.sets", "pipelines.video", "cil.images"),
    *(f"cil.metrics.{name}" for name in ("motion", "dynamics", "consistency", "spectra", "alignment", "features")),
    *("cil.metrics.detectors", "cil.metrics.aesthetics", "cil.nets.openclip", "cil.metrics.raft", "cil.nets.raft"),
)
SUMMARY = (
    "pipelines.summary",
    *(f"cil.metrics.{name}" for name in ("frechet", "inception_score", "bootstrap", "motion", "dynamics", "spectra")),
)
SAMPLED = (  # of the identity of a row's videos, what its run has as parameters
    *("family", "precision", "seed", "shift", "row", "where", "clips_per_part"),
    *("weights", "initial_noise", "cache", "images"),
)
KEYS = {"fvd": "score.fvd", "classes": "score.inception"}


def score(config: Config) -> dict[str, Manifest]:
    """Every set of videos scored."""
    refuse_unreachable(config)
    sets = sets_of(config)
    net = feature_net(config, sets)
    files = {"fvd": config.score.fvd, "classes": config.score.inception}
    detectors = {name: uri for name, uri in files.items() if uri}
    identity = {
        "real": sets[REAL].fingerprint if REAL in sets else None,
        "feature_net": net.fingerprint if net else None,
        "networks": _identities(config, detectors),
        "protocol": config.score.protocol,
        "memory": config.score.memory,
        "measures": sorted(config.score.measures),
        "code": artifact.code(*CODE),
    }
    plans = {
        name: Artifact(storage.join(config.out, "scores", name), KIND, identity | _of_set(sets, name))
        for name, videos in sets.items()
        if videos.lines  # pictures alone are no set
    }
    parts = {name: _parts(sets, name, made) for name, made in plans.items() if not made.finished}
    arguments = {
        "net": net.uri if net else None,
        "detectors": detectors,
        "clip": config.score.clip,
        "raft": config.score.raft,
        "measures": config.score.measures,
        "protocol": config.score.protocol,
        "seconds": config.score.decode_seconds,
        "memory": config.score.memory,
        "gpu": config.score.gpus > 0,
    }
    if parts:
        if detectors:
            _ask(config, detectors, sets)
        cluster.connect()
        if config.score.gpus:
            cluster.workers(config.score.gpus, "score.gpus")
        first = [storage.join(sets[name].uri, sets[name].lines[0]["file"]) for name in parts]
        images = [*sets[REAL].images.values()][:1] if REAL in sets else []
        read = [*first, *images, *detectors.values(), config.score.clip, config.score.raft]
        cluster.refuse_unseen(uri for uri in read if uri and storage.is_local(uri))
    for name in parts:
        plans[name].begin(config.model_dump_json(indent=1))
    make_parts(KIND, "videos", [*chain(*parts.values())], Scorer, arguments, gpus=config.score.gpus)
    for name, own in parts.items():  # true clips before what is set against them
        true = plans.get(REAL) if name not in (REFERENCE, REAL) else None
        _finish(plans[name], own, true, _pairs(sets, name, sets[REAL].clips) if true else {})
    scores = {name: made.manifest() for name, made in plans.items()}
    evaluated = {name: sets[name] for name in scores if name != REFERENCE}
    made = {name: videos.made for name, videos in evaluated.items() if name in config.evaluation_rows()}
    curves = measure_leakage(config, {name: manifest for name, manifest in made.items() if manifest})
    with answering(config):
        _evaluate(config, evaluated, scores, curves)
    return scores


def evaluation(config: Config, scores: Manifest) -> str:
    """What an evaluate run is known by."""
    own = config.score.model_dump(include={"static_below", "bootstrap", "leakage"})
    reference = _measured_to(config)
    measured_to = reference.fingerprint if reference else None
    return fingerprint([posixpath.basename(scores.uri), scores.fingerprint, measured_to, own, artifact.code(*SUMMARY)])


def _measured_to(config: Config) -> Manifest | None:
    """The reference's scores."""
    reference = storage.join(config.out, "scores", REFERENCE)
    there = storage.exists(storage.join(reference, "manifest.json"))
    return artifact.read_manifest(reference, KIND) if there else None


def _of_set(sets: dict[str, Videos], name: str) -> dict[str, str]:
    """What is a set's own in the identity of its scores."""
    pairs = [_pairs(sets, name, known) for known in (sets[REAL].images, sets[REAL].clips)] if REAL in sets else []
    said = [{file: other.removeprefix(sets[REAL].uri) for file, other in each.items()} for each in pairs]
    return {"videos": sets[name].identity, "pairs": artifact.fingerprint(said)}


def _pairs(sets: dict[str, Videos], name: str, known: dict[str, str]) -> dict[str, str]:
    """Of each video of a set what belongs to it. The reference is set against nothing."""
    found = {line["file"]: partner(line, known) for line in sets[name].lines} if name != REFERENCE else {}
    return {file: other for file, other in found.items() if other is not None}


def _parts(sets: dict[str, Videos], name: str, made: Artifact) -> list[Part]:
    videos = sets[name]
    images = _pairs(sets, name, sets[REAL].images) if REAL in sets else {}
    lines = [{key: line[key] for key in KNOWN} | {"image": images.get(line["file"])} for line in videos.lines]
    return [
        Part(made.path("parts", f"part-{i:05d}.jsonl"), {"folder": videos.uri, "lines": lot}, len(lot))
        for i, lot in enumerate(chunks(lines, VIDEOS_PER_PART))
    ]


def _identities(config: Config, detectors: dict[str, str]) -> dict[str, str]:
    """Of the networks that are given."""
    found = {}
    for name, uri in detectors.items():
        with refusing_weights(KEYS[name]):
            found[name] = load_detector(name, uri).identity
    if config.score.clip:
        with refusing_weights("score.clip"):
            found["clip"] = ClipSimilarity.load(storage.kept_copy(config.score.clip)).identity
    if config.score.raft:
        with refusing_weights("score.raft"):
            found["raft"] = Raft.load(storage.kept_copy(config.score.raft)).identity
    return found


def _ask(config: Config, detectors: dict[str, str], sets: dict[str, Videos]) -> None:
    """Each network once, before workers do, about videos that can be decoded until it answers."""
    refusal: UserError | None = None
    uris = [storage.join(videos.uri, line["file"]) for videos in sets.values() for line in videos.lines[:8]]
    with Seen(config.score.protocol, config.score.decode_seconds, config.score.memory) as seen:
        for uri in uris:
            try:
                frames, _ = seen(uri)
            except (BadVideo, ValueError):
                continue
            try:
                for name, detector in detectors.items():
                    with refusing_weights(KEYS[name]):
                        load_detector(name, detector)(frames[None])
                return
            except UserError as error:  # it may be the video, too short for it
                refusal = refusal or error
    if refusal:
        raise refusal


# -- of each video -----------------------------------------------------------------------------------------------------


def _finish(made: Artifact, parts: list[Part], real: Artifact | None, pairs: dict[str, str]) -> None:
    """The table of scores and that of rejects; features stay in the parts. `pairs`: of each video its true clip."""
    table: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    for line in (line for part in parts for line in storage.read_rows(part.uri)):
        told = {key: value for key, value in line.items() if key not in FEATURES}
        (rejects if "reason" in told else table).append(told)
    asked, found = sum(part.size for part in parts), len(table) + len(rejects)
    if found != asked:
        raise AssertionError(f"{made.uri}: {asked} videos, {found} scored or rejected")
    true = storage.read_rows(real.path("scores.jsonl")) if real else []
    truth = {line["file"]: line["motion"] for line in true}
    problems = []
    for line in table:
        if (motion := truth.get(pairs.get(line["file"], ""))) is not None:
            line["motion_lack"] = motion - line["motion"]
        if problem := line.pop("image_problem", None):
            problems.append({key: line[key] for key in KNOWN} | {"reason": "image", "message": problem})
    storage.write_rows(made.path("scores.jsonl"), table)
    storage.write_rows(made.path("rejects.jsonl"), rejects + problems)
    made.finish({"videos": len(table), "rejects": len(rejects), "images_unread": len(problems), "parts": len(parts)})
    if rejects or problems:
        said = f"{len(rejects)} of {found} videos cannot be scored, {len(problems)} images cannot be read"
        print(f"{made.uri}: {said}: rejects.jsonl has the reasons")


# -- in MLflow ---------------------------------------------------------------------------------------------------------


def _evaluate(
    config: Config, sets: dict[str, Videos], scores: dict[str, Manifest], curves: dict[str, dict[str, Any]]
) -> None:
    """A run for each set. One that is finished stays as it is, but for a leakage that is another one by now."""
    done = {
        (run.info.run_name, run.data.tags["cil.fingerprint"]): run.data
        for run in runs(config, "evaluate")
        if run.info.status == "FINISHED"
    }
    for name, videos in sets.items():
        known_by = evaluation(config, scores[name])
        finished, curve = done.get((name, known_by)), curves.get(name)
        values = dict(finished.metrics) if finished else {}
        if finished is None or (curve and finished.tags.get("cil.leakage") != curve["uri"]):
            run = Run(config, name, "evaluate", known_by)
            if finished is None:
                found = summarise(config, scores[name], scores.get(REAL), scores.get(REFERENCE))
                values = found.values
                run.parameters(_settings(config, scores[name], videos))
                run.tags({"row": name, "videos": videos.uri, "scores": scores[name].uri})
                if row := config.evaluation_rows().get(name):
                    run.tags({"weights": row.weights})
                if found.warnings:
                    run.tags({"too_small": "; ".join(found.warnings)})
                    print("\n".join(f"{KIND}: {name}: {warning}" for warning in found.warnings))
                run.metrics(values)
                for file, content in found.files.items():
                    run.file(file, json.dumps(content, indent=1).encode())
            if curve:
                if curve["leakage"] is not None:
                    values["leakage"] = curve["leakage"]
                    run.renew("leakage", curve["leakage"])
                run.file("leakage.json", storage.read(storage.join(curve["uri"], FILE)))
                run.tags({"leakage": curve["uri"]})
            run.finish()
        told = ", ".join(
            f"{key} {value:.3f}" for key, value in sorted(values.items()) if key not in ("videos", "rejects")
        )
        print(f"{KIND}: {name}: {told}")


def _settings(config: Config, scores: Manifest, videos: Videos) -> dict[str, Any]:
    """What shaped the figures: how they are measured, and of the study's rows sampling, training, noise and data."""
    reference = _measured_to(config)
    known = {
        "feature_net": scores.identity["feature_net"],
        "reference": reference.identity["videos"] if reference else None,
    }
    measured = {"protocol": config.score.protocol, "static_below": config.score.static_below}
    told: dict[str, Any] = {"score": scores.identity["networks"] | measured | known}
    row = config.evaluation_rows().get(posixpath.basename(scores.uri))
    if videos.made is None or row is None:
        return told
    made = videos.made.identity
    told |= {key: made[key] for key in SAMPLED if key in made}
    weights = storage.join(config.out, "weights", row.weights)
    if row.weights in config.training_rows() and storage.exists(storage.join(weights, "manifest.json")):
        trained = artifact.read_manifest(weights, WEIGHTS)
        if made["weights"] == known_as(trained, row.settings.ema):
            told["train"] = trained.identity["row"]
        else:
            print(
                f"{KIND}: {posixpath.basename(scores.uri)}: its videos are of other weights than {weights} holds now:"
            )
            print("    its run has no parameters of their training")
    return told
