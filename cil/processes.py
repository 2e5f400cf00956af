"""How noise is added: x_t = alpha(t) x_0 + sigma(t) eps."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "v", "x0"]


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] in the type and on the device of `like`."""
    return value.to(like).reshape(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class VP:
    """Variance preserving, with LDM's scaled-linear betas. t is a step index, 0..steps-1; M = t + 1."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.zero_snr else 1
        if self.steps < least:
            raise ValueError(f"steps={self.steps}: at least {least}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start}, beta_end={self.beta_end}: 0 < beta_start <= beta_end < 1")

    @cached_property
    def alphas_bar(self) -> Tensor:
        """prod(1 - beta), float64 [steps]."""
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64)
        alphas_bar = torch.cumprod(1 - roots**2, dim=0)
        if not self.zero_snr:
            return alphas_bar
        # Lin et al. 2023, algorithm 1: shift sqrt(alpha_bar) to end at 0, and scale it to begin where it began.
        root = alphas_bar.sqrt()
        return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._at(self.alphas_bar.sqrt(), t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._at((1 - self.alphas_bar).sqrt(), t)

    def unit_time(self, t: Tensor) -> Tensor:
        """The time in [0, 1] that TimeNoise sees."""
        return t / self.steps

    def start(self, M: int) -> Tensor:
        """The index at which sampling from M starts: x_M is drawn for it, and the first model call made at it."""
        if int(M) != M or not 1 <= M <= self.steps:
            raise ValueError(f"M={M}: an integer in 1..{self.steps}")
        return torch.tensor(int(M) - 1)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * eps

    def target(self, prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a network with this kind of prediction should have answered."""
        if prediction == "v":
            return per_sample(self.alpha(t), x0) * eps - per_sample(self.sigma(t), x0) * x0
        return {"eps": eps, "x0": x0}[prediction]

    def split(self, prediction: Prediction, answer: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The (x0, eps) that a network's answer means."""
        alpha, sigma = per_sample(self.alpha(t), x_t), per_sample(self.sigma(t), x_t)
        if prediction == "v":
            return alpha * x_t - sigma * answer, sigma * x_t + alpha * answer
        if prediction == "x0":
            return answer, (x_t - alpha * answer) / sigma
        if (alpha == 0).any():
            raise ValueError("eps-prediction cannot be inverted where alpha is 0 (zero_snr at M = steps): use v or x0")
        return (x_t - sigma * answer) / alpha, answer

    @staticmethod
    def _at(table: Tensor, t: Tensor) -> Tensor:
        return table.to(t.device)[t]
