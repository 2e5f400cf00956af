"""A step of the sampler against the bare denoiser call in it, for a call of 50 ms and a video of 320x512.

    python -m benchmarks.sampler

The denoiser spins for exactly 50 ms, so that what differs is the sampler's own work. Both sides make the same calls,
and with eta 1 draw the same noise.
"""

import time
from statistics import median

import torch
from torch import Tensor

from benchmarks import Row, alternately, main, paired
from cil import EDM, VP, Draws, Process, sample

SECONDS = 0.05
SHAPE = (1, 16, 4, 40, 64)


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    steps, x = 10, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    answer = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def call(x: Tensor, t: Tensor) -> Tensor:
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            pass
        return answer

    def row(name: str, process: Process, eta: float) -> Row:
        times = process.times(steps)

        def ours() -> None:
            sample(call, x, process, times, "v", eta=eta, random=Draws([(0,)]))

        def bare() -> None:
            draws = Draws([(0,)])
            for t in times:
                call(x, t)
                if eta:
                    draws.normal(*SHAPE[1:])

        mine, theirs = alternately(ours, bare, rounds=2 if quick else 5)
        ms = [1000 * median(seconds) / steps for seconds in (mine, theirs)]
        return Row(f"sampler: bare call, {name}", *ms, ms[1], "ms a step", paired(theirs, mine), 0.98)

    return [row("DDIM", VP(), 0.0), row("DDIM, eta 1", VP(), 1.0), row("Euler", EDM(), 0.0)]


if __name__ == "__main__":
    main(__doc__, measure)
