"""Moments of fp16 latents, streamed in batches of 16 clips, on one core.

    python -m benchmarks.moments

The peer is what one would write first, and what loses all digits of data far from 0: sums of x and x^2 in float64, with
numpy. The limit is the time to read the same memory once: its sum, in float32.
"""

import numpy as np
import torch

from benchmarks import Row, alternately, main, paired
from cil import Moments

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
    return [Row("moments: naive float64 sums", *rates, "MB/s", paired(theirs, mine), 0.5)]


if __name__ == "__main__":
    main(__doc__, measure)
