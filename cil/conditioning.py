"""What is done to the conditional image in training: nothing, constant noise, CDM's, or TimeNoise.

Each kind is called as `image, level = kind(y, u, random)` with the conditional latent y [B, ...], taken once a clip,
and u [B], the diffusion time in [0, 1] (`process.unit_time(t)`). With `frames=T` the image comes back repeated,
[B, T, ...]: noised once, then repeated, because a network could average noise away that differs from frame to frame.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cil.draws import Random, normal_like, uniform_like
from cil.processes import per_sample

Form = Literal["elementwise", "per_frame", "scalar"]


class ConditioningNoise(ABC):
    form: Form = "elementwise"

    @abstractmethod
    def levels(self, u: Tensor, random: Random = None) -> Tensor:
        """The deviation of each sample's noise [B]."""

    def __call__(self, y: Tensor, u: Tensor, random: Random = None, frames: int | None = None) -> tuple[Tensor, Tensor]:
        if u.shape != y.shape[:1]:
            raise ValueError(f"u of shape {list(u.shape)}: a time for each of {len(y)} samples")
        level = self.levels(u.to(device=y.device, dtype=torch.float32), random)
        if self.form == "per_frame":
            if frames is None:
                raise ValueError("frames=None: noise of the form per_frame needs the number of frames")
            y = repeated(y, frames)
            return y + per_sample(level, y) * normal_like(y, random), level
        eps = normal_like(per_sample(level, y) if self.form == "scalar" else y, random)
        return repeated(y + per_sample(level, y) * eps, frames), level


@dataclass(frozen=True)
class CleanCondition(ConditioningNoise):
    """Naive fine-tuning: the image as it is. Nothing is drawn."""

    def levels(self, u: Tensor, random: Random = None) -> Tensor:
        return torch.zeros_like(u)

    def __call__(self, y: Tensor, u: Tensor, random: Random = None, frames: int | None = None) -> tuple[Tensor, Tensor]:
        return repeated(y, frames), torch.zeros(len(y), device=y.device)


@dataclass(frozen=True)
class ConstantNoise(ConditioningNoise):
    """The control without time: one noise level for every t."""

    level: float

    def __post_init__(self) -> None:
        if not 0 <= self.level < math.inf:
            raise ValueError(f"level={self.level}: at least 0")

    def levels(self, u: Tensor, random: Random = None) -> Tensor:
        return torch.full_like(u, self.level)


@dataclass(frozen=True)
class CDM(ConditioningNoise):
    """Conditioning augmentation of cascaded diffusion (Ho et al. 2022): a level ~ U(0, max_level) for each sample.

    It is meant to be told to the network: families that can, put the level into the condition.
    """

    max_level: float

    def __post_init__(self) -> None:
        if not 0 <= self.max_level < math.inf:
            raise ValueError(f"max_level={self.max_level}: at least 0")

    def levels(self, u: Tensor, random: Random = None) -> Tensor:
        return self.max_level * uniform_like(u, random)


@dataclass(frozen=True)
class TimeNoise(ConditioningNoise):
    """y + beta_s eps, beta_s = beta_m sigmoid(n), n ~ N(mu(t), 1), mu(t) = 2 t^a - 1: a logit-normal that rises with t.

    `form` and `mu_max` other than these are the reference's, for `cil.recipes`: eps drawn anew for each frame, or one
    number for all of y; and mu(t) stretched by 4 in its VideoCrafter1.
    """

    beta_m: float
    a: float = 5.0
    mu_max: float = 1.0
    form: Form = "elementwise"

    def __post_init__(self) -> None:
        if not 0 <= self.beta_m < math.inf:
            raise ValueError(f"beta_m={self.beta_m}: at least 0")
        for name, value in (("a", self.a), ("mu_max", self.mu_max)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: above 0")
        if self.form not in get_args(Form):
            raise ValueError(f"form={self.form!r}: one of {', '.join(get_args(Form))}")

    def center(self, u: Tensor) -> Tensor:
        """mu(t). u is a share of the process, `process.unit_time(t)`, and not t."""
        # On a GPU the look would wait for the device.
        if u.device.type == "cpu" and not bool(((u >= 0) & (u <= 1)).all()):
            raise ValueError(f"u={u.tolist()}: in 0..1, process.unit_time(t)")
        return self.mu_max * (2 * u.clamp(0, 1) ** self.a - 1)

    def levels(self, u: Tensor, random: Random = None) -> Tensor:
        """beta_s."""
        return self.beta_m * torch.sigmoid(self.center(u) + normal_like(u, random))

    def density(self, level: Tensor, u: Tensor) -> Tensor:
        """p(beta_s | t), for 0 < beta_s < beta_m."""
        x = level / self.beta_m
        n = torch.logit(x) - self.center(u)
        return torch.exp(-(n**2) / 2) / (math.sqrt(2 * math.pi) * self.beta_m * x * (1 - x))

    def mean_level(self, u: Tensor | None = None) -> float:
        """E[beta_s] over training times u (default: even in [0, 1]); `ConstantNoise` of this level is the control."""
        if u is None:
            u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
        n = torch.linspace(-6, 6, 601, dtype=torch.float64)
        density = torch.softmax(-(n**2) / 2, dim=0)
        return float(self.beta_m * (torch.sigmoid(self.center(u)[:, None] + n) * density).sum(1).mean())


def repeated(y: Tensor, frames: int | None) -> Tensor:
    """[B, ...] -> [B, T, ...]"""
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: at least 1")
    return y if frames is None else y.unsqueeze(1).expand(-1, frames, *y.shape[1:])


@dataclass(frozen=True)
class Diagnosis:
    """What TimeNoise is over the times of a training run: a check of a recipe before GPU hours go into it."""

    mu: tuple[float, ...]  # quantiles .05, .5, .95 of mu(t)
    level: tuple[float, ...]  # and of beta_s
    time_share: float  # of the variance of logit(beta_s / beta_m), what t explains

    @property
    def constant(self) -> bool:
        """Over nearly all times mu(t) moves by less than a fifth of the deviation that n has at any one time."""
        return self.mu[-1] - self.mu[0] < 0.2

    def __str__(self) -> str:
        mu, level = (" / ".join(f"{value:.3g}" for value in values) for values in (self.mu, self.level))
        shown = f"mu(t) {mu}, beta_s {level} (quantiles .05 / .5 / .95); t explains {self.time_share:.1%} of the level"
        if self.constant:
            shown += ". WARNING: it cannot be told from `constant`: choose another a, or (EDM) time_map='log_sigma'"
        return shown


def diagnose(noise: TimeNoise, u: Tensor) -> Diagnosis:
    """`u` [N] are training times in [0, 1]: `process.unit_time(process.training_times())`."""
    if u.dim() != 1 or len(u) == 0:
        raise ValueError(f"u of shape {list(u.shape)}: a row of training times")
    u = u.cpu()
    p = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    mu = noise.center(u.double()).sort().values
    normal = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200)
    level = noise.beta_m * torch.sigmoid(mu[:: max(len(mu) // 1000, 1), None] + normal).flatten()
    spread = float(mu.var(correction=0))
    return Diagnosis(tuple(mu.quantile(p).tolist()), tuple(level.quantile(p).tolist()), spread / (spread + 1))
