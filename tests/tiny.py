"""Published families at their tiny size, and clips for them."""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from cil import CleanCondition
from cil.families import Family
from cil.families.base import Clip

PUBLISHED = ("dynamicrafter", "videocrafter1", "svd", "i2vgenxl")
SIZE = (2, 32, 48)
CLIPS = [Clip("A red ball", 8.6, 3, seed=5), Clip("", 3.0, 1, seed=6)]
KEYS = [(0,), (1,)]


def frames(clips: int = 2, size: tuple[int, int, int] = SIZE, seed: int = 0) -> Tensor:
    """Smooth, uint8 [B, T, H, W, 3]."""
    coarse = torch.rand(clips * size[0], 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, size=size[1:], mode="bilinear")
    return rearrange((smooth * 255).to(torch.uint8), "(b t) c h w -> b t h w c", b=clips)


def encoded(family: Family) -> dict[str, Tensor]:
    return family.encode(frames(), CLIPS)


def clean(family: Family, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return family.condition(batch, CleanCondition(), torch.zeros(len(batch["latents"])), None)[0]


@torch.no_grad()
def answer(family: Family, net: nn.Module, condition: Mapping[str, Tensor]) -> Tensor:
    """Timesteps are none that bfloat16 holds."""
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([20.3, 0.3]) if family.name == "svd" else torch.tensor([903, 333])
    return family.denoise(net.eval(), x, t, dict(condition))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in L2."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
