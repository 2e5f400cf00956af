"""Random numbers of which each sample of a batch has its own stream.

A sample's draws are a function of its own key, e.g. (seed, position in the stream) or (seed, clip_id), so they are the
same whatever batch, rank or worker the sample lands in.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def stream_seed(*key: int | str) -> int:
    """A well-mixed 64-bit seed for the stream named by `key`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


class Draws:
    """One generator per sample; every draw has the batch as its first dimension."""

    def __init__(self, keys: Sequence[tuple[int | str, ...]], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._generators = [torch.Generator(self.device).manual_seed(stream_seed(*key)) for key in keys]

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape]; what each stream gives next."""
        return self._stack(lambda g: torch.randn(shape, generator=g, device=self.device))

    def uniform(self, *shape: int) -> Tensor:
        return self._stack(lambda g: torch.rand(shape, generator=g, device=self.device))

    def integers(self, high: int) -> Tensor:
        """One integer in 0..high-1 for each sample."""
        return self._stack(lambda g: torch.randint(high, (), generator=g, device=self.device))

    def _stack(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(g) for g in self._generators])


Random = torch.Generator | Draws | None


def normal_like(x: Tensor, random: Random) -> Tensor:
    """Standard normal of x's shape [B, ...], on its device, from a generator or from per-sample draws."""
    if isinstance(random, Draws):
        return _matching(random, x).normal(*x.shape[1:]).to(x)
    return torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)


def uniform_like(x: Tensor, random: Random) -> Tensor:
    """The same, uniform in [0, 1)."""
    if isinstance(random, Draws):
        return _matching(random, x).uniform(*x.shape[1:]).to(x)
    return torch.rand(x.shape, generator=random, device=x.device, dtype=x.dtype)


def _matching(draws: Draws, x: Tensor) -> Draws:
    if len(draws) != len(x):
        raise ValueError(f"{len(draws)} streams of draws for a batch of {len(x)}")
    return draws
