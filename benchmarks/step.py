"""A training step of every family's `tiny` on one core, which is to take less than a second.

    python -m benchmarks.step

A step is the objective with TimeNoise, drawn and conditioned anew, its backward and AdamW, for a batch of 4 clips of
8 x 32 x 32. The limit is the same without an objective: the network's forward and backward on inputs made beforehand,
and AdamW. What share of a step that is, is printed.
"""

import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks import Row, alternately, main, paired
from cil import Draws, Objective, TimeNoise, families
from cil.families.base import Clip

SIZE = (8, 32, 32)  # T, H, W in pixels
BATCH = 4
ALLOWED = 1.0  # seconds


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    return [_row(name, rounds=5 if quick else 21) for name in families.NAMES]


def _row(name: str, rounds: int) -> Row:
    family = families.load(name, *SIZE, "tiny")
    frames = torch.randint(256, (BATCH, *SIZE, 3), dtype=torch.uint8)
    batch = family.encode(frames, [Clip("a disc", 8.0)] * BATCH)
    net, objective = family.network(0).train(), Objective(TimeNoise(1.0))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    keys = [(0, k) for k in range(BATCH)]
    t = family.process.draw_times(Draws(keys))
    condition, _ = family.condition(batch, objective.conditioning, family.process.unit_time(t), Draws(keys))
    x_t = batch["latents"].float()

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def take() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return take

    ours, bare = alternately(
        step(lambda: objective(family, net, batch, Draws(keys)).loss.mean()),
        step(lambda: family.denoise(net, x_t, t, condition).square().mean()),
        rounds=rounds,
    )
    print(f"{name}: {paired(bare, ours):.0%} of a step are the network's and AdamW's", file=sys.stderr)
    return Row(f"step: a second, {name}", median(ours), ALLOWED, median(bare), "s", ALLOWED / median(ours), 1.0)


if __name__ == "__main__":
    main(__doc__, measure)
