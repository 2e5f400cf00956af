"""What a family says of itself. Training, sampling, caching and scoring are written once, against this."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from cil.conditioning import ConditioningNoise, TimeNoise
from cil.draws import Draws
from cil.processes import Prediction, Process, per_sample

Condition = dict[str, Tensor]


class Clip(NamedTuple):
    """What is known of a clip beside its frames."""

    caption: str = ""
    fps: float = 24.0  # of the frames taken
    stride: int = 1  # source frames from one to the next
    seed: int = 0  # of what its encoding draws
    frame: int = 0  # the conditional image


class Preset(NamedTuple):
    """What the networks are made of, and the size of clips where nobody names another."""

    networks: Any
    frames: int
    height: int
    width: int


Latents = Literal["mode", "sample", "mean_std"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Options:
    """What a user may choose of a family beside its size. A family refuses what it does not have."""

    weights: str | None = None  # what is published, a file or a folder; without it all is random, to try
    tokenizer: str | None = None  # a folder with CLIP's vocab.json and merges.txt
    latents: Latents = "mode"  # of the VAE's posterior: its mode, a sample, or mean and deviation to sample in training
    clip_features: bool = False  # cached, and not the image that they are made of in each training step
    token_noise: bool = False  # conditioning noise on the projected CLIP tokens too, where it is not on them anyway
    precision: Precision = "float32"  # of the frozen networks
    shift: float = 1.0  # of the noise schedule: sigma / alpha times this, in training and sampling

    def __post_init__(self) -> None:
        for name, allowed in (("latents", get_args(Latents)), ("precision", get_args(Precision))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(allowed)}")
        if not 0 < self.shift < inf:
            raise ValueError(f"shift={self.shift}: above 0")


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
    encoding: tuple[str, ...] = ()  # the modules, beside its own, in which stands what makes cached tensors
    modules: tuple[str, ...]  # and all in which its functions stand
    presets: Mapping[str, Preset]
    lacks: tuple[str, ...] = ()  # of the options
    process: Process
    prediction: Prediction
    timenoise: TimeNoise  # in the dose that is advised
    scaling_factor: float  # of the latents: what the VAE's output is multiplied with
    multiple: int  # height and width are multiples of it, in pixels
    temporal: str  # a pattern that the names of those weights have in them which look over time
    told_motion = False  # the network is told how much shall move: `motion` [B] of a batch
    projector: str = ""  # what the names of weights begin with that only make tokens of the image

    def __init__(
        self, preset: str, frames: int | None, height: int | None, width: int | None, options: Options
    ) -> None:
        if preset not in self.presets:
            raise ValueError(f"preset={preset!r}: the family {self.name} has {', '.join(self.presets)}")
        for option in fields(Options):
            if option.name in self.lacks and (value := getattr(options, option.name)) != option.default:
                raise ValueError(f"{option.name}={value}: the family {self.name} has no such option")
        sizes = self.presets[preset]
        self.preset, self.networks, self.options = preset, sizes.networks, options
        given = (frames, height, width)
        self.frames, self.height, self.width = (
            own if wanted is None else wanted for wanted, own in zip(given, sizes[1:], strict=True)
        )

    def _check_size(self) -> None:
        size = (self.height, self.width)
        if self.frames < 1 or min(size) < 1 or any(side % self.multiple for side in size):
            told = f"{self.frames} x {self.height} x {self.width}"
            raise ValueError(f"{told}: the family {self.name} takes multiples of {self.multiple} pixels")

    # -- what is frozen, and therefore cached ------------------------------------------------------------------------

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """T, C, H, W of one clip."""

    @property
    @abstractmethod
    def encoder_identity(self) -> str:
        """Changes whenever what is frozen would give other tensors for the same frames and captions."""

    def to(self, device: torch.device | str) -> Self:
        """What is frozen, to where it encodes: frames go there by themselves, what is cached comes back to the CPU."""
        return self

    @abstractmethod
    def encode_frames(self, frames: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """uint8 frames [B, T, H, W, 3] -> the cached tensors, among them `latents` [B, T, C, H, W]."""

    def rates(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """What is cached of the speed of clips, [B]."""
        return {}

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What is cached of captions, [B, ...]: once for all clips that have the same."""
        return {}

    def encode(self, frames: Tensor, clips: Sequence[Clip] = ()) -> dict[str, Tensor]:
        """All that is cached of clips."""
        clips = clips or [Clip()] * len(frames)
        return self.encode_frames(frames, clips) | self.encode_captions([clip.caption for clip in clips])

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, T, C, H, W] -> uint8 frames [B, T, H, W, 3]."""

    # -- the denoiser ------------------------------------------------------------------------------------------------

    @abstractmethod
    def network(self, seed: int, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The denoiser with these weights; else the published ones, or random ones that are a function of the seed."""

    @abstractmethod
    def condition(
        self, batch: Mapping[str, Tensor], noise: ConditioningNoise, u: Tensor, draws: Draws | None
    ) -> tuple[Condition, Tensor]:
        """The denoiser's condition, its image noised once (before any repeat over frames), and the noise level [B]."""

    @abstractmethod
    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's answer, in the family's kind of prediction: float32, whatever the network's precision."""

    def drop(self, condition: Condition, dropped: Dropped) -> Condition:
        """The condition without what is dropped: zeros, of a condition that is all image."""
        return {name: value * per_sample(~dropped.image, value) for name, value in condition.items()}

    def recompute(self, net: nn.Module) -> None:
        """From now on the backward pass computes activations anew: less memory, more time."""
        raise ValueError(f"the networks of the family {self.name} cannot recompute activations")

    def loss_weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float32)

    # -- weights on disk ---------------------------------------------------------------------------------------------

    @abstractmethod
    def export(self, state: Mapping[str, Tensor], folder: Path) -> list[str]:
        """A state dict into files of the family's published layout; answers their names."""

    @abstractmethod
    def restore(self, path: Path, averaged: bool = True) -> dict[str, Tensor]:
        """The network's weights from what `export` wrote or what is published, a file or a folder.

        `averaged`: rather than the raw ones, where a file holds both.
        """


def image_latent(batch: Mapping[str, Tensor]) -> Tensor:
    """[B, C, H, W] of the conditional image, which is one of the clip's frames: the first, unless `frame` [B] says."""
    latents = batch["latents"].float()
    if "frame" not in batch:
        return latents[:, 0]
    return latents[torch.arange(len(latents), device=latents.device), batch["frame"].long()]


def precision_of(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
