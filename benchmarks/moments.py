"""Moments of fp16 latents, streamed in batches of 16 clips, on one core.

    python -m benchmarks.moments

The peer is what one would write first, and what loses all digits of data far from 0: sums of x and x^2 in float64, with
numpy. The limit is the time to read the same memory once: its sum, in float32.

Then what the moments of a part take of its bytes: one of as many clips as by default, which holds nothing but latents
(SVD's with cached CLIP features come near to that; a share of 2 % is allowed), and the time to read and merge the
moments of 10,000 parts, small ones (10 s are allowed: a job of minutes begins with it).
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import Row, alternately, main, paired
from benchmarks.random_cache import clip, maker_of
from cil import Moments
from pipelines.config import CacheConfig

SHAPE = (16, 4, 40, 64)  # 320x512, 16 frames
BATCH = 16


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    clips = 64 if quick else 256
    latents = torch.randn(clips, *SHAPE, generator=torch.Generator().manual_seed(0)).half()
    arrays = latents.numpy()

    def ours() -> None:
        Moments.merged(Moments.of(batch) for batch in latents.split(BATCH))

    def naive() -> None:
        total, squares = np.zeros(SHAPE), np.zeros(SHAPE)
        for begin in range(0, clips, BATCH):
            x = arrays[begin : begin + BATCH].astype(np.float64)
            total += x.sum(0)
            squares += (x * x).sum(0)

    def limit() -> None:
        latents.sum(dtype=torch.float32)

    mine, theirs, least = alternately(ours, naive, limit, rounds=3 if quick else 9)
    size = latents.numel() * latents.element_size() / 1e6
    rates = [size / float(np.median(seconds)) for seconds in (mine, theirs, least)]
    taken, seconds = share(), merging(1000 if quick else 10_000)
    return [
        Row("moments: naive float64 sums", *rates, "MB/s", paired(theirs, mine), 0.5),
        Row("moments: share of a part", taken, 2, None, "%", 2 / taken, 1.0),
        Row("moments: merging 10,000 parts", seconds, 10, None, "s", 10 / seconds, 1.0),
    ]


def share() -> float:
    policy, random = CacheConfig(), np.random.default_rng(0)
    clips = [clip(random, v, view) for v in range(policy.videos_per_part) for view in range(policy.views_per_video)]
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        maker = maker_of(folder)
        maker.captions = {row["caption"]: {} for row in clips}
        _, size = maker._write("part", clips, [])
        return 100 * Path(folder, "part.moments").stat().st_size / size


def merging(parts: int) -> float:
    latents = torch.randn(200, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    files = [Moments.of(batch).to_bytes() for batch in latents.split(2)]
    begin = time.perf_counter()
    Moments.merged(Moments.from_bytes(files[i % len(files)]) for i in range(parts))
    return (time.perf_counter() - begin) * 10_000 / parts


if __name__ == "__main__":
    main(__doc__, measure)
