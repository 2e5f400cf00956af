"""I2VGen-XL: the image enters as the latent of frame 0, as tokens of that latent, and as CLIP's embedding.

Networks and files are those of diffusers' I2VGenXLPipeline. Conditioning noise is put on the latent of frame 0, scaled,
once: the UNet concatenates it and makes its tokens of it. The frames after it hold no image but their position in the
clip, which stays as it is, and so does CLIP's embedding.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cil.checkpoints import load_into, naming, read, write_diffusers
from cil.conditioning import ConditioningNoise
from cil.draws import Draws
from cil.families.base import Clip, Condition, Dropped, Preset, image_latent, precision_of
from cil.families.captions import CaptionedFamily
from cil.families.sd_vae import seeded
from cil.nets.openclip import with_positions
from cil.processes import per_sample

TEXT_TOKENS = 77

CLASSES = {  # by the subfolder of a published pipeline
    "unet": ("diffusers", "I2VGenXLUNet"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}

# Of each subfolder's config.json, what is needed here. A file may have other values only of FREE.
Configs = Mapping[str, Mapping[str, Any]]
FREE = {"text_encoder": ("num_hidden_layers",)}  # the pipeline takes the last layer but one, however many there are


def levels(channels: Sequence[int], down: Sequence[str], up: Sequence[str]) -> dict[str, Any]:
    return {"block_out_channels": tuple(channels), "down_block_types": tuple(down), "up_block_types": tuple(up)}


PUBLISHED: Configs = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        **levels(
            (320, 640, 1280, 1280),
            ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
            ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
        ),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "cross_attention_dim": 1024,
        "attention_head_dim": 64,
    },
    "vae": {
        **levels((128, 256, 512, 512), ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": TEXT_TOKENS,
        "hidden_act": "gelu",
    },
    "image_encoder": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "projection_dim": 1024,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}

NARROW = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY: Configs = {
    "unet": {
        **PUBLISHED["unet"],
        **levels((32, 64), ("CrossAttnDownBlock3D", "DownBlock3D"), ("UpBlock3D", "CrossAttnUpBlock3D")),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    },
    "vae": {
        **PUBLISHED["vae"],
        **levels((32,) * 4, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4),
        "layers_per_block": 1,
    },
    "text_encoder": {
        **PUBLISHED["text_encoder"],
        **NARROW,
        "vocab_size": 514,
        "bos_token_id": 512,
        "eos_token_id": 513,
    },
    "image_encoder": {**PUBLISHED["image_encoder"], **NARROW, "projection_dim": 32, "image_size": 28},
}


class I2VGenXL(CaptionedFamily):
    """From a published pipeline's folder."""

    name = "i2vgenxl"
    temporal = r"temp_convs|temp_attentions|transformer_in|image_latents_temporal"
    encoding = ("cil.families.captions", "cil.families.sd_vae", "cil.nets.openclip")
    modules = (*encoding, "cil.recipes")
    networks: Configs
    lacks = ("token_noise",)
    presets: Mapping[str, Preset] = {
        "tiny": Preset(TINY, 8, 32, 32),
        "256": Preset(PUBLISHED, 16, 256, 448),
        "704": Preset(PUBLISHED, 16, 704, 1280),
    }

    @property
    def levels(self) -> int:
        return len(self.networks["unet"]["block_out_channels"])

    # -- frozen --------------------------------------------------------------------------------------------------------

    @property
    def words(self) -> int:
        words: int = self.networks["text_encoder"]["vocab_size"]
        return words

    @property
    def image_size(self) -> int:
        size: int = self.networks["image_encoder"]["image_size"]
        return size

    def as_clip_sees(self, frames: Tensor) -> Tensor:
        return middle_square(frames, self.image_size)

    def _rate(self, clip: Clip) -> int:
        return max(int(clip.fps), 1)

    @torch.no_grad()
    def _text(self, captions: Sequence[str]) -> Tensor:
        """[B, 77, D]: what leaves the last layer but one, normalised as what leaves the last.

        So the pipeline has it (clip_skip=1), and the authors.
        """
        tower = self.frozen["text"]
        states = tower(self.ids(captions).to(tower.device), output_hidden_states=True).hidden_states
        tokens: Tensor = tower.final_layer_norm(states[-2])
        return tokens

    def ids(self, captions: Sequence[str]) -> Tensor:
        """As the pipeline has them: cut to 77 with the end kept, padded with what the tokenizer says."""
        ids: Tensor = self._tokens(captions, TEXT_TOKENS, padding="max_length", return_tensors="pt")
        return ids

    @property
    def vocabulary(self) -> str | None:
        weights = self.options.weights
        return self.options.tokenizer or (weights and str(Path(weights, "tokenizer")))

    def _frozen(self) -> dict[str, Any]:
        parts = {"vae": "vae", "text": "text_encoder", "image": "image_encoder"}
        return {name: self._model(part, seed=0) for name, part in parts.items()}

    # -- parts of a pipeline -------------------------------------------------------------------------------------------

    def _model(self, part: str, seed: int) -> Any:
        """The published weights, or random ones that are a function of the seed."""
        config = self._config(part)
        if self.options.weights is None:
            return seeded(seed, lambda: _built(part, config))
        with torch.device("meta"):
            model = with_positions(_built(part, config))
        folder = Path(self.options.weights, part)
        state = _by_library_names(part, read(folder))
        with naming(folder):  # files may be of half precision
            load_into(model, state, dtype=torch.float32, wanted=f"the {part} of {self.name}")
        return model

    def _config(self, part: str) -> dict[str, Any]:
        """The file's, which is that of the preset in all that matters here."""
        needed = dict(self.networks[part])
        if self.options.weights is None:
            return needed
        folder = Path(self.options.weights)
        lacking = [each for each in CLASSES if not (folder / each / "config.json").is_file()]
        if lacking:
            what = f"no {', '.join(f'{each}/config.json' for each in lacking)}" if folder.is_dir() else "no folder"
            raise ValueError(f"{folder}: {what}; expected a diffusers pipeline's folder with {', '.join(CLASSES)}")
        file = folder / part / "config.json"
        try:
            config = json.loads(file.read_bytes())
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise ValueError(f"{file}: damaged; expected a JSON object")
        kind = config.get("_class_name") or (config.get("architectures") or ["model without a name"])[0]
        if kind != CLASSES[part][1]:
            raise ValueError(f"{file}: of a {kind}, and {self.name} needs a {CLASSES[part][1]}")
        found = _with_defaults(part, config)
        other = [
            f"{key} {_listed(found.get(key))}, not {_listed(value)}"
            for key, value in needed.items()
            if key not in FREE.get(part, ()) and _listed(found.get(key)) != _listed(value)
        ]
        if other:
            raise ValueError(f"{file}: not of the preset {self.preset} of {self.name}: {'; '.join(other)}")
        return config

    # -- the denoiser --------------------------------------------------------------------------------------------------

    def _fresh(self) -> nn.Module:
        """Without the UNet's dropout: the draws of a training step are those of its samples, and no others."""
        unet: nn.Module = _built("unet", self._config("unet"))
        for module in unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return unet

    def condition(
        self, batch: Mapping[str, Tensor], noise: ConditioningNoise, u: Tensor, draws: Draws | None
    ) -> tuple[Condition, Tensor]:
        first, level = noise(image_latent(batch), u, draws)
        told = {"text": batch["text"].float(), "clip": self.clip(batch), "fps": batch["rate"]}
        return {**told, "image": self._with_positions(first)}, level

    def _with_positions(self, first: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, C, H, W]: after the image, frame i of T is filled with i / (T - 1)."""
        later = torch.arange(1, self.frames, device=first.device, dtype=torch.float64) / max(self.frames - 1, 1)
        positions = later.to(first)[None, :, None, None, None]
        return torch.cat([first[:, None], positions.expand(len(first), -1, *first.shape[1:])], dim=1)

    def drop(self, condition: Condition, dropped: Dropped) -> Condition:
        """An empty caption, and zeros for CLIP's embedding. The latent of frame 0 stays in both branches."""
        text, clip = condition["text"], condition["clip"]
        without_text = per_sample(dropped.text, text) > 0
        return {
            **condition,
            "text": torch.where(without_text, self._empty_caption.to(text), text),
            "clip": torch.where(per_sample(dropped.image, clip) > 0, torch.zeros_like(clip), clip),
        }

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The UNet has channels before frames."""
        kind = precision_of(net)
        answer: Tensor = net(
            x_t.transpose(1, 2).to(kind),
            t,
            fps=condition["fps"],
            image_latents=condition["image"].transpose(1, 2).to(kind),
            image_embeddings=condition["clip"].to(kind),
            encoder_hidden_states=condition["text"].to(kind),
            return_dict=False,
        )[0]
        return answer.transpose(1, 2).float()

    # -- weights on disk -----------------------------------------------------------------------------------------------

    def export(self, state: Mapping[str, Tensor], folder: Path) -> list[str]:
        """The subfolder `unet` of a pipeline: put it in the place of the published one."""
        with torch.device("meta"):
            config = json.loads(_built("unet", self._config("unet")).to_json_string())
        write_diffusers(folder / "unet", state, config)
        return sorted(f"unet/{file.name}" for file in (folder / "unet").iterdir())

    def restore(self, path: Path, averaged: bool = True) -> dict[str, Tensor]:
        """Of a pipeline's folder, or of its UNet's, which hold one kind of weights."""
        path = path / "unet" if (path / "unet").is_dir() else path
        return self._checked(path, read(path))


def middle_square(frames: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3]: the square in the middle, resized bilinearly with antialiasing.

    The pipeline crops the same square, but scales it up to the clip's width in between. Frames of the right size are
    left as they are.
    """
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = frames[:, top : top + side, left : left + side].permute(0, 3, 1, 2).float()
    resized = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8)


def _class(part: str) -> Any:
    library, name = CLASSES[part]
    return getattr(import_module(library), name)


def _built(part: str, config: Mapping[str, Any]) -> Any:
    model = _class(part)
    if CLASSES[part][0] == "diffusers":
        return model.from_config(dict(config))
    return model(model.config_class.from_dict(dict(config)))


def _with_defaults(part: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file leaves out has the library's value."""
    model = _class(part)
    if CLASSES[part][0] == "diffusers":
        return {name: told.default for name, told in inspect.signature(model.__init__).parameters.items()} | dict(
            config
        )
    found: Mapping[str, Any] = model.config_class.from_dict(dict(config)).to_dict()
    return found


def _by_library_names(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Files of transformers 4: the text tower behind a prefix, and positions that are only counted up."""
    prefix = "text_model." if part == "text_encoder" else ""
    return {name.removeprefix(prefix): t for name, t in state.items() if not name.endswith(".position_ids")}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


build = I2VGenXL
