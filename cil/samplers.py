"""DDIM that starts at M."""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from cil.processes import VP, Prediction

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], t [B]) -> prediction [B, ...]


def trailing_steps(M: int, steps: int) -> list[int]:
    """`steps` distinct indices from M-1 down to at least 0, evenly spaced, in exact arithmetic."""
    if not 1 <= steps <= M:
        raise ValueError(f"steps={steps}: from M={M} there are 1..{M} steps to take")
    return [round(Fraction(M * (steps - i), steps)) - 1 for i in range(steps)]


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance; a scale of 1 costs one call, not two."""
    if scale == 1:
        return conditional

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + scale * (conditional(x, t) - without)

    return denoise


@torch.no_grad()
def ddim(denoise: Denoiser, x: Tensor, process: VP, M: int, steps: int, prediction: Prediction = "v") -> Tensor:
    """From x_M (drawn for index M-1, where the first call is made) to x_0, deterministic (eta 0)."""
    process.start(M)
    indices = trailing_steps(M, steps)
    for now, after in zip(indices, [*indices[1:], None], strict=True):
        t = torch.full((len(x),), now, device=x.device)
        x0, eps = process.split(prediction, denoise(x, t), x, t)
        x = x0 if after is None else process.add_noise(x0, eps, torch.full_like(t, after))
    return x
