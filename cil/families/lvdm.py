"""What DynamiCrafter and VideoCrafter1 share: LVDM's VAE, OpenCLIP's towers, the UNet with its projector, one file.

A published file is read strictly and whole. What is trained (the UNet and the projector) is the network; the VAE and
the towers stay as they are, and are written back with it.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cil.checkpoints import FRAME_STRIDE, compare, load_into, naming, read, renamed, select, write_lvdm
from cil.conditioning import ConditioningNoise
from cil.draws import Draws
from cil.families.base import Clip, Condition, Dropped, Options, Preset, image_latent, precision_of
from cil.families.captions import CaptionedFamily
from cil.families.sd_vae import seeded
from cil.nets.autoencoder import Autoencoder
from cil.nets.lvdm import TEXT_TOKENS, LVDMUNet, Resampler
from cil.nets.openclip import ImageTower, TextTower, image_tokens, text_tokens, with_positions
from cil.processes import VP, Prediction, per_sample

TOKENS_OF_AN_IMAGE = 16  # that the projector makes
UNET, PROJECTOR = "model.diffusion_model.", "image_proj_model."
VAE, TEXT, IMAGE = "first_stage_model.", "cond_stage_model.model.", "embedder.model."

Rate = Literal["fps", "stride"]


@dataclass(frozen=True)
class Sizes:
    unet: Mapping[str, Any]
    projector: Mapping[str, Any]
    vae: Autoencoder
    text: TextTower
    image: ImageTower
    process: VP
    prediction: Prediction
    rate: Rate = "fps"  # what the UNet is told of the clip's speed


def tiny(process: VP, prediction: Prediction) -> Preset:
    unet = {
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (2, 1),
        "num_head_channels": 8,
        "context_dim": 32,
    }
    projector = {"width": 32, "depth": 1, "heads": 2, "head_width": 16, "embedding_dim": 32, "output_dim": 32}
    vae, text = Autoencoder(32, (1, 1, 1, 1), 1), TextTower(32, 2, 4, 32, TEXT_TOKENS, 514)
    image = ImageTower(32, 2, 4, 32, 28, 14)
    return Preset(Sizes(unet, projector, vae, text, image, process, prediction), 8, 32, 32)


def published(height: int, width: int, process: VP, prediction: Prediction, rate: Rate = "fps", **unet: Any) -> Preset:
    sizes = Sizes(unet, {}, Autoencoder(), TextTower(), ImageTower(), process, prediction, rate)
    return Preset(sizes, 16, height, width)


class LVDMNet(nn.Module):
    """The UNet and the projector, by the checkpoint's names."""

    def __init__(self, unet: LVDMUNet, projector: Resampler) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": unet})
        self.image_proj_model = projector

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, clip: Tensor, rate: Tensor, token_noise: Tensor | None = None
    ) -> Tensor:
        image = self.image_proj_model(clip)
        if token_noise is not None:
            image = image + token_noise
        answer: Tensor = self.model["diffusion_model"](x, t, torch.cat([text, image], dim=1), rate)
        return answer


