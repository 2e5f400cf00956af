"""How noise is added: x_t = alpha(t) s(t) x_0 + sigma(t) eps, with s(t) = 1 unless a process rescales its signal.

| process | t is                | M is             | alpha          | sigma               |
|---------|---------------------|------------------|----------------|---------------------|
| VP      | an index, 0..T-1    | t + 1, 1..T      | sqrt(abar_t)   | sqrt(1 - abar_t)    |
| EDM     | the noise level     | the noise level  | 1              | t                   |
| Flow    | a share of the way  | the same, (0, 1] | 1 - t          | t                   |
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from math import inf, isfinite, log
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from cil.draws import Draws

Prediction = Literal["eps", "v", "x0", "flow"]
Spacing = Literal["trailing", "leading", "uniform", "linspace"]
TimeMap = Literal["log_sigma", "sigma"]
Betas = Literal["scaled_linear", "squared_cosine"]


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] in the type and on the device of `like`; a number stays one."""
    if value.dim() and value.shape != like.shape[:1]:
        raise ValueError(f"one number a sample: {list(value.shape)} for a batch of shape {list(like.shape)}")
    return value.to(like).reshape(-1, *[1] * (like.dim() - 1))


class Process(ABC):
    """What every process answers. t is a tensor of any shape, [B] where latents [B, ...] go with it."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    def x0_scale(self, t: Tensor) -> Tensor:
        """s(t), what x_0 is multiplied with before anything else."""
        return torch.ones_like(t, dtype=torch.float64)

    @abstractmethod
    def unit_time(self, t: Tensor) -> Tensor:
        """The time in [0, 1] that TimeNoise sees."""

    @abstractmethod
    def start(self, M: float) -> Tensor:
        """The time at which sampling from M starts: x_M is drawn for it, and the first model call made at it."""

    @abstractmethod
    def times(self, steps: int, M: float | None = None) -> Tensor:
        """The times of `steps` model calls, falling from M's (default: the end of the process)."""

    @abstractmethod
    def draw_times(self, draws: Draws) -> Tensor:
        """One time for each sample, distributed as in training."""

    @abstractmethod
    def training_times(self, points: int = 1000) -> Tensor:
        """The quantiles of `draw_times`, evenly spaced."""

    @abstractmethod
    def shifted(self, by: float) -> Self:
        """With sigma / alpha `by` times as large at each training time: the log-SNR there falls by 2 ln `by`."""

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t as a network wants them."""
        return x_t, t

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        _same_shape("eps", eps, x0)
        return per_sample(self.alpha(t) * self.x0_scale(t), x0) * x0 + per_sample(self.sigma(t), x0) * eps

    # v and flow are two angles in the plane of (s x_0, eps). v is turned by 90 degrees from x_t, whatever its length;
    # on EDM, with alpha = 1, that makes SVD's "v-scaling": x_0 = x_t / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1).

    def target(self, prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a network with this kind of prediction should have answered."""
        _same_shape("eps", eps, x0)
        if prediction == "x0":
            return x0
        if prediction == "eps":
            return eps
        signal = per_sample(self.x0_scale(t), x0) * x0
        if prediction == "flow":
            return eps - signal
        if prediction == "v":
            alpha, sigma = self.alpha(t), self.sigma(t)
            length = torch.hypot(alpha, sigma)
            return per_sample(alpha / length, x0) * eps - per_sample(sigma / length, x0) * signal
        raise ValueError(f"prediction={prediction!r}: one of {', '.join(get_args(Prediction))}")

    def split(self, prediction: Prediction, answer: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The (x0, eps) that a network's answer means."""
        _same_shape("answer", answer, x_t)
        alpha, sigma, scale = self.alpha(t), self.sigma(t), self.x0_scale(t)
        a, b = (per_sample(c, x_t) for c in (alpha, sigma))
        if prediction == "x0":
            return answer, (x_t - per_sample(alpha * scale, x_t) * answer) / b
        if prediction == "eps":
            if x_t.device.type == "cpu" and (alpha == 0).any():
                raise ValueError("prediction='eps': where alpha is 0 it says nothing of x_0; use v or x0")
            signal, eps = (x_t - b * answer) / a, answer
        elif prediction == "v":
            square = alpha**2 + sigma**2
            length = square.sqrt()
            x_share, v_share = (per_sample(c / square, x_t) for c in (alpha, sigma))
            signal = x_share * x_t - per_sample(sigma / length, x_t) * answer
            eps = v_share * x_t + per_sample(alpha / length, x_t) * answer
        elif prediction == "flow":
            both = per_sample(alpha + sigma, x_t)
            signal, eps = (x_t - b * answer) / both, (x_t + a * answer) / both
        else:
            raise ValueError(f"prediction={prediction!r}: one of {', '.join(get_args(Prediction))}")
        return signal / per_sample(scale, x_t), eps


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving, in discrete steps.

    `betas`: LDM's scaled_linear, or squared_cosine (I2VGen-XL). `zero_snr`: rescaled to end without any signal.
    `rescale`: LVDM's dynamic rescale, x_0 times a factor that falls from 1 to this over the first `turning_step` steps.
    `shift`: sigma / alpha times this at every index, in training and sampling.
    """

    steps: int = 1000
    betas: Betas = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = False
    rescale: float = 1.0
    turning_step: int = 400
    shift: float = 1.0

    def __post_init__(self) -> None:
        least = 2 if self.zero_snr else 1
        if self.steps < least:
            raise ValueError(f"steps={self.steps}: at least {least}")
        if self.betas not in get_args(Betas):
            raise ValueError(f"betas={self.betas!r}: one of {', '.join(get_args(Betas))}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start}, beta_end={self.beta_end}: 0 < beta_start <= beta_end < 1")
        if not 0 < self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale}: above 0, at most 1")
        if self.turning_step < 1:
            raise ValueError(f"turning_step={self.turning_step}: at least 1")
        _check_shift(self.shift)

    def shifted(self, by: float) -> Self:
        return replace(self, shift=self.shift * by)

    @cached_property
    def alphas_bar(self) -> Tensor:
        """prod(1 - beta), shifted, float64 [steps]. Where there is no signal, there is none after a shift."""
        abar = self._plain_alphas_bar
        return abar if self.shift == 1 else abar / (abar + self.shift**2 * (1 - abar))

    @property
    def _plain_alphas_bar(self) -> Tensor:
        if self.betas == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64) ** 2
        else:  # Nichol and Dhariwal 2021, equation 17
            angles = (torch.arange(self.steps + 1, dtype=torch.float64) / self.steps + 0.008) / 1.008
            curve = torch.cos(angles * torch.pi / 2) ** 2
            betas = (1 - curve[1:] / curve[:-1]).clamp_max(0.999)
        alphas_bar = torch.cumprod(1 - betas, dim=0)
        if not self.zero_snr:
            return alphas_bar
        # Lin et al. 2023, algorithm 1: shift sqrt(alpha_bar) to end at 0, and scale it to begin where it began.
        root = alphas_bar.sqrt()
        return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    @cached_property
    def scale_arr(self) -> Tensor:
        """The factors of the dynamic rescale as LVDM's checkpoints hold them, [turning_step + steps]."""
        falling = torch.linspace(1.0, self.rescale, self.turning_step, dtype=torch.float64)
        return torch.cat([falling, torch.full((self.steps,), self.rescale, dtype=torch.float64)])

    def alpha(self, t: Tensor) -> Tensor:
        return self._at(0, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._at(1, t)

    def x0_scale(self, t: Tensor) -> Tensor:
        return self._at(2, t)

    def unit_time(self, t: Tensor) -> Tensor:
        return self._index(t) / self.steps

    def start(self, M: float) -> Tensor:
        if not 1 <= M <= self.steps or int(M) != M:
            raise ValueError(f"M={M}: an integer in 1..{self.steps}")
        return torch.tensor(int(M) - 1)

    def times(self, steps: int, M: float | None = None, spacing: Spacing = "trailing") -> Tensor:
        """`steps` distinct indices, falling, in exact arithmetic.

        trailing  from M-1, evenly, the last a width above -1
        linspace  from M-1, evenly, to 0
        leading   multiples of M // steps, as diffusers has them with steps_offset=0
        uniform   one above them, as LVDM and diffusers with steps_offset=1

        leading and uniform start below M-1: draw x for times[0].
        """
        M = self.steps if M is None else int(self.start(M)) + 1
        if not 1 <= steps <= M:
            raise ValueError(f"steps={steps}: from M={M} there are 1..{M} steps to take")
        width = M // steps
        if spacing == "trailing":
            indices = [round(Fraction(M * (steps - i), steps)) - 1 for i in range(steps)]
        elif spacing == "linspace":
            indices = [round(Fraction((M - 1) * (steps - 1 - i), max(steps - 1, 1))) for i in range(steps)]
            indices[0] = M - 1
        elif spacing == "leading":
            indices = [width * (steps - 1 - i) for i in range(steps)]
        elif spacing == "uniform":
            first = 1 if width * (steps - 1) + 1 < M else 0
            indices = [width * (steps - 1 - i) + first for i in range(steps)]
        else:
            raise ValueError(f"spacing={spacing!r}: one of {', '.join(get_args(Spacing))}")
        return torch.tensor(indices)

    def draw_times(self, draws: Draws) -> Tensor:
        return draws.integers(self.steps)

    def training_times(self, points: int = 1000) -> Tensor:
        return (_shares(points) * self.steps).long()

    def _at(self, row: int, t: Tensor) -> Tensor:
        return _vp_table(self, t.device)[row, self._index(t)]

    def _index(self, t: Tensor) -> Tensor:
        if t.is_floating_point():
            raise ValueError(f"t={t}: an index, 0..{self.steps - 1}")
        # A negative index would silently read the table from its end. On a GPU the look would wait for the device.
        if t.device.type == "cpu" and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < self.steps:
            raise ValueError(f"t={t.tolist()}: indices in 0..{self.steps - 1}")
        return t.long()


@lru_cache(maxsize=16)
def _vp_table(process: VP, device: torch.device) -> Tensor:
    """alpha, sigma and s at every step, float64 [3, steps]."""
    abar = process.alphas_bar
    return torch.stack([abar.sqrt(), (1 - abar).sqrt(), process.scale_arr[: process.steps]]).to(device)


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding, as SVD is trained: t is sigma, ln t ~ N(P_mean, P_std^2) in training.

    `time_map` is what TimeNoise sees: log_sigma, even in ln t between the bounds, or sigma, the reference's
    t / sigma_max, at which nearly every training draw is 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 700.0
    P_mean: float = 0.7
    P_std: float = 1.6
    time_map: TimeMap = "log_sigma"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < inf:
            bounds = f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}"
            raise ValueError(f"{bounds}: 0 < sigma_min < sigma_max")
        if not isfinite(self.P_mean):
            raise ValueError(f"P_mean={self.P_mean}: a number")
        if not 0 < self.P_std < inf:
            raise ValueError(f"P_std={self.P_std}: above 0")
        if self.time_map not in get_args(TimeMap):
            raise ValueError(f"time_map={self.time_map!r}: one of {', '.join(get_args(TimeMap))}")

    def shifted(self, by: float) -> Self:
        """Of training's sigmas. t is the noise itself, so sampling's range and the time that TimeNoise sees stay."""
        _check_shift(by)
        return replace(self, P_mean=self.P_mean + log(by))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return _checked(t, "sigma", 0.0, inf).double()

    def unit_time(self, t: Tensor) -> Tensor:
        t = self.sigma(t)
        if self.time_map == "log_sigma":
            t = (t.log() - log(self.sigma_min)) / (log(self.sigma_max) - log(self.sigma_min))
        else:
            t = t / self.sigma_max
        return t.clamp(0, 1).float()

    def start(self, M: float) -> Tensor:
        if not self.sigma_min <= M <= self.sigma_max:
            raise ValueError(f"M={M}: a sigma in {self.sigma_min}..{self.sigma_max}")
        return torch.tensor(float(M), dtype=torch.float64)

    def times(self, steps: int, M: float | None = None) -> Tensor:
        """Karras et al. 2022, equation 5 with rho = 7, from M to sigma_min; after the last the sampler steps to 0."""
        first = self.start(self.sigma_max if M is None else M)
        if not steps >= 1:
            raise ValueError(f"steps={steps}: at least 1")
        if steps > 1 and first == self.sigma_min:
            raise ValueError(f"steps={steps}: from M={M}, which is sigma_min, there is one step to take")
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        root, last = float(first) ** (1 / 7), self.sigma_min ** (1 / 7)
        sigmas: Tensor = (root + ramp * (last - root)) ** 7
        sigmas[0] = first
        return sigmas

    def draw_times(self, draws: Draws) -> Tensor:
        return torch.exp(self.P_mean + self.P_std * draws.normal())

    def training_times(self, points: int = 1000) -> Tensor:
        return torch.exp(self.P_mean + self.P_std * torch.special.ndtri(_shares(points)))

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(t)
        return per_sample(1 / (sigma**2 + 1).sqrt(), x_t) * x_t, (sigma.log() / 4).to(x_t.dtype)


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow: a straight line from x_0 at t = 0 to noise at t = 1.

    `shift`: times that are even without it are s t / (1 + (s - 1) t), in training and sampling.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_shift(self.shift)

    def shifted(self, by: float) -> Self:
        return replace(self, shift=self.shift * by)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return _checked(t, "t", 0.0, 1.0).double()

    def unit_time(self, t: Tensor) -> Tensor:
        return self.sigma(t).float()

    def start(self, M: float) -> Tensor:
        if not 0 < M <= 1:
            raise ValueError(f"M={M}: above 0, at most 1")
        return torch.tensor(float(M), dtype=torch.float64)

    def times(self, steps: int, M: float | None = None) -> Tensor:
        """Evenly from M, before the shift; after the last the sampler steps to 0."""
        if not steps >= 1:
            raise ValueError(f"steps={steps}: at least 1")
        first = self.start(1.0 if M is None else M)
        unshifted = first / (self.shift - (self.shift - 1) * first)
        times = self._shifted(unshifted * torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1])
        times[0] = first
        return times

    def draw_times(self, draws: Draws) -> Tensor:
        return self._shifted(1 - draws.uniform())  # in (0, 1]

    def training_times(self, points: int = 1000) -> Tensor:
        return self._shifted(_shares(points))

    def _shifted(self, t: Tensor) -> Tensor:
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)


def _shares(points: int) -> Tensor:
    """The middles of equal parts of [0, 1]."""
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


def _check_shift(shift: float) -> None:
    if not 0 < shift < inf:
        raise ValueError(f"shift={shift}: above 0")


def _same_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name} of shape {list(value.shape)}: {list(like.shape)}, as what it goes with")


def _checked(t: Tensor, name: str, low: float, high: float) -> Tensor:
    """t, if it is in the range. On a GPU the look would wait for the device."""
    if not t.is_floating_point():
        raise ValueError(f"{name}={t.tolist()}: not an index, but a number of the process")
    if t.device.type == "cpu" and t.numel() and not bool(((t >= low) & (t <= high)).all()):
        raise ValueError(f"{name}={t.tolist()}: {f'at least {low:g}' if high == inf else f'{low:g}..{high:g}'}")
    return t
