"""Forward, and forward with backward, of LVDM's UNet against the plain formulation of it.

    python -m benchmarks.networks

The peer has the same weights and layers, but attention as two einsums with a softmax between, which keeps every score
in memory, and convolutions over frames in three dimensions. On a CPU the network is a reduced one; on a GPU it is the
published one at 320x512 in bf16, and the share of the card's peak that it reaches is printed. A last row sets a
training step that recomputes activations beside one that keeps them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Row, alternately, main, paired
from cil.nets.lvdm import FrameConv, LVDMUNet

REDUCED = {"model_channels": 64, "channel_mult": (1, 2, 4), "context_dim": 256, "num_head_channels": 32}
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, of the SXM cards


def measure(quick: bool) -> list[Row]:
    gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    with torch.device(device):
        net = LVDMUNet(**({} if gpu else REDUCED), tokens_per_frame=16).to(dtype)  # type: ignore[arg-type]
        size = (1, 16, 8, 40, 64) if gpu else (1, 8, 8, 16, 24)
        x, t = torch.randn(size, dtype=dtype), torch.tensor([500])
        context = torch.randn(1, 77 + 16 * size[1], 1024 if gpu else 256, dtype=dtype)
    net.train()

    def forward() -> None:
        with torch.no_grad():
            net(x, t, context)
        _wait(device)

    def step() -> None:
        net(x, t, context).float().square().mean().backward()
        net.zero_grad()
        _wait(device)

    rounds = 3 if quick else 7
    rows = []
    for name, call in (("forward", forward), ("forward and backward", step)):
        ours, theirs = alternately(call, _plainly(call), rounds=rounds)
        ms = [1000 * median(seconds) for seconds in (ours, theirs)]
        rows.append(Row(f"networks: plain LVDM, {name}", *ms, None, "ms", paired(theirs, ours), 1.0))
    _print_flops(forward, rows[0].ours / 1000, device)

    def recomputing() -> None:
        net.gradient_checkpointing = True
        step()
        net.gradient_checkpointing = False

    recomputed, kept = alternately(recomputing, step, rounds=rounds)
    ms = [1000 * median(seconds) for seconds in (recomputed, kept)]
    rows.append(Row("networks: activations kept, recomputed", *ms, None, "ms", paired(kept, recomputed), None))
    held = [_kept(net, x, t, context, recompute) for recompute in (False, True)]
    print(f"activations held for backward: {held[0]}, recomputed: {held[1]}")
    return rows


def _plainly(call: Callable[[], None]) -> Callable[[], None]:
    def plain() -> None:
        with _plain():
            call()

    return plain


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


def _kept(net: LVDMUNet, x: Tensor, t: Tensor, context: Tensor, recompute: bool) -> str:
    """The bytes that autograd holds between forward and backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    net.gradient_checkpointing = recompute
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x, t, context)
    net.gradient_checkpointing = False
    return f"{sum(held.values()) / 2**20:.0f} MiB"


def _print_flops(forward: Callable[[], None], seconds: float, device: str) -> None:
    with FlopCounterMode(display=False) as counter:
        forward()
    flops = counter.get_total_flops()
    said = f"{flops / 1e9:.1f} GFLOP a forward, {flops / seconds / 1e12:.3f} TFLOP/s"
    if device == "cuda":
        card = torch.cuda.get_device_name()
        peak = next((peak for name, peak in PEAK_BF16.items() if name in card), None)
        said += f", {flops / seconds / peak:.0%} of {card}'s peak" if peak else f" on {card}"
    print(said, file=sys.stderr)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(__doc__, measure)
