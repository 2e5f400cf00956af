"""Analytic-Init: sampling starts at M < T from the normal that is KL-optimal for the marginal at M.

Equation (5) of the paper: x_M ~ N(alpha_M E[X0], (alpha_M^2 tr(Cov X0)/d + sigma_M^2) I).

    noise = InitialNoise.load("initial_noise_512.pt")       # or a file of ours
    t = process.start(M=940)
    x_M = noise.sample(process, t, batch=4)                 # [4, T, C, H, W]
"""

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
import torch
from torch import Tensor

from cil.checkpoints import MAKES_ROOM, REFUSED_ROOM, check_zip, refuse_inflated
from cil.draws import Random, normal_like
from cil.moments import Moments
from cil.processes import EDM, Process

Covariance = Literal["isotropic", "diagonal"]
Layout = Literal["lvdm", "svd"]

# The keys of the two published layouts: E[X0], tr(Cov)/d.
PUBLISHED: dict[Layout, tuple[str, str]] = {
    "lvdm": ("Expectation_X0", "Tr_Cov_d"),  # B C T H W: DynamiCrafter, VideoCrafter1
    "svd": ("Expectation_x_0", "trCov_d"),  # T C H W, or B T C H W
}

RESERVED = {"variance", "count", "mean_error", "variance_error"}


