"""How well a video begins with the picture that it was asked to begin with: uint8 [H, W, 3], both of one size.

psnr(frames[0], image), ssim(frames[0], image)
ClipSimilarity.load("clip-vit-large-patch14")(frames[0], image)
"""

import math
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cil.checkpoints import digest
from cil.metrics.aesthetics import middle_square, read_clip
from cil.nets.openclip import clip_pixels

MOST = 100.0  # dB: of the same picture, so that means over videos stay finite
WINDOW, SPREAD = 11, 1.5  # pixels of SSIM's Gaussian: its width and its deviation
STABLE = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(picture: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, at most MOST."""
    a, b = _alike(picture, image)
    error = float((a - b).square().mean())
    return min(MOST, 10 * math.log10(255**2 / error)) if error else MOST


def ssim(picture: Tensor, image: Tensor) -> float:
    """Structural similarity, Wang et al. 2004: of each colour, where the whole window lies within the picture."""
    a, b = _alike(picture, image)
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"pictures of {a.shape[-2]}x{a.shape[-1]}: SSIM needs {WINDOW}x{WINDOW}")
    x = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = (-(x**2) / (2 * SPREAD**2)).exp()
    window = window / window.sum()

    def blurred(y: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(y[:, None], window[None, None, :, None]), window[None, None, None])[:, 0]

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = STABLE
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((brightness * (2 * covariance + c2) / (var_a + var_b + c2)).mean())


class ClipSimilarity:
    """The cosine between CLIP's embeddings of two pictures, each seen as its middle square."""

    def __init__(self, clip: Any) -> None:
        """`clip`: transformers' CLIPVisionModelWithProjection."""
        self.clip = clip

    @classmethod
    def load(cls, clip: str | Path) -> Self:
        """A folder as transformers keeps it, of the whole CLIP or of its image tower."""
        return cls(read_clip(Path(clip)))

    def to(self, device: torch.device | str) -> Self:
        torch.nn.Module.to(self.clip, device)
        return self

    @property
    def identity(self) -> str:
        """Of the weights, wherever they lie."""
        return digest(self.clip.state_dict())

    @torch.no_grad()
    def __call__(self, picture: Tensor, image: Tensor) -> float:
        size = self.clip.config.image_size
        squares = torch.stack([middle_square(x, size) for x in (picture, image)])
        a, b = self.clip(pixel_values=clip_pixels(squares, size).to(self.clip.device)).image_embeds.double().cpu()
        return float(F.cosine_similarity(a, b, dim=0))


def _alike(picture: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [3, H, W] each."""
    if picture.shape != image.shape or image.dim() != 3 or not picture.dtype == image.dtype == torch.uint8:
        told = " and ".join(f"{x.dtype} {list(x.shape)}" for x in (picture, image))
        raise ValueError(f"pictures {told}: expected uint8 [H, W, 3], of one size")
    a, b = (rearrange(x, "h w c -> c h w").double() for x in (picture, image))
    return a, b
