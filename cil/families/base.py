"""What a family says of itself. Training, sampling, caching and scoring are written once, against this."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cil.conditioning import ConditioningNoise
from cil.draws import Draws
from cil.processes import Prediction, Process, per_sample

Condition = dict[str, Tensor]


class Clip(NamedTuple):
    """What is known of a clip beside its frames."""

    caption: str = ""
    fps: float = 24.0  # of the frames taken
    stride: int = 1  # source frames from one to the next


class Dropped(NamedTuple):
    """Which samples [B] go without their text, and which without their image."""

    text: Tensor
    image: Tensor

    @classmethod
    def all(cls, batch: int, device: torch.device | str = "cpu") -> "Dropped":
        """What guidance calls unconditional."""
        every = torch.ones(batch, dtype=torch.bool, device=device)
        return cls(every, every)


class Family(ABC):
    name: str
    modules: tuple[str, ...]  # beside its own, what its functions stand in
    process: Process
    prediction: Prediction
    scaling_factor: float  # of the latents: what the VAE's output is multiplied with
    frames: int
    height: int  # of the pixels
    width: int

    # -- what is frozen, and therefore cached ------------------------------------------------------------------------

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """T, C, H, W of one clip."""

    @property
    @abstractmethod
    def encoder_identity(self) -> str:
        """Changes whenever `encode` would give other latents for the same frames."""

    @abstractmethod
    def encode(self, frames: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """uint8 frames [B, T, H, W, 3] -> the cached tensors, among them `latents` [B, T, C, H, W]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, T, C, H, W] -> uint8 frames [B, T, H, W, 3]."""

    # -- the denoiser ------------------------------------------------------------------------------------------------

    @abstractmethod
    def network(self, seed: int) -> nn.Module:
        """The denoiser with fresh weights, a function of the seed."""

    @abstractmethod
    def condition(
        self, batch: Mapping[str, Tensor], noise: ConditioningNoise, u: Tensor, draws: Draws | None
    ) -> tuple[Condition, Tensor]:
        """The denoiser's condition, its image noised once (before any repeat over frames), and the noise level [B]."""

    @abstractmethod
    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's answer, in the family's kind of prediction."""

    def drop(self, condition: Condition, dropped: Dropped) -> Condition:
        """The condition without what is dropped: zeros, of a condition that is all image."""
        return {name: value * per_sample(~dropped.image, value) for name, value in condition.items()}

    def loss_weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float32)

    # -- weights on disk ---------------------------------------------------------------------------------------------

    @abstractmethod
    def export(self, state: Mapping[str, Tensor], folder: Path) -> list[str]:
        """A state dict into files of the family's published layout; answers their names."""

    @abstractmethod
    def restore(self, folder: Path) -> dict[str, Tensor]:
        """The inverse of `export`."""