@dataclass(frozen=True, eq=False)
class InitialNoise:
    """E[X0] [T, C, H, W] and tr(Cov)/d of the training latents, with what is known of where they are from."""

    mean: Tensor
    variance: float
    diagonal: Tensor | None = None  # of Cov; published files do not have it
    count: int = 0  # samples; 0 where a file does not say
    mean_error: float | None = None  # standard errors: root mean square over the elements of E[X0],
    variance_error: float | None = None  # and of tr(Cov)/d
    facts: Mapping[str, str] = field(default_factory=dict)  # family, scaling_factor, ...
    standard_start: bool = False  # that of latents ~ N(0, I), whatever a dynamic rescale would make of them

    def __post_init__(self) -> None:
        if not 0 <= self.variance < float("inf"):
            raise ValueError(f"variance={self.variance}: at least 0")
        if self.count < 0:
            raise ValueError(f"count={self.count}: at least 0")
        if self.mean.dim() != 4 or 0 in self.mean.shape:
            raise ValueError(f"mean of shape {list(self.mean.shape)}: E[X0] is [T, C, H, W]")
        if not torch.isfinite(self.mean).all():
            raise ValueError("mean: E[X0] has NaN or inf")
        if self.diagonal is not None:
            if self.diagonal.shape != self.mean.shape:
                raise ValueError(f"diagonal of {list(self.diagonal.shape)} beside a mean of {list(self.mean.shape)}")
            if not bool(((self.diagonal >= 0) & (self.diagonal < float("inf"))).all()):
                raise ValueError("diagonal: variances are at least 0 and finite")
        if taken := RESERVED & self.facts.keys():
            raise ValueError(f"facts: {', '.join(sorted(taken))} are names of figures")

    @classmethod
    def from_moments(cls, *groups: Moments, counted: Tensor | None = None, **facts: str) -> "InitialNoise":
        """Of moments, in one or in several groups that share no video: standard errors are told by several.

        `counted` [H, W] is true outside a watermark, say: what lies inside gets the mean and the spread of the rest.

        The errors are a jackknife over groups, each left out in turn, and so need no assumption on how clips of a video
        or elements of a latent hang together. With one group only that of the mean is known, as of independent samples.
        """
        total = Moments.merged(groups)
        said = {name: str(fact) for name, fact in facts.items()}
        shown = total if counted is None else total.without(counted)
        noise = cls(shown.mean, shown.trace_cov_per_dim, shown.variance, total.count, facts=said)
        where = slice(None) if counted is None else counted
        groups = tuple(group for group in groups if group.count)
        if len(groups) < 2:
            alone = noise.count < 2  # says nothing of its own spread
            return noise if alone else replace(noise, mean_error=(noise.variance / (noise.count - 1)) ** 0.5)
        squares = torch.zeros_like(total.mean)
        shifts, variances = [], []
        for group in groups:
            left = total.count - group.count
            delta = (group.mean - total.mean) + (group.rest - total.rest)
            shifts.append(-delta * (group.count / left))  # of the mean without this group
            m2 = total.m2 - group.m2 - delta**2 * (group.count * total.count / left)
            variances.append(float(m2[..., where].mean()) / left)
        middle = torch.stack(shifts).mean(0)
        for shift in shifts:
            squares += (shift - middle) ** 2
        share = (len(groups) - 1) / len(groups)
        spread = torch.tensor(variances, dtype=torch.float64).sub(sum(variances) / len(variances)).square().sum()
        return replace(
            noise,
            mean_error=float((share * squares[..., where]).mean()) ** 0.5,
            variance_error=float(share * spread) ** 0.5,
        )

    @classmethod
    def standard(cls, shape: tuple[int, ...]) -> "InitialNoise":
        """The start without Analytic-Init: N(0, I) on a VP process, N(0, (sigma^2 + 1) I) on EDM."""
        return cls(torch.zeros(shape, dtype=torch.float64), 1.0, standard_start=True)

    # -- the start of sampling ---------------------------------------------------------------------------------------

    def at(
        self, process: Process, t: Tensor, covariance: Covariance = "isotropic", reference_compat: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean [T, C, H, W] and standard deviation of x_M, for the time that sampling starts at.

        A process with a dynamic rescale has its signal scaled, and so have the mean and variance here. The deviation is
        one number; `diagonal`: one for each element. `reference_compat` is the start of published samples: without
        the dynamic rescale, and on EDM as SVD's pipeline really makes it, where mean and variance have changed places.
        """
        if not isinstance(t, Tensor):
            raise ValueError(f"t={t!r}: a time of the process; of M it is process.start(M)")
        if covariance not in get_args(Covariance):
            raise ValueError(f"covariance={covariance!r}: one of {', '.join(get_args(Covariance))}")
        alpha, sigma = process.alpha(t).cpu(), process.sigma(t).cpu()
        if reference_compat and covariance == "diagonal":
            raise ValueError("covariance='diagonal': the reference knows isotropic only")
        if self.standard_start:
            return self.mean, torch.hypot(alpha, sigma)
        if reference_compat and isinstance(process, EDM):
            return torch.full_like(self.mean, self.variance), (sigma**2 + 1 + self.mean).sqrt()
        if not reference_compat:
            alpha = alpha * process.x0_scale(t).cpu()
        variance: float | Tensor = self.variance
        if covariance == "diagonal":
            variance = self._known_diagonal()
        return alpha * self.mean, (alpha**2 * variance + sigma**2).sqrt()

    def sample(
        self,
        process: Process,
        t: Tensor,
        batch: int,
        random: Random = None,
        covariance: Covariance = "isotropic",
        reference_compat: bool = False,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """x_M [batch, T, C, H, W], float32, each sample with noise of its own."""
        if batch < 1:
            raise ValueError(f"batch={batch}: at least 1")
        mean, std = self.at(process, t, covariance, reference_compat)
        eps = normal_like(torch.empty(batch, *self.mean.shape, device=device), random)
        return mean.to(eps) + std.to(eps) * eps

    def divergence(self, process: Process, t: Tensor, covariance: Covariance | Literal["standard"]) -> float:
        """KL(marginal at t || start) per dimension, in nats, for a start of this covariance or the standard one.

        The marginal is taken as the normal with these moments; correlations between elements, which no start here has,
        would add the same to each.
        """
        mean, spread = self.at(process, t, "diagonal")
        if covariance == "standard":
            start, std = self.standard(tuple(mean.shape)).at(process, t)
        else:
            start, std = self.at(process, t, covariance)
        ratio = (spread / std) ** 2
        return float((ratio - 1 - ratio.log() + ((mean - start) / std) ** 2).mean() / 2)

    def _known_diagonal(self) -> Tensor:
        if self.diagonal is None:
            raise ValueError("covariance='diagonal': this initial noise has none; published files hold tr(Cov)/d only")
        return self.diagonal

    # -- what it is good for -----------------------------------------------------------------------------------------

    def check(self, shape: tuple[int, ...], family: str | None = None, scaling_factor: float | None = None) -> None:
        """Refuses to be used for latents [T, C, H, W] of another shape, or for another family or scaling factor.

        What a file does not say, as published ones do not, cannot be checked.
        """
        if len(shape) != 4:
            raise ValueError(f"shape={tuple(shape)}: T, C, H, W")
        wanted = {"family": family, "scaling_factor": scaling_factor}
        pairs = [
            (name, self.facts[name], str(value))
            for name, value in wanted.items()
            if value is not None and name in self.facts
        ]
        sizes = ("frames", "channels", "latent height", "latent width")
        pairs += [(name, str(have), str(want)) for name, have, want in zip(sizes, self.mean.shape, shape, strict=True)]
        if differing := [f"{name} {have}, not {want}" for name, have, want in pairs if have != want]:
            raise ValueError(f"initial noise of {', '.join(differing)}")

    def __str__(self) -> str:
        """The estimates with their standard errors, and whether the videos were enough."""
        size = float(self.mean.square().mean()) ** 0.5
        mean_error, variance_error = (
            "" if error is None else f" ± {error:.2g}" for error in (self.mean_error, self.variance_error)
        )
        of = f", from {self.count} samples" if self.count else ""
        shown = f"E[X0] rms {size:.4g}{mean_error}, tr(Cov)/d {self.variance:.4g}{variance_error}{of}"
        if self.mean_error is not None and self.mean_error**2 > 0.1 * size**2:
            share = min(self.mean_error**2 / size**2, 1) if size else 1
            shown += f". {share:.0%} of E[X0] is sampling noise: more videos would make it better"
        return shown

    # -- files -------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Our own file: safetensors, whose metadata hold the figures and facts."""
        self._refuse_standard()
        tensors = {"mean": self.mean.contiguous()}
        if self.diagonal is not None:
            tensors["diagonal"] = self.diagonal.contiguous()
        figures = {"variance": self.variance, "mean_error": self.mean_error, "variance_error": self.variance_error}
        metadata = {name: repr(value) for name, value in figures.items() if value is not None}
        return safetensors.torch.save(tensors, metadata={**self.facts, **metadata, "count": str(self.count)})

    def to_published(self, layout: Layout) -> bytes:
        """A `.pt` file that the reference's loaders take."""
        self._refuse_standard()
        if layout not in PUBLISHED:
            raise ValueError(f"layout={layout!r}: one of {', '.join(PUBLISHED)}")
        mean = self.mean.float()
        tensors = (mean.transpose(0, 1)[None] if layout == "lvdm" else mean).contiguous(), torch.tensor(self.variance)
        file = io.BytesIO()
        torch.save(dict(zip(PUBLISHED[layout], tensors, strict=True)), file)
        return file.getvalue()

    def _refuse_standard(self) -> None:
        if self.standard_start:
            raise ValueError("the standard start needs no file: InitialNoise.standard(shape)")

    def save(self, path: str | Path, layout: Layout | None = None) -> None:
        """Our own file, or one of a published layout."""
        Path(path).write_bytes(self.to_bytes() if layout is None else self.to_published(layout))

    @classmethod
    def load(cls, path: str | Path) -> "InitialNoise":
        """Any of the three layouts."""
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"{path}: no file, but a folder, a pipe or a device")
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> "InitialNoise":
        """The content of a file, in any of the three layouts."""
        # Ours begins with the length of its header, and that with a brace; a .pt with its zip's or pickle's mark.
        published = data[8:9] != b"{" and (data[:2] == b"PK" or data[:1] == b"\x80")
        return cls._published(data) if published else cls._ours(data)

    @classmethod
    def _ours(cls, data: bytes) -> "InitialNoise":
        try:
            tensors = safetensors.torch.load(data)
            facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            mean, variance, count = tensors["mean"].double(), float(facts.pop("variance")), int(facts.pop("count", 0))
            mean_error, variance_error = (
                float(facts.pop(name)) if name in facts else None for name in ("mean_error", "variance_error")
            )
        except safetensors.SafetensorError:
            raise ValueError(f"neither a safetensors file of ours nor a .pt (begins with {data[:8]!r})") from None
        except KeyError as error:
            raise ValueError(f"a safetensors file, but not of initial noise (lacks {error})") from None
        except ValueError as error:
            raise ValueError(f"a file of initial noise whose figures are not numbers ({error})") from None
        return cls(mean, variance, tensors.get("diagonal"), count, mean_error, variance_error, facts)

    @classmethod
    def _published(cls, data: bytes) -> "InitialNoise":
        try:
            if data[:2] == b"PK":
                check_zip(io.BytesIO(data))
            elif MAKES_ROOM in data:
                raise ValueError(REFUSED_ROOM)
        except ValueError as error:
            raise ValueError(f"not a .pt file of tensors ({error})") from None
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            objects = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
            reason = "it holds objects other than tensors, which are never loaded" if objects else "damaged"
            raise ValueError(f"not a .pt file of tensors ({reason})") from None
        found = [layout for layout, keys in PUBLISHED.items() if isinstance(state, dict) and set(keys) <= state.keys()]
        if not found:
            keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
            wanted = " or ".join(" and ".join(pair) for pair in PUBLISHED.values())
            raise ValueError(f"a .pt file of {keys}; initial noise has {wanted}")
        layout, names = found[0], PUBLISHED[found[0]]
        for name in names:
            if not _is_real(state[name]):
                raise ValueError(f"{name} is {type(state[name]).__name__}: a tensor of real numbers")
        refuse_inflated({name: torch.as_tensor(state[name]) for name in names})
        mean, variance = (torch.as_tensor(state[name]).detach().double() for name in names)
        if variance.numel() != 1:
            raise ValueError(f"{names[1]} of shape {list(variance.shape)}: one number")
        if mean.dim() == 5 and len(mean) == 1:
            mean = mean[0].transpose(0, 1) if layout == "lvdm" else mean[0]
        elif layout == "lvdm" or mean.dim() != 4:
            wanted = "[1, C, T, H, W]" if layout == "lvdm" else "[T, C, H, W]"
            raise ValueError(f"{names[0]} of shape {list(mean.shape)}: {wanted}")
        return cls(mean.contiguous(), float(variance))


def _is_real(value: object) -> bool:
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        return dense and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, float | int) and not isinstance(value, bool)
