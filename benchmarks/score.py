"""Scoring against a bare loop, and the Frechet distance of FVD against two seconds.

    python -m benchmarks.score

The first row scores generated-like clips by motion alone, decode included, as workers of jobs.score do, beside a loop
that decodes and measures in its own process; one core, CPU time of all processes. The second one says what all measures
of a video cost, in the same unit. The last two are the distance of 2 x 2,048 features of 400 dimensions: beside the
time that it may take, and how many of its digits are those of float64 eigenvalues, beside the six that are asked for.
"""

import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from benchmarks import Row, alternately, main, paired
from benchmarks.decode import pictures
from cil.metrics.frechet import FeatureMoments
from cil.metrics.motion import motion_score
from pipelines.scorer import Scorer
from pipelines.video import decode_all, encode, fit

SIZE = (320, 512)
FRAMES, FPS = 16, 8
VIDEOS, DIMENSIONS = 2048, 400
LIMIT = 2.0  # s
DIGITS = 6
ALL = ["alignment", "consistency", "spectra"]


def measure(quick: bool) -> list[Row]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    clips, rounds = (2, 3) if quick else (6, 7)
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for number in range(clips):
            frames = np.stack(list(pictures(np.random.default_rng(number), FRAMES)))
            file = f"{number}.mp4"
            Path(folder, file).write_bytes(encode(fit(frames, *SIZE), FPS))
            known = dict.fromkeys(("clip_id", "name"), str(number))
            lines.append({"file": file, "image": str(Path(folder, file))} | known)
        plan = {"folder": folder, "lines": lines}
        motion, everything = (Scorer(None, {}, None, measures, "whole", 60, 0.5, False) for measures in ([], ALL))

        def bare() -> None:
            for line in lines:
                motion_score(decode_all(Path(folder, line["file"]).read_bytes()))

        seconds = alternately(lambda: motion(plan), lambda: everything(plan), bare, rounds=rounds, clock=_busy)
    ours, whole, loop = (clips / float(np.median(times)) for times in seconds)
    a, b = (_features(seed) for seed in (0, 1))
    distance = FeatureMoments.of(a).distance(FeatureMoments.of(b))
    digits = -math.log10(max(abs(distance / _by_eigenvalues(a, b) - 1), 1e-16))
    took = alternately(lambda: FeatureMoments.of(a).distance(FeatureMoments.of(b)), rounds=rounds)[0]
    frechet = float(np.median(took))
    return [
        Row("score: bare loop, motion", ours, loop, loop, "videos/s a core", paired(seconds[2], seconds[0]), 0.9),
        Row("score: all measures", whole, ours, ours, "videos/s a core", paired(seconds[0], seconds[1])),
        Row("score: FVD's distance, 2 s", frechet, LIMIT, None, "s", LIMIT / frechet, 1.0),
        Row("score: FVD's distance, float64", digits, DIGITS, None, "digits", digits / DIGITS, 1.0),
    ]


def _busy() -> float:
    """Seconds of a core that this process and those that decode for it have taken."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(each.user + each.system for each in times)


def _features(seed: int) -> Tensor:
    """Correlated, off centre."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIMENSIONS, DIMENSIONS, generator=random, dtype=torch.float64) / DIMENSIONS**0.5
    shift = torch.randn(DIMENSIONS, generator=random, dtype=torch.float64)
    return (torch.randn(VIDEOS, DIMENSIONS, generator=random, dtype=torch.float64) @ mix + shift).float()


def _by_eigenvalues(a: Tensor, b: Tensor) -> float:
    """Of the symmetric product C_a^(1/2) C_b C_a^(1/2)."""
    cov_a, cov_b = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    half = (vectors * values**0.5) @ vectors.T
    cross = np.linalg.eigvalsh(half @ cov_b @ half) ** 0.5
    apart = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return float(apart + np.trace(cov_a) + np.trace(cov_b) - 2 * cross.sum())


if __name__ == "__main__":
    main(__doc__, measure)
