"""SVD: the image enters as an unscaled latent concatenated to every frame, and as one token of CLIP.

Conditioning noise is put on that latent, and its level is told to the network where SVD is told how far its image was
augmented. diffusers has the networks; `weights` is a folder as diffusers keeps the pipeline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cil.checkpoints import load_into, read, write_diffusers
from cil.conditioning import ConditioningNoise
from cil.draws import Draws
from cil.families.base import Clip, Condition, Dropped
from cil.families.lvdm import as_clip_sees
from cil.families.sd_vae import SDVAEFamily
from cil.nets.openclip import ImageTower, clip_pixels
from cil.objectives import edm_weight
from cil.processes import per_sample

MOTION_BUCKET = 20  # what the paper's recipe trains and samples with


@dataclass(frozen=True)
class Sizes:
    unet: Mapping[str, Any]
    vae_channels: tuple[int, ...]
    vae_blocks: int
    image: ImageTower


TINY = Sizes(
    unet={
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "num_attention_heads": (2, 4),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 48,
    },
    vae_channels=(32, 32, 32, 32),
    vae_blocks=1,
    image=ImageTower(32, 2, 4, 32, 28, 14),
)
PUBLISHED = Sizes({}, (128, 256, 512, 512), 2, ImageTower())


@dataclass(frozen=True)
class Frozen:
    vae: Any
    image: Any


class SVD(SDVAEFamily):
    name = "svd"
    modules = ("cil.families.lvdm", "cil.families.sd_vae", "cil.recipes", "cil.nets.openclip")
    sizes: Sizes
    presets: Mapping[str, Sizes] = {"tiny": TINY, "512": PUBLISHED, "1024": PUBLISHED}

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        preset: str,
        weights: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        if tokenizer:
            raise ValueError("tokenizer: the family svd takes no text")
        super().__init__(frames, height, width, preset, weights)

    @property
    def levels(self) -> int:
        return len(self.sizes.unet.get("block_out_channels", range(4)))

    # -- frozen ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, frames: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Latents, the first frame as CLIP sees it (uint8), and frames per second."""
        return {
            "latents": self.latents(frames),
            "image": as_clip_sees(frames[:, 0], self.sizes.image.size),
            "rate": torch.tensor([float(clip.fps) for clip in clips]),
        }

    def pixels(self, latents: Tensor) -> Tensor:
        """A whole clip at once: the decoder mixes frames."""
        vae = self.frozen.vae
        video: Tensor = vae.decode(latents.to(vae.device), num_frames=len(latents)).sample.cpu()
        return video

    @cached_property
    def frozen(self) -> Frozen:
        if self.weights is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                vae, image = self._vae(), self.sizes.image.build()
        else:
            with torch.device("meta"):
                vae, image = self._vae(), self.sizes.image.build()
            embeddings: Any = image.vision_model.embeddings
            embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]  # in no file
            self._fill(vae, "vae")
            self._fill(image, "image_encoder")
        for model in (vae, image):
            model.requires_grad_(False).eval()
        return Frozen(vae, image)

    def _vae(self) -> Any:
        from diffusers import AutoencoderKLTemporalDecoder

        channels = self.sizes.vae_channels
        untyped: Any = AutoencoderKLTemporalDecoder
        return untyped(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=self.sizes.vae_blocks,
        )

    def _fill(self, model: Any, part: str) -> None:
        assert self.weights is not None
        folder = Path(self.weights, part)
        try:
            load_into(model, read(folder), wanted=f"svd's {part}")
        except FileNotFoundError:
            raise ValueError(f"{folder}: there is no such folder; weights is a diffusers pipeline of SVD") from None
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    # -- the denoiser ------------------------------------------------------------------------------------------------

    def _unet(self) -> Any:
        from diffusers import UNetSpatioTemporalConditionModel

        untyped: Any = UNetSpatioTemporalConditionModel
        return untyped(**self.sizes.unet, num_frames=self.frames)

    def network(self, seed: int) -> nn.Module:
        """The published weights, or random ones that are a function of the seed."""
        if self.weights is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                fresh: nn.Module = self._unet()
                return fresh
        with torch.device("meta"):
            net: nn.Module = self._unet()
        self._fill(net, "unet")
        return net

    def condition(
        self, batch: Mapping[str, Tensor], noise: ConditioningNoise, u: Tensor, draws: Draws | None
    ) -> tuple[Condition, Tensor]:
        first = batch["latents"][:, 0].float() / self.scaling_factor
        image, level = noise(first, u, draws, frames=self.frames)
        pixels = clip_pixels(batch["image"], self.sizes.image.size)
        with torch.no_grad():
            clip = self.frozen.image.to(pixels.device)(pixel_values=pixels).image_embeds[:, None]
        # SVD counts frames per second from 0.
        ids = torch.stack([batch["rate"] - 1, torch.full_like(level, MOTION_BUCKET), level], dim=1)
        return {"image": image, "clip": clip, "ids": ids}, level

    def drop(self, condition: Condition, dropped: Dropped) -> Condition:
        """The image latent and CLIP's token together."""
        kept = {name: condition[name] * per_sample(~dropped.image, condition[name]) for name in ("image", "clip")}
        return {**condition, **kept}

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x, time = self.process.network_input(x_t, t)
        answer: Tensor = net(
            torch.cat([x, condition["image"]], dim=2), time, condition["clip"], condition["ids"]
        ).sample
        return answer

    def loss_weight(self, t: Tensor) -> Tensor:
        return edm_weight(t)

    # -- weights on disk ---------------------------------------------------------------------------------------------

    def export(self, state: Mapping[str, Tensor], folder: Path) -> list[str]:
        """diffusers' folder of the UNet; `cil.checkpoints.write_svd_cil` writes the authors' form."""
        with torch.device("meta"):
            config = {name: value for name, value in self._unet().config.items() if not name.startswith("_use_")}
        write_diffusers(folder / "unet", state, {"_class_name": "UNetSpatioTemporalConditionModel", **config})
        return sorted(f"unet/{file.name}" for file in (folder / "unet").iterdir())

    def restore(self, folder: Path) -> dict[str, Tensor]:
        return read(folder / "unet")


build = SVD
