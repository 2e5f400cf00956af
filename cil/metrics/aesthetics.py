"""How much people like a picture, by a published head on CLIP's image embedding.

    score = AestheticHead.load("sac+logos+ava1-l14-linearMSE.pth")(embedding)

The heads of LAION are for ViT-L/14, whose embeddings [B, 768] are the projected ones (`image_embeds`).
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cil.checkpoints import State, read

LINEAR = ("",)  # sa_0_4_vit_l_14_linear.pth
MLP = tuple(f"layers.{i}." for i in (0, 2, 4, 6, 7))  # between them dropout, and no activation


class AestheticHead:
    def __init__(self, state: State) -> None:
        for names in (LINEAR, MLP):
            if state.keys() == {name + part for name in names for part in ("weight", "bias")}:
                self._layers = [(state[f"{name}weight"].float(), state[f"{name}bias"].float()) for name in names]
                return
        raise ValueError(f"no aesthetic head: expected weight and bias, or those of {', '.join(MLP)}")

    @classmethod
    def load(cls, path: str | Path) -> "AestheticHead":
        return cls(read(path))

    @torch.no_grad()
    def __call__(self, embedding: Tensor) -> Tensor:
        """[B] of image embeddings [B, D], whatever their length: about 1 to 10."""
        width = self._layers[0][0].shape[1]
        if embedding.shape[-1] != width:
            raise ValueError(f"embeddings of {embedding.shape[-1]}: this head is for a CLIP of {width} (ViT-L/14: 768)")
        x = F.normalize(embedding.float(), dim=-1)
        for weight, bias in self._layers:
            x = F.linear(x, weight, bias)
        return x.squeeze(-1)
