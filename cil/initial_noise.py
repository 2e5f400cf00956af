"""Analytic-Init: sampling starts at M < T from the normal that is KL-optimal for the marginal at M.

Equation (5) of the paper: x_M ~ N(alpha_M E[X0], (alpha_M^2 tr(Cov X0)/d + sigma_M^2) I).
"""

import json
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from cil.conditioning import Random
from cil.draws import normal_like
from cil.moments import Moments
from cil.processes import VP


@dataclass(frozen=True)
class InitialNoise:
    """E[X0] [T, C, H, W] and tr(Cov)/d of the training latents."""

    mean: Tensor
    variance: float
    count: int

    def __post_init__(self) -> None:
        if not self.variance >= 0:
            raise ValueError(f"variance={self.variance}: at least 0")

    @classmethod
    def from_moments(cls, moments: Moments) -> "InitialNoise":
        return cls(moments.mean, moments.trace_cov_per_dim, moments.count)

    @classmethod
    def standard(cls, shape: tuple[int, ...]) -> "InitialNoise":
        """N(0, I) at every M: the start without Analytic-Init."""
        return cls(torch.zeros(shape, dtype=torch.float64), 1.0, 0)

    def at(self, process: VP, M: int) -> tuple[Tensor, float]:
        """Mean [T, C, H, W] and standard deviation of x_M."""
        t = process.start(M)
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * self.mean, float((alpha**2 * self.variance + sigma**2).sqrt())

    def sample(self, process: VP, M: int, batch: int, random: Random = None) -> Tensor:
        """x_M [batch, T, C, H, W], float32."""
        mean, std = self.at(process, M)
        eps = normal_like(torch.empty(batch, *self.mean.shape), random)
        return mean.to(eps) + std * eps

    def to_bytes(self, **provenance: str) -> bytes:
        """A safetensors file whose metadata say where the figures are from."""
        facts = {"variance": repr(self.variance), "count": str(self.count)}
        return safetensors.torch.save({"mean": self.mean.contiguous()}, metadata={**provenance, **facts})

    @classmethod
    def from_bytes(cls, data: bytes) -> "InitialNoise":
        length = int.from_bytes(data[:8], "little")
        facts = json.loads(data[8 : 8 + length])["__metadata__"]
        return cls(safetensors.torch.load(data)["mean"], float(facts["variance"]), int(facts["count"]))
