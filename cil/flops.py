"""How much arithmetic a network is, and how much of it a GPU can do: what MFU is made of.

    flops = of_next_call(net)
    net(x, t)
    flops()

answers its floating-point operations, forward.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

BACKWARD = 2  # times the forward pass: a product for the gradients of the inputs and one for those of the weights

# Dense, in 16 bits, a second: the makers' data sheets. The first whose name is in the GPU's counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

# Which PyTorch leaves out; on GPUs it counts attention.
ON_CPUS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]  # their shapes
    )
}


def peak_of(device: torch.device) -> float | None:
    """None where nobody has written it down."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def of_next_call(net: nn.Module) -> Callable[[], int]:
    """Matrix products, convolutions and attention of one call of `net`, and of nothing around it; 0 before it."""
    mode: Any = FlopCounterMode(display=False, custom_mapping=ON_CPUS)

    def begin(*_: object) -> None:
        hooks.pop().remove()
        mode.__enter__()

    def end(*_: object) -> None:
        hooks.pop().remove()
        mode.__exit__(None, None, None)

    hooks = [net.register_forward_hook(end), net.register_forward_pre_hook(begin)]
    return lambda: int(mode.get_total_flops())
