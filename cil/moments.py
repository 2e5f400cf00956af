"""Mean and variance per element of more latents than fit in memory, exact in float64."""

from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor


@dataclass
class Moments:
    """count, mean and M2 (the sum of squared deviations), mergeable in any order."""

    count: int
    mean: Tensor  # float64, the shape of one sample
    m2: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Moments":
        return cls(0, torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))

    @classmethod
    def of(cls, batch: Tensor) -> "Moments":
        """Of a batch [N, ...], by two passes."""
        if len(batch) == 0:
            return cls.zeros(tuple(batch.shape[1:]))
        x = batch.to(torch.float64)
        bad = (~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"latents with NaN or inf at batch positions {bad}")
        mean = x.mean(0)
        return cls(len(x), mean, ((x - mean) ** 2).sum(0))

    def merge(self, other: "Moments") -> "Moments":
        """Chan et al.: exact whatever the two counts."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {tuple(self.mean.shape)} cannot merge with {tuple(other.mean.shape)}")
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def variance(self) -> Tensor:
        """Population variance per element: the diagonal of Cov."""
        if self.count == 0:
            raise ValueError("no samples: a variance needs at least one")
        return self.m2 / self.count

    @property
    def trace_cov_per_dim(self) -> float:
        """tr(Cov) / d."""
        return float(self.variance.mean())

    def to_bytes(self) -> bytes:
        return safetensors.torch.save({"count": torch.tensor(self.count), "mean": self.mean, "m2": self.m2})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Moments":
        state = safetensors.torch.load(data)
        return cls(int(state["count"]), state["mean"], state["m2"])
