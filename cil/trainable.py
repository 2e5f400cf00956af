"""Which of a network's weights are trained: all, the UNet's without its projector, the temporal layers', or adapters.

    freeze(net, family, "lora", rank=16)     # adapters of peft on the attention's linear layers
    state = merged(net)                      # the network's own names again, adapters added to what they adapt

Adapters begin as nothing, so that training begins with the network as it was.
"""

import re
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cil.families.base import Family

Trained = Literal["full", "unet", "temporal", "lora"]
ATTENTION = r".*\.(to_q|to_k|to_v|to_k_ip|to_v_ip|to_out|to_out\.0|qkv|out)"  # of linear layers


def freeze(net: nn.Module, family: Family, trained: Trained, rank: int = 16, seed: int = 0) -> nn.Module:
    """The same network, where what is not trained asks for no gradient. `rank` and `seed` are the adapters'."""
    if trained == "lora":
        return _adapted(net, rank, seed)
    if trained not in get_args(Trained):
        raise ValueError(f"trained={trained!r}: one of {', '.join(get_args(Trained))}")
    for name, parameter in net.named_parameters():
        if trained == "unet":
            parameter.requires_grad_(not (family.projector and name.startswith(family.projector)))
        elif trained == "temporal":
            parameter.requires_grad_(re.search(family.temporal, name) is not None)
    return net


def _adapted(net: nn.Module, rank: int, seed: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if re.fullmatch(ATTENTION, f".{name}")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), net)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapted


def merged(net: nn.Module) -> dict[str, Tensor]:
    """The state dict by the names that the network had before `freeze`. Adapters stay added to its weights."""
    for module in net.modules():
        adapter: Any = module
        if hasattr(adapter, "lora_A") and not adapter.merged:
            adapter.merge()
    state = net.state_dict()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
