"""A training between two points of its curve: its pace, and the loss by bucket of t, where leakage can be seen.

`tflops` is what the network's weights ask of a rank each second, as if all were trained and nothing computed twice;
MFU is its share of what the GPU can do in 16 bits.
"""

import resource
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from cil.flops import BACKWARD, peak_of

BUCKETS = 10


class Curve:
    """Since the last point: losses over all ranks, the last step's norm, and the pace as rank 0 sees it."""

    def __init__(self, device: torch.device, flops: Callable[[], float]) -> None:
        """`flops`: of a sample's forward pass."""
        self.device, self.peak, self.flops = device, peak_of(device), flops
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=self.device)
        self.begin = time.perf_counter()
        self.waited = self.norm = 0.0  # seconds for data, on this rank; of the last step's gradients, on all

    def left_out(self, seconds: float) -> None:
        """Which were not training."""
        self.begin += seconds

    def add(self, loss: Tensor, u: Tensor, norm: float) -> None:
        """Of a step. u: the time in [0, 1] of each loss."""
        self.norm = norm
        bucket = (u * BUCKETS).long().clamp_max(BUCKETS - 1)
        self.sums[0].index_add_(0, bucket, loss.detach().double())
        self.sums[1].index_add_(0, bucket, torch.ones_like(loss, dtype=torch.float64))

    def take(self) -> dict[str, float]:
        dist.all_reduce(self.sums)
        loss, count = self.sums.cpu()
        seconds = time.perf_counter() - self.begin
        values = {
            "loss": float(loss.sum() / count.sum()),
            "gradient_norm": self.norm,
            "samples_per_second": float(count.sum()) / seconds,
            "data_wait": self.waited / seconds,
        }
        flops = self.flops() * (1 + BACKWARD) * values["samples_per_second"] / dist.get_world_size()
        values["tflops"] = flops / 1e12
        if self.peak:
            values["mfu"] = flops / self.peak
        memory: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(memory, _gib(self.device))
        values |= {f"memory_gib_rank{rank}": gib for rank, gib in enumerate(memory)}
        for bucket in range(BUCKETS):
            if count[bucket]:
                values[f"loss_t{bucket * 1000 // BUCKETS:03d}"] = float(loss[bucket] / count[bucket])
        self._clear()
        return values


def _gib(device: torch.device) -> float:
    """The most that was ever used: by tensors on a GPU, or by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux says it in KiB
