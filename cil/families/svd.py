"""SVD: the image enters as an unscaled latent concatenated to every frame, and as one token of CLIP.

Conditioning noise is put on that latent, and its level is told to the network where SVD is told how far its image was
augmented. diffusers has the networks; `weights` is a folder as diffusers keeps the pipeline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cil.checkpoints import load_into, naming, read, read_ema, write_diffusers, write_svd_cil
from cil.conditioning import ConditioningNoise
from cil.draws import Draws
from cil.families.base import Clip, Condition, Dropped, Preset, image_latent, precision_of
from cil.families.sd_vae import SDVAEFamily, seeded
from cil.nets.openclip import ImageTower, with_positions
from cil.objectives import edm_weight
from cil.processes import per_sample

MOTION_BUCKET = 20  # what the paper's recipe trains and samples with, where a batch has no `motion`


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


class SVD(SDVAEFamily):
    name = "svd"
    encoding = ("cil.families.sd_vae", "cil.nets.openclip")
    modules = (*encoding, "cil.recipes")
    networks: Sizes
    lacks = ("tokenizer", "token_noise")
    presets: Mapping[str, Preset] = {
        "tiny": Preset(TINY, 8, 32, 32),
        "512": Preset(PUBLISHED, 16, 320, 512),
        "1024": Preset(PUBLISHED, 14, 576, 1024),
    }

    temporal = r"temporal_|time_mixer|time_pos_embed"
    told_motion = True

    @property
    def levels(self) -> int:
        return len(self.networks.unet.get("block_out_channels", range(4)))

    # -- frozen ------------------------------------------------------------------------------------------------------

    @property
    def image_size(self) -> int:
        return self.networks.image.size

    def _rate(self, clip: Clip) -> float:
        return float(clip.fps)

    def _precision(self, model: str) -> torch.dtype:
        """Its decoder leaves the range of float16."""
        kind = super()._precision(model)
        return torch.float32 if model == "vae" and kind == torch.float16 else kind

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """A whole clip at once: the decoder mixes frames."""
        video: Tensor = vae.decode(latents.to(vae.device, vae.dtype), num_frames=len(latents)).sample
        return video.float().cpu()

    def _frozen(self) -> dict[str, Any]:
        if self.options.weights is None:
            return seeded(0, self._models)
        with torch.device("meta"):
            models = self._models()
        for part, model in zip(("vae", "image_encoder"), models.values(), strict=True):
            folder = _part(Path(self.options.weights), part)
            state = read(folder)
            with naming(folder):
                load_into(with_positions(model), state, dtype=torch.float32, wanted=f"svd's {part}")
        return models

    def _models(self) -> dict[str, Any]:
        from diffusers import AutoencoderKLTemporalDecoder

        channels = self.networks.vae_channels
        untyped: Any = AutoencoderKLTemporalDecoder
        vae = untyped(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=self.networks.vae_blocks,
        )
        return {"vae": vae, "image": self.networks.image.build()}

    # -- the denoiser ------------------------------------------------------------------------------------------------

    def _fresh(self) -> Any:
        from diffusers import UNetSpatioTemporalConditionModel

        untyped: Any = UNetSpatioTemporalConditionModel
        return untyped(**self.networks.unet, num_frames=self.frames)

    def condition(
        self, batch: Mapping[str, Tensor], noise: ConditioningNoise, u: Tensor, draws: Draws | None
    ) -> tuple[Condition, Tensor]:
        image, level = noise(image_latent(batch) / self.scaling_factor, u, draws, frames=self.frames)
        motion = batch["motion"].to(level) if "motion" in batch else torch.full_like(level, MOTION_BUCKET)
        ids = torch.stack([batch["rate"] - 1, motion, level], dim=1)  # SVD counts frames per second from 0
        return {"image": image, "clip": self.clip(batch)[:, None], "ids": ids}, level

    def drop(self, condition: Condition, dropped: Dropped) -> Condition:
        """The image latent and CLIP's token together."""
        kept = {name: condition[name] * per_sample(~dropped.image, condition[name]) for name in ("image", "clip")}
        return {**condition, **kept}

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        kind = precision_of(net)
        x, time = self.process.network_input(x_t, t)
        x = torch.cat([x, condition["image"]], dim=2).to(kind)
        answer: Tensor = net(x, time, condition["clip"].to(kind), condition["ids"], return_dict=False)[0]
        return answer.float()

    def recompute(self, net: nn.Module) -> None:
        untyped: Any = net
        untyped.enable_gradient_checkpointing()

    def loss_weight(self, t: Tensor) -> Tensor:
        return edm_weight(t)

    # -- weights on disk ---------------------------------------------------------------------------------------------

    def export(self, state: Mapping[str, Tensor], folder: Path) -> list[str]:
        """diffusers' folder of the UNet."""
        with torch.device("meta"):
            config = {name: value for name, value in self._fresh().config.items() if not name.startswith("_use_")}
        write_diffusers(folder / "unet", state, {"_class_name": "UNetSpatioTemporalConditionModel", **config})
        return sorted(f"unet/{file.name}" for file in (folder / "unet").iterdir())

    def write_ckpt(self, file: Path, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None = None) -> None:
        """As the authors' scripts load weights. They find averages by the order of the network's parameters."""
        with torch.device("meta"):
            order = [name for name, _ in self._fresh().named_parameters()]
        write_svd_cil(file, {name: raw[name] for name in order}, ema)

    def restore(self, path: Path, averaged: bool = True) -> dict[str, Tensor]:
        """Of a pipeline's folder, of its UNet's, or of a `.ckpt` of the authors' fine-tuning."""
        if path.is_dir() and not (path / "config.json").is_file() and not list(path.glob("*.safetensors")):
            path = _part(path, "unet")
        return self._checked(path, read_ema(path, or_raw=True) if averaged else read(path))


def _part(pipeline: Path, name: str) -> Path:
    folder = pipeline / name
    if not folder.is_dir():
        found = f"no folder {name} in it" if pipeline.is_dir() else "not a folder"
        raise ValueError(f"{pipeline}: {found}; expected a diffusers pipeline of SVD, with unet, vae and image_encoder")
    return folder


build = SVD
