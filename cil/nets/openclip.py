"""OpenCLIP's ViT-H/14, which tells LVDM's networks of the text and of the image, as transformers' CLIP models.

A checkpoint has the text tower behind the prefix `cond_stage_model.model.` and the image tower behind
`embedder.model.`, both in open_clip's names. The prefix is to be cut off first.

    tower = ImageTower()                                      # the published sizes
    model = tower.build()
    state, extras = tower.to_transformers(checkpoint)         # and back: tower.to_open_clip(state, extras)
    model.load_state_dict(state)
    tokens = image_tokens(model, clip_pixels(frames))         # frames uint8 [B, H, W, 3] -> [B, 257, 1280]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cil.checkpoints import check_names

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images: red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)

BLOCK = {  # modules of a block that differ in name only: open_clip's, transformers'
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True)
class Tower:
    """The sizes of a transformer of open_clip, and its tensors' names in both libraries."""

    width: int
    layers: int
    heads: int
    projection: int  # the width that text and image share in the end; LVDM stops before

    root: ClassVar[tuple[str, str]]  # what stands before the names of blocks: open_clip's, transformers'
    outside: ClassVar[dict[str, str]]  # of blocks
    turned: ClassVar[str]  # tokens are multiplied by this matrix in open_clip, by its transpose in a linear layer
    extras: ClassVar[tuple[str, ...]]  # transformers has no place for them; a whole checkpoint needs them

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: a multiple of heads={self.heads}")

    def to_transformers(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """open_clip's state -> the model's state, and the extras to be kept aside.

        Queries, keys and values are views of the one tensor that open_clip has.
        """
        names = self.names()
        check_names(state, [*names, *self.extras], f"open_clip's state of {self}")
        parts = (
            zip(ours, self._turn(theirs, state[theirs]).chunk(len(ours)), strict=True) for theirs, ours in names.items()
        )
        return dict(chain.from_iterable(parts)), {name: state[name] for name in self.extras}

    def to_open_clip(self, state: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = self.names()
        check_names(state, chain.from_iterable(names.values()), f"transformers' state of {self}")
        check_names(extras, self.extras, f"extras of {self}")
        joined = {theirs: torch.cat([state[name] for name in ours]) for theirs, ours in names.items()}
        return {theirs: self._turn(theirs, tensor) for theirs, tensor in joined.items()} | dict(extras)

    def names(self) -> dict[str, tuple[str, ...]]:
        """{open_clip's name: transformers' name, or those of queries, keys and values}"""
        return {theirs: (ours,) for theirs, ours in self.outside.items()} | dict(self._names_in_blocks())

    def _names_in_blocks(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        for layer in range(self.layers):
            theirs, ours = (f"{root}.{layer}" for root in self.root)
            for part in ("weight", "bias"):
                for their_module, our_module in BLOCK.items():
                    yield f"{theirs}.{their_module}.{part}", (f"{ours}.{our_module}.{part}",)
                apart = tuple(f"{ours}.self_attn.{name}_proj.{part}" for name in "qkv")
                yield f"{theirs}.attn.in_proj_{part}", apart

    def _turn(self, theirs: str, tensor: Tensor) -> Tensor:
        return tensor.T.contiguous() if theirs == self.turned else tensor


@dataclass(frozen=True)
class TextTower(Tower):
    width: int = 1024
    layers: int = 24
    heads: int = 16
    projection: int = 1024
    tokens: int = 77
    vocabulary: int = 49408

    root = ("transformer.resblocks", "text_model.encoder.layers")
    outside: ClassVar = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "text_projection": "text_projection.weight",
    }
    turned = "text_projection"
    extras = ("logit_scale",)

    def build(self) -> "CLIPTextModelWithProjection":
        """With random weights."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        config = CLIPTextConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            projection_dim=self.projection,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.tokens,
            bos_token_id=self.vocabulary - 2,
            eos_token_id=self.vocabulary - 1,
            hidden_act="gelu",  # open_clip's is exact; transformers' own choice for CLIP is not
        )
        return CLIPTextModelWithProjection(config)


@dataclass(frozen=True)
class ImageTower(Tower):
    """LVDM keeps the text side of its embedder, all but the blocks, in its checkpoints: the extras."""

    width: int = 1280
    layers: int = 32
    heads: int = 16
    projection: int = 1024
    size: int = 224  # height and width in pixels
    patch: int = 14

    root = ("visual.transformer.resblocks", "vision_model.encoder.layers")
    outside: ClassVar = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "visual.proj": "visual_projection.weight",
    }
    turned = "visual.proj"
    extras = (
        *("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"),
        *("ln_final.weight", "ln_final.bias"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise ValueError(f"size={self.size}: a multiple of patch={self.patch}")

    def build(self) -> "CLIPVisionModelWithProjection":
        """With random weights."""
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            projection_dim=self.projection,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.size,
            patch_size=self.patch,
            hidden_act="gelu",
        )
        return CLIPVisionModelWithProjection(config)


def with_positions(model: Any) -> Any:
    """What no file holds of a CLIP model that was made on the meta device: the positions, which are counted up."""
    for module in model.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(module.position_ids.shape[-1], device="cpu")[None]
    return model


def text_tokens(model: "CLIPTextModelWithProjection", ids: Tensor) -> Tensor:
    """ids [B, 77] -> [B, 77, width]: what leaves the last block but one, normalised as what leaves the last.

    There is no mask but the causal one: LVDM attends to the padding too.
    """
    tokens = model.config.max_position_embeddings
    if ids.dim() != 2 or ids.shape[1] != tokens:
        raise ValueError(f"ids of shape {list(ids.shape)}: [B, {tokens}], padded with zeros")
    states = model.text_model(input_ids=ids, output_hidden_states=True).hidden_states
    answer: Tensor = model.text_model.final_layer_norm(states[-2])
    return answer


def image_tokens(model: "CLIPVisionModelWithProjection", pixels: Tensor) -> Tensor:
    """pixels [B, 3, 224, 224] -> [B, 257, width]: the class token and 16 x 16 patches as they leave the last block."""
    answer: Tensor = model.vision_model(pixel_values=pixels).last_hidden_state
    return answer


def clip_pixels(frames: Tensor, size: int = 224) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, size, size], normalised by OpenAI's mean and standard deviation.

    Resized as LVDM does, which calls kornia: the whole image to a square, its aspect ratio lost, by bicubic
    interpolation that keeps corners at corners, after a Gaussian blur of each side that becomes shorter; the results
    may leave [0, 1]. Frames of the right size are left as they are.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames of {frames.dtype}, shape {list(frames.shape)}: uint8 [B, H, W, 3]")
    x = rearrange(frames, "b h w c -> b c h w").float() / 255
    if x.shape[-2:] != (size, size):
        x = _blurred(_blurred(x, size).mT, size).mT
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return (x - mean) / std


def _blurred(x: Tensor, size: int) -> Tensor:
    """[B, C, H, W] along W, by two standard deviations to each side, mirrored at the edges."""
    sigma = (x.shape[-1] / size - 1) / 2
    if sigma <= 0:
        return x
    reach = max(int(4 * sigma), 3) // 2
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    mirrored = F.pad(x.flatten(0, 1), (reach, reach), mode="reflect")
    rows = rearrange(mirrored, "n h w -> (n h) 1 w")
    return F.conv1d(rows, (kernel / kernel.sum())[None, None]).reshape(x.shape)


def stretched(frames: Tensor, size: int = 224) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3]: what `clip_pixels` makes of them, before the norm."""
    pixels = clip_pixels(frames, size).permute(0, 2, 3, 1)
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
