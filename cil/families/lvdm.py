"""What DynamiCrafter and VideoCrafter1 share: LVDM's VAE, OpenCLIP's towers, the UNet with its projector, one file.

A published file is read strictly and whole. What is trained (the UNet and the projector) is the network; the VAE and
the towers stay as they are, and are written back with it.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cil.checkpoints import FRAME_STRIDE, Mismatch, compare, load_into, read, renamed, select, write_lvdm
from cil.conditioning import ConditioningNoise
from cil.draws import Draws
from cil.families.base import Clip, Condition, Dropped
from cil.families.sd_vae import SDVAEFamily, byte_tokenizer, clip_tokenizer
from cil.nets.autoencoder import Autoencoder
from cil.nets.lvdm import TEXT_TOKENS, LVDMUNet, Resampler
from cil.nets.openclip import MEAN, STD, ImageTower, TextTower, clip_pixels, image_tokens, text_tokens
from cil.processes import VP, per_sample

FRAME_STRIDE_OF = {ours: theirs for theirs, ours in FRAME_STRIDE.items()}
UNET, PROJECTOR = "model.diffusion_model.", "image_proj_model."
VAE, TEXT, IMAGE = "first_stage_model.", "cond_stage_model.model.", "embedder.model."


@dataclass(frozen=True)
class Sizes:
    unet: Mapping[str, Any]
    projector: Mapping[str, Any]
    vae: Autoencoder
    text: TextTower
    image: ImageTower
    rescale: float  # the process's dynamic rescale
    rate: Literal["fps", "stride"] = "fps"  # what the UNet is told of the clip's speed


TINY = Sizes(
    unet={
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (2, 1),
        "num_head_channels": 8,
        "context_dim": 32,
    },
    projector={"width": 32, "depth": 1, "heads": 2, "head_width": 16, "embedding_dim": 32, "output_dim": 32},
    vae=Autoencoder(32, (1, 1, 1, 1), 1),
    text=TextTower(32, 2, 4, 32, TEXT_TOKENS, 514),
    image=ImageTower(32, 2, 4, 32, 28, 14),
    rescale=0.7,
)


def published(rescale: float, rate: Literal["fps", "stride"] = "fps") -> Sizes:
    return Sizes({}, {}, Autoencoder(), TextTower(), ImageTower(), rescale, rate)


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


@dataclass(frozen=True)
class Frozen:
    """What only encodes, and what of the checkpoint has no place in a model."""

    vae: Any
    text: Any
    image: Any
    extras: Mapping[str, Tensor]


class LVDM(SDVAEFamily):
    """Both, from one `.ckpt`."""

    process: VP
    modules = (
        *("cil.families.lvdm", "cil.families.sd_vae", "cil.recipes"),
        *("cil.nets.lvdm", "cil.nets.autoencoder", "cil.nets.openclip"),
    )
    sizes: Sizes
    concatenated: bool  # the image latent is also an input of the UNet

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        preset: str,
        weights: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(frames, height, width, preset, weights, tokenizer)
        if preset != "tiny" and frames != 16:
            raise ValueError(f"frames={frames}: published weights of {self.name} are for 16")
        assert isinstance(self.process, VP)
        self.process = replace(self.process, rescale=self.sizes.rescale)

    @property
    def levels(self) -> int:
        return len(self.sizes.unet.get("channel_mult", range(4)))

    # -- frozen --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, frames: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Latents, text tokens, the first frame as CLIP sees it (uint8), and the rate that the UNet is told."""
        return {
            "latents": self.latents(frames),
            "text": self._text([clip.caption for clip in clips]).half(),
            "image": as_clip_sees(frames[:, 0], self.sizes.image.size),
            "rate": torch.tensor([self._rate(clip) for clip in clips]),
        }

    def _text(self, captions: Sequence[str]) -> Tensor:
        return text_tokens(self.frozen.text, self.ids(captions).to(self.frozen.text.device)).cpu()

    def _rate(self, clip: Clip) -> int:
        return max(int(clip.fps), 1) if self.sizes.rate == "fps" else clip.stride

    def ids(self, captions: Sequence[str]) -> Tensor:
        """As open_clip has them: cleaned, cut to 77 with the end kept, padded with zeros."""
        ids = torch.zeros(len(captions), TEXT_TOKENS, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            clean = re.sub(r"\s+", " ", html.unescape(html.unescape(caption))).strip().lower()
            found = self.tokenizer(clean, truncation=True, max_length=TEXT_TOKENS).input_ids
            row[: len(found)] = torch.tensor(found)
        return ids

    @cached_property
    def tokenizer(self) -> Any:
        return byte_tokenizer() if self.preset == "tiny" else clip_tokenizer(self.vocabulary)

    @cached_property
    def frozen(self) -> Frozen:
        sizes = self.sizes
        if self.weights is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                models: tuple[Any, Any, Any] = sizes.vae.build(), sizes.text.build(), sizes.image.build()
            extras = {name: torch.zeros(shape) for name, shape in self._extras().items()}
        else:
            models, extras = self._empty(), {name: self.checkpoint[name] for name in self._extras()}
            for model, state in zip(models, self._split(self.checkpoint), strict=True):
                load_into(model, state)
        for model in models:
            model.requires_grad_(False).eval()
        return Frozen(*models, extras)

    def _empty(self) -> tuple[Any, Any, Any]:
        """On the meta device, but for what no file holds: the positions that transformers counts up."""
        with torch.device("meta"):
            vae, text, image = self.sizes.vae.build(), self.sizes.text.build(), self.sizes.image.build()
        for embeddings in (text.text_model.embeddings, image.vision_model.embeddings):
            embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
        return vae, text, image

    def _split(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        """VAE, text tower and image tower, by the libraries' names."""
        sizes = self.sizes
        towers = ((sizes.text, TEXT), (sizes.image, IMAGE))
        named = [tower.to_transformers(select(state, prefix))[0] for tower, prefix in towers]
        return sizes.vae.to_diffusers(select(state, VAE)), *named

    def _extras(self) -> dict[str, tuple[int, ...]]:
        """What a checkpoint keeps of the towers and the models have no place for."""
        text = self.sizes.text
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
        """The published file: whole and nothing else, or refused before any of it is used."""
        assert self.weights is not None
        state = renamed(read(self.weights), FRAME_STRIDE)
        with torch.device("meta"):
            net, extras = self._fresh(), {name: torch.empty(shape) for name, shape in self._extras().items()}
        try:
            compare(self._whole(net.state_dict(), Frozen(*self._empty(), extras)), state, self.name)
        except Mismatch as error:
            raise ValueError(f"{self.weights}: {error}") from None
        return state

    def buffers(self) -> dict[str, Tensor]:
        """The schedule, as a checkpoint holds it: float32."""
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
            "scale_arr": self.process.scale_arr,
        }
        return {name: tensor.float() for name, tensor in tensors.items()}

    # -- the denoiser --------------------------------------------------------------------------------------------------

    def _fresh(self) -> LVDMNet:
        per_frame = 16 if self.concatenated else None
        unet = LVDMUNet(8 if self.concatenated else 4, **self.sizes.unet, tokens_per_frame=per_frame)
        return LVDMNet(unet, Resampler(16 * (self.frames if self.concatenated else 1), **self.sizes.projector))

    def network(self, seed: int) -> nn.Module:
        """The published weights, or random ones that are a function of the seed."""
        if self.weights is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._fresh()
        with torch.device("meta"):
            net = self._fresh()
        own = net.state_dict().keys()
        load_into(net, {name: tensor for name, tensor in self.checkpoint.items() if name in own}, wanted=self.name)
        return net

    def condition(
        self, batch: Mapping[str, Tensor], noise: ConditioningNoise, u: Tensor, draws: Draws | None
    ) -> tuple[Condition, Tensor]:
        with torch.no_grad():
            clip = image_tokens(
                self.frozen.image.to(batch["image"].device), clip_pixels(batch["image"], self.sizes.image.size)
            )
        told = {"text": batch["text"].float(), "clip": clip, "rate": batch["rate"]}
        if self.concatenated:
            image, level = noise(batch["latents"][:, 0].float(), u, draws, frames=self.frames)
            return {**told, "image": image}, level
        # The projected tokens are the only image input, and the projector is part of the network: noise is added there.
        tokens = torch.zeros(len(u), 16, self.sizes.projector.get("output_dim", 1024), device=u.device)
        token_noise, level = noise(tokens, u, draws)
        return {**told, "token_noise": token_noise}, level

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
        tower, size = self.frozen.image, self.sizes.image.size
        grey = torch.full((1, size, size, 3), 128, dtype=torch.uint8, device=tower.device)
        with torch.no_grad():
            return {"text": self._text([""]), "clip": image_tokens(tower, clip_pixels(grey, size))}

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told = {name: value for name, value in condition.items() if name != "image"}
        x = torch.cat([x_t, condition["image"]], dim=2) if self.concatenated else x_t
        answer: Tensor = net(x, t, **told)
        return answer

    # -- weights on disk -----------------------------------------------------------------------------------------------

    def _whole(self, state: Mapping[str, Tensor], frozen: Frozen) -> dict[str, Tensor]:
        """Every name of a published file: the schedule, what is trained and what is frozen."""
        sizes = self.sizes

        def aside(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in frozen.extras.items() if name.startswith(prefix)}

        parts = {
            VAE: sizes.vae.to_ldm(frozen.vae.state_dict()),
            TEXT: sizes.text.to_open_clip(frozen.text.state_dict(), aside(TEXT)),
            IMAGE: sizes.image.to_open_clip(frozen.image.state_dict(), aside(IMAGE)),
        }
        named = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
        return {**self.buffers(), **state, **named}

    def export(self, state: Mapping[str, Tensor], folder: Path) -> list[str]:
        names = FRAME_STRIDE_OF if self.sizes.rate == "stride" else {}
        write_lvdm(folder / f"{self.name}.ckpt", renamed(self._whole(state, self.frozen), names))
        return [f"{self.name}.ckpt"]

    def restore(self, folder: Path) -> dict[str, Tensor]:
        state = renamed(read(folder / f"{self.name}.ckpt"), FRAME_STRIDE)
        return {name: tensor for name, tensor in state.items() if name.startswith((UNET, PROJECTOR))}


def as_clip_sees(frames: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3], resized as LVDM does for CLIP."""
    pixels = clip_pixels(frames, size).permute(0, 2, 3, 1)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((pixels.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