class LVDM(CaptionedFamily):
    """Both, from one `.ckpt`."""

    process: VP
    encoding = (
        *("cil.families.lvdm", "cil.families.captions", "cil.families.sd_vae"),
        *("cil.nets.autoencoder", "cil.nets.openclip"),
    )
    modules = (*encoding, "cil.nets.lvdm", "cil.recipes")
    networks: Sizes
    temporal = r"temopral_conv|init_attn|put_blocks\.\d+\.2\.|middle_block\.2\."
    projector = PROJECTOR
    concatenated: bool  # the image latent is also an input of the UNet

    def __init__(
        self, preset: str, frames: int | None, height: int | None, width: int | None, options: Options
    ) -> None:
        super().__init__(preset, frames, height, width, options)
        if preset != "tiny" and self.frames != 16:
            raise ValueError(f"frames={self.frames}: published weights of {self.name} are for 16")
        self.process, self.prediction = self.networks.process.shifted(options.shift), self.networks.prediction

    @property
    def levels(self) -> int:
        return len(self.networks.unet.get("channel_mult", range(4)))

    # -- frozen --------------------------------------------------------------------------------------------------------

    @property
    def words(self) -> int:
        return self.networks.text.vocabulary

    @property
    def image_size(self) -> int:
        return self.networks.image.size

    def _look(self, tower: Any, pixels: Tensor) -> Tensor:
        return image_tokens(tower, pixels)

    def _rate(self, clip: Clip) -> int:
        return max(int(clip.fps), 1) if self.networks.rate == "fps" else clip.stride

    def _text(self, captions: Sequence[str]) -> Tensor:
        tower = self.frozen["text"]
        return text_tokens(tower, self.ids(captions).to(tower.device))

    def ids(self, captions: Sequence[str]) -> Tensor:
        """As open_clip has them: cleaned, cut to 77 with the end kept, padded with zeros."""
        ids = torch.zeros(len(captions), TEXT_TOKENS, dtype=torch.long)
        clean = [re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower() for text in captions]
        for row, found in zip(ids, self._tokens(clean, TEXT_TOKENS), strict=True):
            row[: len(found)] = torch.tensor(found)
        return ids

    def _frozen(self) -> dict[str, Any]:
        if self.options.weights is None:
            return seeded(0, self._models)
        models = self._empty()
        for model, state in zip(models.values(), self._split(self.checkpoint), strict=True):
            load_into(model, state)
        return models

    def _models(self) -> dict[str, Any]:
        sizes = self.networks
        return {"vae": sizes.vae.build(), "text": sizes.text.build(), "image": sizes.image.build()}

    def _empty(self) -> dict[str, Any]:
        with torch.device("meta"):
            return {name: with_positions(model) for name, model in self._models().items()}

    def _split(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        """VAE, text tower and image tower, by the libraries' names."""
        sizes = self.networks
        towers = ((sizes.text, TEXT), (sizes.image, IMAGE))
        named = [tower.to_transformers(select(state, prefix))[0] for tower, prefix in towers]
        return sizes.vae.to_diffusers(select(state, VAE)), *named

    def _extras(self) -> dict[str, tuple[int, ...]]:
        """What a checkpoint keeps of the towers and the models have no place for."""
        text = self.networks.text
        shapes: dict[str, tuple[int, ...]] = {
            "positional_embedding": (text.tokens, text.width),
            "text_projection": (text.width, text.projection),
            "logit_scale": (),
            "token_embedding.weight": (text.vocabulary, text.width),
            "ln_final.weight": (text.width,),
            "ln_final.bias": (text.width,),
        }
        return {TEXT + "logit_scale": ()} | {IMAGE + name: shape for name, shape in shapes.items()}

    @cached_property
    def checkpoint(self) -> dict[str, Tensor]:
        """The published file."""
        assert self.options.weights is not None
        return self._read(Path(self.options.weights))

    def _read(self, file: Path) -> dict[str, Tensor]:
        """Whole and nothing else, or refused before any of it is used."""
        if file.is_dir():
            file = file / f"{self.name}.ckpt"
            if not file.is_file():
                raise ValueError(f"{file.parent}: a folder; expected the .ckpt of {self.name}")
        state = renamed(read(file), FRAME_STRIDE)
        with naming(file):
            compare(self._expected, state, self.name)
            rescale = float(state["scale_arr"][-1]) if "scale_arr" in state else 1.0
            if abs(rescale - self.process.rescale) > 1e-3:
                mine = f"the preset {self.preset} by {self.process.rescale:g}"
                raise ValueError(f"trained with a dynamic rescale by {rescale:g}, and {mine}: of another preset")
        return state

    @cached_property
    def _expected(self) -> dict[str, Tensor]:
        with torch.device("meta"):
            net, extras = self._fresh(), {name: torch.empty(shape) for name, shape in self._extras().items()}
        return self._whole(net.state_dict(), self._empty(), extras)

    def _schedule(self) -> dict[str, Tensor]:
        """The published file's, to the bit, where it is the one that is trained with."""
        ours, theirs = self.buffers(), self.checkpoint
        return {
            name: theirs[name] if torch.allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-7) else ours[name]
            for name in ours
        }

    def buffers(self) -> dict[str, Tensor]:
        """The schedule, as a checkpoint holds it: float32, with the dynamic rescale if there is one."""
        abar = self.process.alphas_bar
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        betas = 1 - abar / before
        variance = betas * (1 - before) / (1 - abar)
        tensors = {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - abar).log(),
            "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
            "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - abar),
        }
        if self.process.rescale != 1:
            tensors["scale_arr"] = self.process.scale_arr
        return {name: tensor.float() for name, tensor in tensors.items()}

    # -- the denoiser --------------------------------------------------------------------------------------------------

    @property
    def _image_tokens(self) -> int:
        return TOKENS_OF_AN_IMAGE * (self.frames if self.concatenated else 1)

    def _fresh(self) -> LVDMNet:
        per_frame = TOKENS_OF_AN_IMAGE if self.concatenated else None
        unet = LVDMUNet(8 if self.concatenated else 4, **self.networks.unet, tokens_per_frame=per_frame)
        return LVDMNet(unet, Resampler(self._image_tokens, **self.networks.projector))

    def condition(
        self, batch: Mapping[str, Tensor], noise: ConditioningNoise, u: Tensor, draws: Draws | None
    ) -> tuple[Condition, Tensor]:
        condition = {"text": batch["text"].float(), "clip": self.clip(batch), "rate": batch["rate"]}
        level = None
        if self.concatenated:
            image, level = noise(image_latent(batch), u, draws, frames=self.frames)
            condition["image"] = image
        if level is None or self.options.token_noise:
            # The projector is part of the network: what the noise of its tokens is, is said here, and added there.
            width = self.networks.projector.get("output_dim", 1024)
            tokens = torch.zeros(len(u), self._image_tokens, width, device=u.device)
            condition["token_noise"], level_of_tokens = noise(tokens, u, draws)
            level = level_of_tokens if level is None else level
        return condition, level

    def drop(self, condition: Condition, dropped: Dropped) -> Condition:
        """An empty caption, and CLIP's tokens of a grey image. The concatenated image stays in both branches."""
        without = {"text": dropped.text, "clip": dropped.image}
        for name, which in without.items():
            given = condition[name]
            nothing = self._nothing[name].to(given)
            condition = {**condition, name: torch.where(per_sample(which, given) > 0, nothing, given)}
        return condition

    @cached_property
    def _nothing(self) -> dict[str, Tensor]:
        grey = torch.full((1, self.image_size, self.image_size, 3), 128, dtype=torch.uint8)
        with torch.no_grad():
            return {"text": self._empty_caption, "clip": self._clip(grey.to(self.frozen["image"].device))}

    def recompute(self, net: nn.Module) -> None:
        for module in net.modules():
            if isinstance(module, LVDMUNet):
                module.gradient_checkpointing = True

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        kind = precision_of(net)
        told = {name: value.to(kind) for name, value in condition.items() if name not in ("image", "rate")}
        x = torch.cat([x_t, condition["image"]], dim=2) if self.concatenated else x_t
        answer: Tensor = net(x.to(kind), t, rate=condition["rate"], **told)
        return answer.float()

    # -- weights on disk -----------------------------------------------------------------------------------------------

    def _whole(
        self, state: Mapping[str, Tensor], models: Mapping[str, Any], extras: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every name of a published file: the schedule, what is trained and what is frozen."""
        sizes = self.networks

        def aside(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in extras.items() if name.startswith(prefix)}

        parts = {
            VAE: sizes.vae.to_ldm(models["vae"].state_dict()),
            TEXT: sizes.text.to_open_clip(models["text"].state_dict(), aside(TEXT)),
            IMAGE: sizes.image.to_open_clip(models["image"].state_dict(), aside(IMAGE)),
        }
        named = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
        return {**self.buffers(), **state, **named}

    def export(self, state: Mapping[str, Tensor], folder: Path) -> list[str]:
        """The published file with other weights of the network; without one, the random models beside them."""
        if self.options.weights is None:
            extras = {name: torch.zeros(shape) for name, shape in self._extras().items()}
            whole = self._whole(state, self.frozen, extras)
        else:
            whole = self.checkpoint | self._schedule() | dict(state)
        names = {ours: theirs for theirs, ours in FRAME_STRIDE.items()} if self.networks.rate == "stride" else {}
        write_lvdm(folder / f"{self.name}.ckpt", renamed(whole, names))
        return [f"{self.name}.ckpt"]

    def restore(self, path: Path, averaged: bool = True) -> dict[str, Tensor]:
        """These files hold one kind of weights."""
        state = self._read(path)
        return {name: tensor for name, tensor in state.items() if name.startswith((UNET, PROJECTOR))}
