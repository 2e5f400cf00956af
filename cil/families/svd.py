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
from cil.families.base import Clip, Condition, Dropped, Family
from cil.families.lvdm import as_clip_sees
from cil.nets.openclip import ImageTower, clip_pixels
from cil.processes import per_sample
from cil.recipes import recipe

FRAMES_A_CALL = 4  # of the VAE's encoder, which sees each frame for itself
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


class SVD(Family):
    name = "svd"
    modules = ("cil.families.lvdm", "cil.nets.openclip")
    scaling_factor = 0.18215
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
        if preset not in self.presets:
            raise ValueError(f"preset={preset!r}: the family svd has {', '.join(self.presets)}")
        self.sizes = self.presets[preset]
        multiple = 8 * 2 ** (len(self.sizes.unet.get("block_out_channels", range(4))) - 1)
        if frames < 1 or min(height, width) < multiple or height % multiple or width % multiple:
            raise ValueError(f"{frames} x {height} x {width}: the family svd takes multiples of {multiple}")
        self.frames, self.height, self.width, self.preset, self.weights = frames, height, width, preset, weights
        told = recipe(self.name)
        self.process, self.prediction = told.process, told.prediction

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.frames, 4, self.height // 8, self.width // 8

    @property
    def encoder_identity(self) -> str:
        return f"svd-{self.preset}-{self.weights or 'random'}"

    # -- frozen ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, frames: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Latents, the first frame as CLIP sees it (uint8), and frames per second."""
        return {
            "latents": torch.stack([self._latents(each) for each in frames]).half(),
            "image": as_clip_sees(frames[:, 0], self.sizes.image.size),
            "rate": torch.tensor([float(clip.fps) for clip in clips]),
        }

    def _latents(self, frames: Tensor) -> Tensor:
        vae = self.frozen.vae
        x = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        modes = [vae.encode(chunk.to(vae.device)).latent_dist.mode() for chunk in torch.split(x, FRAMES_A_CALL)]
        return self.scaling_factor * torch.cat(modes).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Whole clips: the decoder mixes frames."""
        vae, videos = self.frozen.vae, []
        for each in latents.float() / self.scaling_factor:
            x = vae.decode(each.to(vae.device), num_frames=len(each)).sample.cpu()
            videos.append(((x.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        return torch.stack(videos)

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
