"""Mean and variance per element of more latents than fit in memory, exact in float64."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor

Region = tuple[float, float, float, float]  # top, left, bottom, right, as shares of height and width
BLOCK = 2**18  # float64 elements at once: what a core's cache holds


@dataclass(frozen=True, eq=False)
class Moments:
    """count, mean and M2 (the sum of squared deviations), mergeable in any order.

    The mean is `mean` + `rest`, the part of it that float64 rounds away: of data far from 0 it is what tells the means
    of two batches apart.
    """

    count: int
    mean: Tensor  # float64, the shape of one sample
    rest: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count}: at least 0")
        if not self.mean.shape == self.rest.shape == self.m2.shape:
            shapes = ", ".join(str(list(x.shape)) for x in (self.mean, self.rest, self.m2))
            raise ValueError(f"mean, rest and m2 of shapes {shapes}: one shape")

    @classmethod
    def zeros(cls, shape: Sequence[int]) -> "Moments":
        return cls(0, *(torch.zeros(tuple(shape), dtype=torch.float64) for _ in range(3)))

    @classmethod
    def of(cls, batch: Tensor, ids: Sequence[str] | None = None, std: Tensor | None = None) -> "Moments":
        """Of a batch [N, ...], by two passes. `ids` name the samples where one of them is refused.

        `std`, where the samples are the means of normals: their deviations, whose squares the variance has on top.
        """
        if ids is not None and len(ids) != len(batch):
            raise ValueError(f"{len(ids)} ids for {len(batch)} samples")
        if std is not None and std.shape != batch.shape:
            raise ValueError(f"std of shape {list(std.shape)} for samples of {list(batch.shape)}: one shape")
        if len(batch) == 0:
            return cls.zeros(batch.shape[1:])
        samples, flat = len(batch), batch.detach().flatten(1)
        mean, rest, m2 = torch.empty(3, flat.shape[1], dtype=torch.float64, device=batch.device)
        width = max(BLOCK // samples, 1)
        for begin in range(0, flat.shape[1], width):
            block = slice(begin, begin + width)
            x = flat[:, block].to(torch.float64)
            mean[block] = x.mean(0)
            x = x - mean[block]
            rest[block] = x.mean(0)
            m2[block] = x.square_().sum(0) - samples * rest[block] ** 2
            if std is not None:
                m2[block] += std.detach().flatten(1)[:, block].to(torch.float64).square_().sum(0)
        if not torch.isfinite(m2).all():
            finite = torch.isfinite(flat) if std is None else torch.isfinite(flat) & torch.isfinite(std.flatten(1))
            bad = (~finite).any(1).nonzero().flatten().tolist()
            if not bad:
                raise ValueError("the latents are so large that the squares of their deviations are not finite")
            named = f"at batch positions {bad[:10]}"
            if ids is not None:
                named = f"of {', '.join(str(ids[i]) for i in bad[:10])}"
            raise ValueError(f"NaN or inf in the latents {named} ({len(bad)} of {samples} samples)")
        shape = batch.shape[1:]
        return cls(samples, mean.reshape(shape).cpu(), rest.reshape(shape).cpu(), m2.reshape(shape).cpu())

    @classmethod
    def merged(cls, parts: Iterable["Moments"]) -> "Moments":
        total = None
        for part in parts:
            total = part if total is None else total.merge(part)
        if total is None:
            raise ValueError("parts: at least one")
        return total

    def merge(self, other: "Moments") -> "Moments":
        """Chan et al. 1983: exact whatever the two counts."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {tuple(self.mean.shape)} cannot merge with {tuple(other.mean.shape)}")
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        share = other.count / count
        delta = (other.mean - self.mean) + (other.rest - self.rest)
        step = delta * share + self.rest
        mean = self.mean + step
        # What the sum has lost: Knuth's two-sum.
        back = mean - self.mean
        rest = (self.mean - (mean - back)) + (step - back)
        return Moments(count, mean, rest, self.m2 + other.m2 + delta**2 * (self.count * share))

    def without(self, counted: Tensor) -> "Moments":
        """As if elements [..., H, W] that do not count had the mean and the spread of those beside them that do.

        `counted` [H, W] is true where they do: outside a watermark, which stands in every sample.
        """

        def filled(x: Tensor) -> Tensor:
            return torch.where(counted, x, x[..., counted].mean(-1)[..., None, None])

        if not counted.any():
            raise ValueError("counted: nothing is left")
        return Moments(self.count, filled(self.mean), filled(self.rest), filled(self.m2))

    @property
    def variance(self) -> Tensor:
        """Population variance per element: the diagonal of Cov."""
        if self.count == 0:
            raise ValueError("count=0: a variance needs at least one sample")
        return self.m2 / self.count

    @property
    def trace_cov_per_dim(self) -> float:
        """tr(Cov) / d."""
        return float(self.variance.mean())

    def to_bytes(self) -> bytes:
        count = torch.tensor(self.count)
        return safetensors.torch.save({"count": count, "mean": self.mean, "rest": self.rest, "m2": self.m2})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Moments":
        try:
            state = safetensors.torch.load(data)
            return cls(int(state["count"]), state["mean"], state["rest"], state["m2"])
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"not moments: {error}") from None


def outside(regions: Iterable[Region], height: int, width: int) -> Tensor:
    """[height, width], true where a cell touches none of the regions."""

    def touched(begin: float, end: float, cells: int) -> slice:
        # To a millionth of a cell: 0.07 of 100 cells is 7.000000000000001 of them.
        return slice(math.floor(begin * cells + 1e-6), math.ceil(end * cells - 1e-6))

    counted = torch.ones(height, width, dtype=torch.bool)
    for top, left, bottom, right in regions:
        counted[touched(top, bottom, height), touched(left, right, width)] = False
    return counted
