"""What is done to the conditional image in training.

Each kind is called as `noisy, level = kind(y, u, random)` with the conditional latent y [B, ...], taken once a clip,
before it is repeated over frames, and u [B], the diffusion time in [0, 1] (`process.unit_time(t)`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cil.draws import Draws, normal_like
from cil.processes import per_sample

Random = torch.Generator | Draws | None


class ConditioningNoise(Protocol):
    def __call__(self, y: Tensor, u: Tensor, random: Random = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class CleanCondition:
    """Naive fine-tuning: the image as it is."""

    def __call__(self, y: Tensor, u: Tensor, random: Random = None) -> tuple[Tensor, Tensor]:
        return y, torch.zeros(len(y), device=y.device)


@dataclass(frozen=True)
class ConstantNoise:
    """The control without time: one noise level for every t."""

    level: float

    def __post_init__(self) -> None:
        if not self.level >= 0:
            raise ValueError(f"level={self.level}: at least 0")

    def __call__(self, y: Tensor, u: Tensor, random: Random = None) -> tuple[Tensor, Tensor]:
        return y + self.level * normal_like(y, random), torch.full((len(y),), self.level, device=y.device)


@dataclass(frozen=True)
class TimeNoise:
    """y + beta_s eps, with beta_s = beta_m sigmoid(n), n ~ N(mu(t), 1): a logit-normal whose centre rises with t."""

    beta_m: float
    a: float = 5.0

    def __post_init__(self) -> None:
        if not self.beta_m >= 0:
            raise ValueError(f"beta_m={self.beta_m}: at least 0")
        if not self.a > 0:
            raise ValueError(f"a={self.a}: above 0")

    def center(self, u: Tensor) -> Tensor:
        """mu(t) = 2 t^a - 1."""
        return 2 * u.clamp(0, 1) ** self.a - 1

    def level(self, u: Tensor, random: Random = None) -> Tensor:
        """beta_s [B]."""
        return self.beta_m * torch.sigmoid(self.center(u) + normal_like(u, random))

    def __call__(self, y: Tensor, u: Tensor, random: Random = None) -> tuple[Tensor, Tensor]:
        level = self.level(u.to(device=y.device, dtype=torch.float32), random)
        return y + per_sample(level, y) * normal_like(y, random), level

    def mean_level(self, points: int = 200) -> float:
        """E[beta_s] over t ~ U(0, 1): the level at which `ConstantNoise` is this noise's control."""
        u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        n = torch.linspace(-6, 6, 601, dtype=torch.float64)
        density = torch.softmax(-(n**2) / 2, dim=0)
        return float(self.beta_m * (torch.sigmoid(self.center(u)[:, None] + n) * density).sum(1).mean())
