"""Forward, and forward with backward, of the families' networks against the plain way to call or to write them.

    python -m benchmarks.networks

LVDM's peer has the same weights and layers, but attention as two einsums with a softmax between, which keeps every
score in memory, and convolutions over frames in three dimensions. SVD and I2VGen-XL are networks of diffusers: ours is
`family.denoise`, the peer the same network called by hand, with what anybody has to do before it. That is the limit, so
their goal is .98: 1 but for noise. On a CPU the networks are reduced ones; on a GPU they are the published
ones at 320x512 in bf16, and the share of the card's peak that each reaches is printed. Last rows set a training step
that recomputes activations beside one that keeps them; diffusers has that for SVD only.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Row, alternately, main, paired
from cil import families
from cil.nets.lvdm import FrameConv, LVDMUNet

REDUCED = {"model_channels": 64, "channel_mult": (1, 2, 4), "context_dim": 256, "num_head_channels": 32}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
CLIP = {"cpu": (16, 128, 128), "cuda": (16, 320, 512)}  # T, H, W in pixels, of diffusers' networks
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, of the SXM cards


@dataclass(frozen=True)
class Contest:
    """Two ways to the same answer of one network."""

    name: str
    peer: str
    net: nn.Module
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    limit: bool  # nothing can be faster than theirs
    rounds: int
    recompute: Callable[[bool], object] | None  # activations, from now on or no longer


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu") as device:
        made = (make(device.type) for make in (lvdm, svd, i2vgenxl))
        return [row for contest in made for row in _rows(contest, 3 if quick else contest.rounds)]


def _rows(contest: Contest, rounds: int) -> list[Row]:
    contest.net.train()

    def forward(answer: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                answer()
            _wait()

        return call

    def step(answer: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            answer().float().square().mean().backward()
            contest.net.zero_grad()
            _wait()

        return call

    rows = []
    for name, kind in (("forward", forward), ("forward and backward", step)):
        ours, theirs = alternately(kind(contest.ours), kind(contest.theirs), rounds=rounds)
        ms = [1000 * median(seconds) for seconds in (ours, theirs)]
        limit, goal = (ms[1], 0.98) if contest.limit else (None, 1.0)
        rows.append(Row(f"networks: {contest.peer}, {name}", *ms, limit, "ms", paired(theirs, ours), goal))
    _print_flops(contest.name, forward(contest.ours), rows[0].ours / 1000)
    if recompute := contest.recompute:

        def recomputing() -> None:
            recompute(True)
            step(contest.ours)()
            recompute(False)

        recomputed, kept = alternately(recomputing, step(contest.ours), rounds=rounds)
        ms = [1000 * median(seconds) for seconds in (recomputed, kept)]
        ratio = paired(kept, recomputed)
        rows.append(Row(f"networks: activations kept, {contest.name}'s recomputed", *ms, None, "ms", ratio))
        before, after = _kept(contest.net, contest.ours), _kept(contest.net, contest.ours, recompute)
        print(f"{contest.name}: activations held for backward: {before}, recomputed: {after}")
    return rows


# -- LVDM --------------------------------------------------------------------------------------------------------------


def lvdm(device: str) -> Contest:
    gpu, dtype = device == "cuda", DTYPE[device]
    sizes: dict[str, Any] = {} if gpu else REDUCED
    net = LVDMUNet(**sizes, tokens_per_frame=16).to(dtype)
    size = (1, 16, 8, 40, 64) if gpu else (1, 8, 8, 16, 24)  # B, T, C, H, W of latents
    x, t = torch.randn(size, dtype=dtype), torch.tensor([500])
    context = torch.randn(1, 77 + 16 * size[1], 1024 if gpu else 256, dtype=dtype)

    def ours() -> Tensor:
        answer: Tensor = net(x, t, context)
        return answer

    def plain() -> Tensor:
        with _plain():
            return ours()

    def recompute(on: bool) -> None:
        net.gradient_checkpointing = on

    return Contest("LVDM", "plain LVDM", net, ours, plain, False, 7, recompute)


@contextmanager
def _plain() -> Iterator[None]:
    with (
        mock.patch.object(F, "scaled_dot_product_attention", einsum_attention),
        mock.patch.object(FrameConv, "forward", nn.Conv3d.forward),
    ):
        yield


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N, heads, L, D]
    scores = torch.einsum("n g i d, n g j d -> n g i j", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("n g i j, n g j d -> n g i d", scores.softmax(-1), v)


# -- diffusers' networks -----------------------------------------------------------------------------------------------


def svd(device: str) -> Contest:
    family = families.load("svd", *CLIP[device], "512" if device == "cuda" else "tiny")
    dtype = DTYPE[device]
    net: Any = family.network(0).to(dtype)
    sigma = torch.tensor([20.0])
    x_t, image = 20 * torch.randn(1, *family.latent_shape), torch.randn(1, *family.latent_shape)
    clip = torch.randn(1, 1, net.config.cross_attention_dim)
    ids = torch.tensor([[7.0, 20.0, 0.1]])
    condition = {"image": image, "clip": clip, "ids": ids}

    def by_hand() -> Tensor:
        scaled = x_t / (sigma**2 + 1).sqrt()[:, None, None, None, None]
        sample = torch.cat([scaled, image], dim=2).to(dtype)
        answer: Tensor = net(sample, sigma.log() / 4, clip.to(dtype), ids).sample
        return answer

    def recompute(on: bool) -> None:
        (net.enable_gradient_checkpointing if on else net.disable_gradient_checkpointing)()

    ours = lambda: family.denoise(net, x_t, sigma, condition)  # noqa: E731
    return Contest("SVD", "diffusers SVD", net, ours, by_hand, True, 21, recompute)


def i2vgenxl(device: str) -> Contest:
    family = families.load("i2vgenxl", *CLIP[device], "704" if device == "cuda" else "tiny")
    dtype = DTYPE[device]
    net: Any = family.network(0).to(dtype)
    width = net.config.cross_attention_dim
    t, fps = torch.tensor([500]), torch.tensor([8])
    x_t, image = torch.randn(1, *family.latent_shape), torch.randn(1, *family.latent_shape)
    text, clip = torch.randn(1, 77, width), torch.randn(1, width)
    condition = {"image": image, "clip": clip, "text": text, "fps": fps}
    in_diffusers = [tensor.transpose(1, 2).contiguous() for tensor in (x_t, image)]  # B, C, T, H, W

    def by_hand() -> Tensor:
        x, first, embedding, states = (tensor.to(dtype) for tensor in (*in_diffusers, clip, text))
        answer: Tensor = net(x, t, fps, first, embedding, states).sample
        return answer

    ours = lambda: family.denoise(net, x_t, t, condition)  # noqa: E731
    return Contest("I2VGen-XL", "diffusers I2VGen-XL", net, ours, by_hand, True, 21, None)


# -- what a call takes -------------------------------------------------------------------------------------------------


def _kept(net: nn.Module, answer: Callable[[], Tensor], recompute: Callable[[bool], object] | None = None) -> str:
    """The bytes that autograd holds between forward and backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    if recompute:
        recompute(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer()
    if recompute:
        recompute(False)
    return f"{sum(held.values()) / 2**20:.0f} MiB"


def _print_flops(name: str, forward: Callable[[], None], seconds: float) -> None:
    with FlopCounterMode(display=False) as counter:
        forward()
    flops = counter.get_total_flops()
    said = f"{name}: {flops / 1e9:.1f} GFLOP a forward, {flops / seconds / 1e12:.3f} TFLOP/s"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        peak = next((peak for name, peak in PEAK_BF16.items() if name in card), None)
        said += f", {flops / seconds / peak:.0%} of {card}'s peak" if peak else f" on {card}"
    print(said, file=sys.stderr)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(__doc__, measure)
