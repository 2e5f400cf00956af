"""From x_M to x_0, in steps that start at M.

    times = process.times(steps=50, M=940)                     # times[0] is the index 939
    draws = Draws([(seed, i) for i in range(4)])               # a stream for each sample, whatever its batch
    x = noise.sample(process, times[0], 4, draws)              # x_M is drawn for it
    x_0 = sample(denoise, x, process, times, prediction="v")   # and the first model call is made at it

With eta > 0 give the same draws to both: made anew, their first noise would be that of x_M again.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cil.draws import Random, normal_like
from cil.processes import VP, Prediction, Process

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], t [B]) -> prediction [B, ...]
ReferenceCompat = Literal["dynamicrafter", "videocrafter1"]


class Level(NamedTuple):
    """alpha, sigma and s of a time that all samples share."""

    alpha: float
    sigma: float
    scale: float


CLEAN = Level(1.0, 0.0, 1.0)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    times: Tensor,
    prediction: Prediction,
    eta: float = 0.0,
    random: Random = None,
    reference_compat: ReferenceCompat | None = None,
) -> Tensor:
    """From x at times[0] to x_0. DDIM on a VP process, Euler's method on EDM and flow: one formula.

    x_0 and eps are what the network's answer at t means, and x_t' = alpha' s' x_0 + sigma' eps. `eta` above 0 draws
    part of eps anew: 1 is ancestral sampling. `random` is `Draws` with a generator for each sample, or one for all.

    `reference_compat` ends as the authors' sampler of that family does, with the noise of index 0 left in.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: in 0..1")
    if len(times) == 0 or not bool((times.diff() < 0).all()):
        raise ValueError(f"times={times.tolist()}: at least one, and falling")
    levels = [_level(process, t) for t in times] + [_landing(process, times[-1], reference_compat)]
    if levels[-2].sigma == 0:
        raise ValueError(f"times={times.tolist()}: above 0; the step to x_0 is taken after the last")
    for t, (now, after) in zip(times, pairwise(levels), strict=True):
        answer = denoise(x, t.to(x.device).expand(len(x)))
        if answer.shape != x.shape:
            raise ValueError(f"denoise answered {list(answer.shape)} for x of shape {list(x.shape)}")
        fresh = eta * fresh_noise(now, after)
        signal, noise = after.alpha * after.scale, (after.sigma**2 - fresh**2) ** 0.5
        x0, eps = _in_terms_of_x_and_answer(process, prediction, t)
        x = ((signal * x0[0] + noise * eps[0]) * x).add_(answer, alpha=signal * x0[1] + noise * eps[1])
        if fresh:
            x.add_(normal_like(x, random), alpha=fresh)
    return x


def fresh_noise(now: Level, after: Level) -> float:
    """The deviation of the noise that a step of ancestral sampling draws anew: Song et al. 2021, equation 16."""
    kept = now.alpha * after.sigma / (after.alpha * now.sigma)
    return float(after.sigma * max(1 - kept**2, 0.0) ** 0.5)


def _in_terms_of_x_and_answer(process: Process, prediction: Prediction, t: Tensor) -> tuple[list[float], list[float]]:
    """x_0 and eps as shares of x_t and of the answer: all kinds of prediction are linear in both."""
    x_t, answer = torch.eye(2, dtype=torch.float64)
    x0, eps = process.split(prediction, answer, x_t, t.expand(2))
    return x0.tolist(), eps.tolist()


def _level(process: Process, t: Tensor) -> Level:
    return Level(float(process.alpha(t)), float(process.sigma(t)), float(process.x0_scale(t)))


def _landing(process: Process, last: Tensor, reference_compat: ReferenceCompat | None) -> Level:
    """Where the last step ends: at x_0. The reference ends at index 0, with its noise."""
    if reference_compat is None:
        return CLEAN
    if reference_compat not in get_args(ReferenceCompat) or not isinstance(process, VP):
        named = ", ".join(get_args(ReferenceCompat))
        raise ValueError(f"reference_compat={reference_compat!r}: None, or one of {named} on a VP process")
    first = _level(process, torch.zeros_like(last))
    return first._replace(scale=float(process.x0_scale(last))) if reference_compat == "dynamicrafter" else first


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float | Tensor, rescale: float = 0.0) -> Denoiser:
    """Classifier-free guidance; a scale of 1 costs one call, not two. `frame_ramp` makes a scale for each frame.

    `rescale` (Lin et al. 2023, equations 14 to 16) takes the answer that share of the way back to the deviation it
    has without guidance.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale={rescale}: in 0..1")
    if not isinstance(scale, Tensor):
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: a number")
        if scale == 1:
            return conditional

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        with_it, without = conditional(x, t), unconditional(x, t)
        answer = without + (scale.to(x) if isinstance(scale, Tensor) else scale) * (with_it - without)
        if rescale == 0:
            return answer
        inner = tuple(range(1, x.dim()))
        spread = answer.std(inner, keepdim=True)
        back = torch.where(spread > 0, with_it.std(inner, keepdim=True) / spread, 1)  # a network that answers 0
        return answer * (1 + rescale * (back - 1))

    return denoise


def frame_ramp(first: float, last: float, frames: int) -> Tensor:
    """A guidance scale that rises over frames, [T, 1, 1, 1] for answers [B, T, C, H, W]: SVD's 1 to 3."""
    return torch.linspace(first, last, frames).reshape(-1, 1, 1, 1)
