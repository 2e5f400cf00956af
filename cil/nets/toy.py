"""The denoiser of the family toy: a two-level video UNet of about 250,000 parameters.

Each level is 2-D residual blocks told the time, mixed over frames by 3-tap convolutions and attention.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

TIME_FEATURES = 64


def time_features(u: Tensor) -> Tensor:
    """Sines and cosines of u in [0, 1] -> [B, TIME_FEATURES]."""
    frequencies = torch.exp(torch.linspace(0, 6.5, TIME_FEATURES // 2, device=u.device))
    angles = u.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TorusConv(nn.Conv2d):
    """3x3, on a picture whose edges meet. PyTorch's padding_mode="circular" answers the same and copies more."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, -1:], x, x[:, :, :1]], dim=2)
        return F.conv2d(torch.cat([x[..., -1:], x, x[..., :1]], dim=3), self.weight, self.bias, self.stride)


class ResBlock(nn.Module):
    """Two 3x3 convolutions in space, scaled and shifted by the time, then one of 3 taps over frames."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(4, channels_in)
        self.conv_in = TorusConv(channels_in, channels, 3)
        self.film = nn.Linear(TIME_FEATURES, 2 * channels)
        self.norm_out = nn.GroupNorm(4, channels)
        self.conv_out = TorusConv(channels, channels, 3)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        self.norm_time = nn.GroupNorm(4, channels)
        self.conv_time = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))  # over frames, each place for itself

    def forward(self, x: Tensor, emb: Tensor, frames: int) -> Tensor:  # x [(B T), C, H, W], emb [B, F]
        scale, shift = self.film(emb).repeat_interleave(frames, dim=0)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = self.conv_out(F.silu(self.norm_out(h) * (1 + scale) + shift))
        h = h + self.skip(x)
        sequence = rearrange(F.silu(self.norm_time(h)), "(b t) c h w -> b c t (h w)", t=frames)
        mixed = rearrange(self.conv_time(sequence), "b c t (h w) -> (b t) c h w", h=h.shape[-2])
        return torch.add(h, mixed)


class Attention(nn.Module):
    """Self-attention over frames alone, or over frames and space."""

    def __init__(self, channels: int, over_space: bool, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.pattern = "b (t h w) c" if over_space else "(b h w) t c"
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, place: Tensor, frames: int) -> Tensor:  # x, place [(B T), C, H, W]
        height, width = x.shape[-2:]
        grid = "(b t) c h w"
        sequence = rearrange(self.norm(x) + place, f"{grid} -> {self.pattern}", t=frames)
        q, k, v = rearrange(self.qkv(sequence), "n l (three g d) -> three n g l d", three=3, g=self.heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "n g l d -> n l (g d)")
        return torch.add(x, rearrange(self.out(attended), f"{self.pattern} -> {grid}", t=frames, h=height, w=width))


class ToyNet(nn.Module):
    """[B, T, 2C, H, W] (noisy latents, image latent) and u [B] -> [B, T, C, H, W]."""

    def __init__(self, channels: int, fine: int, coarse: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, TIME_FEATURES), nn.SiLU())
        self.place = nn.Linear(6, fine)
        self.coarse_place = nn.Linear(6, coarse)
        self.stem = TorusConv(2 * channels, fine, 3)
        self.fine_in = ResBlock(fine, fine)
        self.fine_in_attention = Attention(fine, over_space=False)
        self.down = TorusConv(fine, coarse, 3, stride=2)
        self.coarse_in = ResBlock(coarse, coarse)
        self.coarse_attention = Attention(coarse, over_space=True)
        self.coarse_out = ResBlock(coarse, coarse)
        self.up = nn.Conv2d(coarse, fine, 1)
        self.fine_out = ResBlock(2 * fine, fine)
        self.fine_out_attention = Attention(fine, over_space=False)
        self.norm = nn.GroupNorm(4, fine)
        self.head = TorusConv(fine, channels, 3, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        frames = x.shape[1]
        emb = self.time(time_features(u).to(x))
        h = self.stem(rearrange(x, "b t c h w -> (b t) c h w"))
        fine, coarse = (self._places(p, h, frames, s) for p, s in ((self.place, 1), (self.coarse_place, 2)))
        h = self.fine_in_attention(self.fine_in(h, emb, frames), fine, frames)
        low = self.coarse_in(self.down(h), emb, frames)
        low = self.coarse_out(self.coarse_attention(low, coarse, frames), emb, frames)
        up = F.interpolate(self.up(low), scale_factor=2.0, mode="nearest")
        h = self.fine_out(torch.cat([h, up], dim=1), emb, frames)
        h = self.fine_out_attention(h, fine, frames)
        answer: Tensor = rearrange(self.head(F.silu(self.norm(h))), "(b t) c h w -> b t c h w", t=frames)
        return answer

    @staticmethod
    def _places(project: nn.Linear, x: Tensor, frames: int, stride: int) -> Tensor:
        """Where each token stands in frame, row and column, as waves that fit the torus -> [(B T), C, H, W]."""
        batch, (height, width) = len(x) // frames, (size // stride for size in x.shape[-2:])
        axes = [torch.arange(n, device=x.device) / n for n in (frames, height, width)]
        axes[0] = axes[0] / 2  # time does not wrap round
        grid = 2 * torch.pi * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        place = project(torch.cat([grid.sin(), grid.cos()], dim=-1).to(x))
        places: Tensor = rearrange(place.expand(batch, *place.shape), "b t h w c -> (b t) c h w")
        return places
