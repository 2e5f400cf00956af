"""The networks of DynamiCrafter and VideoCrafter1: LVDM's UNet over space and time, and the projector of image tokens.

Names are those of the published checkpoints.

Every level of the UNet is a 2-D residual block with convolutions over frames behind it, attention over space (to text
and image tokens too), and attention over frames. Tensors inside are [(B T), C, H, W] or, in attention,
[batch, tokens, C].
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TEXT_TOKENS = 77


def waves(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of t [B] -> float32 [B, width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Attention(nn.Module):
    """To itself, or to a context of text tokens and then image tokens, which have keys and values of their own."""

    def __init__(
        self, width: int, heads: int, head_width: int, context: int | None = None, image: bool = False
    ) -> None:
        super().__init__()
        inner, source = heads * head_width, context or width
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(source, inner, bias=False)
        self.to_v = nn.Linear(source, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(0.0))
        if image:
            self.to_k_ip = nn.Linear(source, inner, bias=False)
            self.to_v_ip = nn.Linear(source, inner, bias=False)
        self.image = image
        self.alpha: Tensor | None
        self.register_parameter("alpha", None)  # how much the image counts, where that is learned

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        text = source[:, :TEXT_TOKENS] if self.image else source
        q = self._heads(self.to_q(x))
        attended = F.scaled_dot_product_attention(q, self._heads(self.to_k(text)), self._heads(self.to_v(text)))
        if self.image:
            tokens = source[:, TEXT_TOKENS:]
            k, v = self._heads(self.to_k_ip(tokens)), self._heads(self.to_v_ip(tokens))
            seen = F.scaled_dot_product_attention(q, k, v)
            attended = attended + (seen if self.alpha is None else seen * (self.alpha.tanh() + 1))
        answer: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return answer

    def _heads(self, x: Tensor) -> Tensor:
        """[N, L, heads * D] -> [N, heads, L, D]. einops, here, would double what torch.compile takes to trace."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return torch.mul(value, F.gelu(gate))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.net(x)
        return answer


class Block(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int, context: int | None, image: bool) -> None:
        super().__init__()
        self.attn1 = Attention(width, heads, head_width)
        self.attn2 = Attention(width, heads, head_width, context, image)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return torch.add(x, self.ff(self.norm3(x)))


class Transformer(nn.Module):
    """Attention over space with a context, or over frames without one."""

    def __init__(
        self, channels: int, heads: int, head_width: int, depth: int, context: int | None = None, linear: bool = True
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.over_frames = context is None
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv1d(channels, inner, 1)
        image = context is not None
        self.transformer_blocks = nn.ModuleList(Block(inner, heads, head_width, context, image) for _ in range(depth))
        self.proj_out = nn.Linear(inner, channels) if linear else nn.Conv1d(inner, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None, frames: int) -> Tensor:
        height, width = x.shape[-2:]
        tokens = "(b h w) t c" if self.over_frames else "(b t) (h w) c"
        h = rearrange(self._norm(x, frames), f"(b t) c h w -> {tokens}", t=frames)
        h = _projected(self.proj_in, h)
        for block in self.transformer_blocks:
            h = block(h, None if self.over_frames else context)
        h = _projected(self.proj_out, h)
        return torch.add(x, rearrange(h, f"{tokens} -> (b t) c h w", t=frames, h=height, w=width))

    def _norm(self, x: Tensor, frames: int) -> Tensor:
        """Attention over frames is normalised over all frames together."""
        if not self.over_frames:
            normed: Tensor = self.norm(x)
            return normed
        together = self.norm(rearrange(x, "(b t) c h w -> b c t h w", t=frames))
        apart: Tensor = rearrange(together, "b c t h w -> (b t) c h w")
        return apart


def _projected(projection: nn.Module, tokens: Tensor) -> Tensor:
    """By a linear layer, or by one that a checkpoint keeps as a convolution of width 1."""
    weight, bias = projection.weight, projection.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return F.linear(tokens, weight.flatten(1), bias)


class FrameConv(nn.Conv3d):
    """3 frames x 1 x 1, computed in two dimensions, (frame, pixel)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T, H, W]
        return F.conv2d(x.flatten(3), self.weight.flatten(3), self.bias, padding=(1, 0)).reshape(x.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever `to` does to the weight is done to it as it is used: torch.channels_last is for four dimensions."""

        def in_four(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten(3)).view(tensor.shape) if tensor.dim() == 5 else fn(tensor)

        super()._apply(in_four, recurse)  # type: ignore[no-untyped-call]
        return self


class TemporalConvs(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), FrameConv(channels))
        self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Dropout(dropout), FrameConv(channels))
            for _ in range(3)
        )

    def forward(self, x: Tensor, frames: int) -> Tensor:
        h = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
        h = self.conv4(self.conv3(self.conv2(self.conv1(h))))
        return torch.add(x, rearrange(h, "b c t h w -> (b t) c h w"))


class ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        self.temopral_conv = TemporalConvs(channels, 0.1 if dropout else 0.0)  # the checkpoints' spelling

    def forward(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        answer: Tensor = self.temopral_conv(self.skip_connection(x) + self.out_layers(h), frames)
        return answer


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.op(x)
        return answer


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return answer


class Stage(nn.ModuleList):
    """Layers in a row, each given what it needs."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, frames: int) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding, frames)
            elif isinstance(layer, Transformer):
                x = layer(x, context, frames)
            else:
                x = layer(x)
        return x


class LVDMUNet(nn.Module):
    """x [B, T, C, H, W], t and fps [B], context [B, 77 text tokens and then image tokens, D] -> [B, T, C, H, W].

    With `tokens_per_frame`, a context of 77 + T x tokens_per_frame has image tokens for each frame; any other is given
    whole to every frame.
    """

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_head_channels: int = 64,
        transformer_depth: int = 1,
        context_dim: int = 1024,
        dropout: float = 0.0,
        tokens_per_frame: int | None = None,
        default_fps: int = 16,
        learned_image_scale: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels, self.tokens_per_frame, self.default_fps = model_channels, tokens_per_frame, default_fps
        self.gradient_checkpointing = False
        width = 4 * model_channels
        self.time_embed = _embedding(model_channels, width)
        self.fps_embedding = _embedding(model_channels, width)

        def attentions(channels: int) -> list[nn.Module]:
            heads = channels // num_head_channels
            return [
                Transformer(channels, heads, num_head_channels, transformer_depth, context_dim),
                Transformer(channels, heads, num_head_channels, transformer_depth),
            ]

        def stage(channels_in: int, channels: int, factor: int) -> list[nn.Module]:
            res = ResBlock(channels_in, channels, width, dropout)
            return [res, *(attentions(channels) if factor in attention_resolutions else [])]

        channels = model_channels
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, channels, 3, padding=1))])
        self.init_attn = Stage(Transformer(channels, 8, num_head_channels, transformer_depth, linear=False))
        skips = [channels]
        for level, multiple in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage(*stage(channels, multiple * model_channels, 2**level)))
                channels = multiple * model_channels
                skips.append(channels)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(Stage(Down(channels)))
                skips.append(channels)
        self.middle_block = Stage(
            ResBlock(channels, channels, width, dropout),
            *attentions(channels),
            ResBlock(channels, channels, width, dropout),
        )
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = stage(channels + skips.pop(), multiple * model_channels, 2**level)
                channels = multiple * model_channels
                if level and i == num_res_blocks:
                    layers.append(Up(channels))
                self.output_blocks.append(Stage(*layers))
        last = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), last)
        if learned_image_scale:  # as in DynamiCrafter's for 256x256
            for attention in (module for module in self.modules() if isinstance(module, Attention) and module.image):
                attention.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, fps: Tensor | None = None) -> Tensor:
        frames = x.shape[1]
        if fps is None:
            fps = torch.full_like(t, self.default_fps)
        time, rate = (waves(value, self.model_channels).to(x) for value in (t, fps))
        embedding = self.time_embed(time) + self.fps_embedding(rate)
        inputs = embedding.repeat_interleave(frames, dim=0), self._for_each_frame(context, frames), frames

        h = self.input_blocks[0](x.flatten(0, 1), *inputs)
        h = self._run(self.init_attn, h, *inputs)
        skips = [h]
        for stage in self.input_blocks[1:]:
            h = self._run(stage, h, *inputs)
            skips.append(h)
        h = self._run(self.middle_block, h, *inputs)
        for stage in self.output_blocks:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), *inputs)
        answer: Tensor = rearrange(self.out(h), "(b t) c h w -> b t c h w", t=frames)
        return answer

    def _run(self, stage: nn.Module, x: Tensor, *inputs: Tensor | int) -> Tensor:
        if self.gradient_checkpointing and self.training:
            kept: Tensor = checkpoint(stage, x, *inputs, use_reentrant=False)
            return kept
        answer: Tensor = stage(x, *inputs)
        return answer

    def _for_each_frame(self, context: Tensor, frames: int) -> Tensor:
        """[B, L, D] -> [(B T), L', D]"""
        each = self.tokens_per_frame
        if each is None or context.shape[1] != TEXT_TOKENS + frames * each:
            return context.repeat_interleave(frames, dim=0)
        text = context[:, :TEXT_TOKENS].repeat_interleave(frames, dim=0)
        image = rearrange(context[:, TEXT_TOKENS:], "b (t l) d -> (b t) l d", t=frames)
        return torch.cat([text, image], dim=1)


def _embedding(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))


class PerceiverAttention(nn.Module):
    """Of learned queries to image tokens and to themselves."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "n l (g d) -> n g l d", g=self.heads) for y in (self.to_q(latents), k, v))
        answer: Tensor = self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "n g l d -> n l (g d)"))
        return answer


class Resampler(nn.Module):
    """The projector: tokens of a CLIP image [B, L, E] -> `queries` tokens [B, queries, D] for the UNet.

    DynamiCrafter has 16 queries for each frame, frame 0 first; VideoCrafter1 has 16 in all.
    """

    def __init__(
        self,
        queries: int = 16,
        width: int = 1024,
        depth: int = 4,
        heads: int = 12,
        head_width: int = 64,
        embedding_dim: int = 1280,
        output_dim: int = 1024,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, queries, width) / width**0.5)
        self.proj_in = nn.Linear(embedding_dim, width)
        self.proj_out = nn.Linear(width, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads, head_width), _feed_forward(width)]) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            latents = latents + layer[0](x, latents)
            latents = latents + layer[1](latents)
        answer: Tensor = self.norm_out(self.proj_out(latents))
        return answer


def _feed_forward(width: int) -> nn.Sequential:
    inner = nn.Linear(width, 4 * width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), inner, nn.GELU(), nn.Linear(4 * width, width, bias=False))
