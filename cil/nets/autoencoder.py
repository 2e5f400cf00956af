"""The VAE of LVDM checkpoints, the one of Stable Diffusion, as diffusers' AutoencoderKL.

A checkpoint has it in ldm's names, behind the prefix `first_stage_model.`, which is to be cut off first.

    sizes = Autoencoder()                                     # the published ones
    vae = sizes.build()
    vae.load_state_dict(sizes.to_diffusers(state))            # and back: sizes.to_ldm(vae.state_dict())
    latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor     # images in [-1, 1]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cil.checkpoints import check_names

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

GROUPS = 32  # of every normalisation

# In ldm a convolution of size 1 x 1, in diffusers a linear layer.
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Autoencoder:
    """Sizes. Each level has `channels` times its multiple, and half the height and width of the one before."""

    channels: int = 128
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks of a level; one more when decoding
    latent_channels: int = 4

    def __post_init__(self) -> None:
        if self.channels < 1 or self.channels % GROUPS:
            raise ValueError(f"channels={self.channels}: a multiple of {GROUPS}, the groups of its normalisations")
        if not self.multiples or self.multiples[0] != 1:
            raise ValueError(f"multiples={self.multiples}: the first is 1, because diffusers knows no other")

    def build(self) -> "AutoencoderKL":
        """With random weights."""
        from diffusers import AutoencoderKL

        levels = len(self.multiples)
        untyped: Any = AutoencoderKL
        model: AutoencoderKL = untyped(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(multiple * self.channels for multiple in self.multiples),
            layers_per_block=self.blocks,
            latent_channels=self.latent_channels,
            norm_num_groups=GROUPS,
        )
        return model

    def to_diffusers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ldm's names. The tensors are views of those given."""
        names = self.names()
        check_names(state, names, f"ldm's state of {self}")
        return {
            ours: state[theirs].flatten(1) if _is_projection(theirs) else state[theirs]
            for theirs, ours in names.items()
        }

    def to_ldm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = self.names()
        check_names(state, names.values(), f"diffusers' state of {self}")
        return {
            theirs: state[ours][:, :, None, None] if _is_projection(theirs) else state[ours]
            for theirs, ours in names.items()
        }

    def names(self) -> dict[str, str]:
        """{ldm's name: diffusers' name} of every tensor."""
        return {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in self._modules() for part in ("weight", "bias")}

    def _modules(self) -> Iterator[tuple[str, str]]:
        for half in ("encoder", "decoder"):
            yield from _ends(half)
            yield from _middle(half)
        yield from self._down()
        yield from self._up()
        yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))

    def _down(self) -> Iterator[tuple[str, str]]:
        last = len(self.multiples) - 1
        for level, (before, multiple) in enumerate(pairwise((1, *self.multiples))):
            theirs, ours = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
            for i in range(self.blocks):
                wider = i == 0 and before != multiple
                yield from _residual(f"{theirs}.block.{i}", f"{ours}.resnets.{i}", wider)
            if level < last:
                yield f"{theirs}.downsample.conv", f"{ours}.downsamplers.0.conv"

    def _up(self) -> Iterator[tuple[str, str]]:
        """ldm counts levels by resolution, as when encoding; diffusers in the order in which they are run."""
        last = len(self.multiples) - 1
        for level, (multiple, before) in enumerate(pairwise((*self.multiples, self.multiples[-1]))):
            theirs, ours = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
            for i in range(self.blocks + 1):
                narrower = i == 0 and before != multiple
                yield from _residual(f"{theirs}.block.{i}", f"{ours}.resnets.{i}", narrower)
            if level > 0:
                yield f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv"


def _ends(half: str) -> Iterator[tuple[str, str]]:
    for theirs, ours in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
        yield f"{half}.{theirs}", f"{half}.{ours}"


def _middle(half: str) -> Iterator[tuple[str, str]]:
    for i in range(2):
        yield from _residual(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}", shortcut=False)
    for theirs, ours in ({"norm": "group_norm"} | PROJECTIONS).items():
        yield f"{half}.mid.attn_1.{theirs}", f"{half}.mid_block.attentions.0.{ours}"


def _residual(theirs: str, ours: str, shortcut: bool) -> Iterator[tuple[str, str]]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{theirs}.{name}", f"{ours}.{name}"
    if shortcut:  # where the number of channels changes
        yield f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut"


def _is_projection(theirs: str) -> bool:
    return theirs.endswith(tuple(f".attn_1.{name}.weight" for name in PROJECTIONS))
