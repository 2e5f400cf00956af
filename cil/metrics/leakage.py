"""Conditional image leakage itself: how much the one-step prediction of x_0 from x_t moves, over t.

    found = one_step(family, net, batch, times, key=(seed, clip_id))       # a clip; motion of many, stacked, is [N, K]
    lack, excess = leakage(family.process.unit_time(times), motion, truth)

At large t the noisy input says little, and a network that leaks copies the clean conditional image: its prediction
stands still. One that does not leak is not at 0: what cannot be known yet is blurred, and blur moves less. So the
figure is for comparing networks on the same clips, times and noise.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cil.conditioning import CleanCondition
from cil.draws import Draws
from cil.families import Family
from cil.metrics.motion import motion_score


class OneStep(NamedTuple):
    """Of one clip at each of K times."""

    loss: list[float]
    motion: list[float]
    truth: float  # motion of x_0 itself, decoded as the predictions are


@torch.no_grad()
def one_step(
    family: Family, net: Any, batch: Mapping[str, Tensor], times: Tensor, key: tuple[int | str, ...]
) -> OneStep:
    """Of a clip as it is encoded (tensors with a batch of one), with noise that is a function of (*key, k)."""
    process, x0 = family.process, batch["latents"].float()
    condition, _ = family.condition(dict(batch), CleanCondition(), torch.zeros(1, device=x0.device), None)
    loss, motion = [], []
    for k, t in enumerate(times.to(x0.device)[:, None]):
        eps = Draws([(*key, k)], x0.device).normal(*x0.shape[1:])
        x_t = process.add_noise(x0, eps, t)
        answer = family.denoise(net, x_t, t, condition)
        error = (answer - process.target(family.prediction, x0, eps, t)) ** 2
        predicted, _ = process.split(family.prediction, answer, x_t, t)
        loss.append(float(family.loss_weight(t) * error.mean()))
        motion.append(motion_score(family.decode(predicted)[0].cpu()))
    return OneStep(loss, motion, motion_score(family.decode(x0)[0].cpu()))


class Leakage(NamedTuple):
    """The area between the curve over t and the truth, as a share of the area under the truth; below it and above."""

    lack: float  # 0: as much motion as the truth at all t, 1: none
    excess: float


def leakage(times: Tensor, motion: Tensor, truth: Tensor) -> Leakage:
    """Of motions [N, K] of N clips at rising times [K] in [0, 1], and of the true clips [N]; for their means.

    Between two times the curve is a straight line.
    """
    if motion.dim() != 2 or motion.shape != (len(truth), len(times)) or len(times) < 2 or not (times.diff() > 0).all():
        shapes = ", ".join(str(list(x.shape)) for x in (times, motion, truth))
        raise ValueError(f"times, motion and truth of {shapes}: expected at least two rising times [K], [N, K] and [N]")
    true = float(truth.double().mean())
    if not true > 0:
        raise ValueError(f"the {len(truth)} true clips do not move: there is no motion to lack")
    lacking, width = 1 - motion.double().mean(0) / true, times.double().diff()
    lack, excess = (float(_area(curve, width) / width.sum()) for curve in (lacking, -lacking))
    return Leakage(lack, excess)


def _area(curve: Tensor, width: Tensor) -> Tensor:
    """Of what lies above 0, of a curve [K] of straight lines over segments [K - 1]."""
    a, b = curve[:-1], curve[1:]
    above = a.clamp(min=0) + b.clamp(min=0)
    # Where the line crosses 0, only the share of the segment that is above it counts.
    share = above / (a.abs() + b.abs()).clamp(min=torch.finfo(torch.float64).tiny)
    return (width * above / 2 * share).sum()
