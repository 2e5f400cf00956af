"""How much people like a picture, by a published head on CLIP's image embedding.

    aesthetics = Aesthetics.load("sac+logos+ava1-l14-linearMSE.pth", "clip-vit-large-patch14")  # a file and a folder
    score = aesthetics(frames)  # uint8 [T, H, W, 3]

The heads of LAION are for OpenAI's ViT-L/14, whose embeddings [B, 768] are the projected ones (`image_embeds`).
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cil.checkpoints import State, digest, load_into, naming, read
from cil.nets.openclip import clip_pixels, with_positions

LINEAR = ("",)  # sa_0_4_vit_l_14_linear.pth
MLP = tuple(f"layers.{i}." for i in (0, 2, 4, 6, 7))  # between them dropout, and no activation


class AestheticHead:
    def __init__(self, state: State) -> None:
        for names in (LINEAR, MLP):
            if state.keys() == {name + part for name in names for part in ("weight", "bias")}:
                self._layers = [(state[f"{name}weight"].float(), state[f"{name}bias"].float()) for name in names]
                self.width, self.state = self._layers[0][0].shape[1], state
                return
        raise ValueError(f"no aesthetic head: expected weight and bias, or those of {', '.join(MLP)}")

    @classmethod
    def load(cls, path: str | Path) -> "AestheticHead":
        state = read(path)
        with naming(path):
            return cls(state)

    @torch.no_grad()
    def __call__(self, embedding: Tensor) -> Tensor:
        """[B] of image embeddings [B, D], whatever their length: about 1 to 10."""
        self.check(embedding.shape[-1])
        x = F.normalize(embedding.float(), dim=-1)
        for weight, bias in self._layers:
            x = F.linear(x, weight, bias)
        return x.squeeze(-1)

    def check(self, width: int) -> None:
        if width != self.width:
            raise ValueError(f"embeddings of {width}: this head is for a CLIP of {self.width} (ViT-L/14: 768)")


class Aesthetics:
    """A head and the CLIP that its embeddings are of."""

    def __init__(self, head: AestheticHead, clip: Any) -> None:
        """`clip`: transformers' CLIPVisionModelWithProjection."""
        head.check(clip.config.projection_dim)
        self.head, self.clip = head, clip

    @classmethod
    def load(cls, head: str | Path, clip: str | Path) -> Self:
        """`clip`: a folder as transformers keeps it, of the whole CLIP or of its image tower."""
        first, tower = AestheticHead.load(head), read_clip(Path(clip))
        with naming(clip):
            return cls(first, tower)

    def to(self, device: torch.device | str) -> Self:
        torch.nn.Module.to(self.clip, device)
        return self

    @property
    def identity(self) -> str:
        """Of what head and CLIP hold, wherever their files lie."""
        held = {f"clip.{name}": tensor for name, tensor in self.clip.state_dict().items()}
        return digest(held | {f"head.{name}": tensor for name, tensor in self.head.state.items()})

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> float:
        """Of uint8 frames [T, H, W, 3], the one in the middle: within a clip without a cut they differ little."""
        size = self.clip.config.image_size
        pixels = clip_pixels(middle_square(frames[len(frames) // 2], size)[None], size).to(self.clip.device)
        return float(self.head(self.clip(pixel_values=pixels).image_embeds.cpu()))


def middle_square(frame: Tensor, size: int) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [size, size, 3], as OpenAI's CLIP sees it: PIL's bicubic, then the middle of it."""
    height, width = frame.shape[:2]
    short = min(height, width)
    resized = (size * width // short, size * height // short)
    image = Image.fromarray(frame.cpu().numpy()).resize(resized, Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in resized)
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))


def read_clip(folder: Path) -> Any:
    """The image tower of a CLIP in transformers' names, strictly."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no config.json in it; expected a folder as transformers keeps CLIP ViT-L/14")
    try:
        config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{file}: damaged ({' '.join(str(error).split())})") from None
    with torch.device("meta"):
        tower = with_positions(CLIPVisionModelWithProjection(config))
    mine = ("vision_model.", "visual_projection.")
    state = {name: t for name, t in read(folder).items() if name.startswith(mine) and "position_ids" not in name}
    with naming(folder):
        load_into(tower, state, dtype=torch.float32, wanted="CLIP's image tower")
    return tower.requires_grad_(False).eval()
