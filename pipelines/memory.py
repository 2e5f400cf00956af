"""What a rank needs of memory under a DeepSpeed profile, and which profile that leads to.

    python -m pipelines.memory

prints the table of docs/training.md: what each profile needs for the published networks.
"""

from collections.abc import Iterable

import torch
from torch import nn

from cil import families
from cil.families import Family
from cil.trainable import Trained, freeze
from pipelines import zero
from pipelines.config import RowConfig

BY_DEFAULT = ("zero-1", "zero-2", "zero-3", "zero-2-offload", "zero-3-offload")  # the fastest first
FREE = 0.6  # of a device's memory for what is counted here; activations take the rest
GIB = 2**30


def bytes_a_rank(profile: zero.Profile, trained: int, frozen: int, world: int, precision: str) -> float:
    """On the device: weights, gradients, Adam's moments, the float32 copy of the weights, and their average.

    Between the parts of a batch: `python -m benchmarks.zero` counts it. Buckets and activations come on top.
    """
    stage, low = zero.stage_of(profile), 4 if precision == "float32" else 2
    weights = 0.0 if zero.offloads(profile, "param") else low * (trained + frozen) / (world if stage == 3 else 1)
    gradients = low * trained / (world if stage >= 2 else 1)
    if stage == 0:
        return weights + gradients + trained * (8 + 4)
    return weights + gradients + (0.0 if zero.offloads(profile) else trained * (4 + 8 + 4) / world)


def choose(family: Family, rows: Iterable[RowConfig], world: int, memory: int | None) -> tuple[str, str]:
    """The fastest profile by which every row fits into a device's memory (none: a CPU's), and why."""
    if memory is None:
        return BY_DEFAULT[0], "on CPUs nothing is gained by sharing out more"
    sizes = {(*parameters_of(family, row.train, row.rank), row.precision) for row in rows}
    for name in BY_DEFAULT:
        profile = zero.profile_of(name)
        needs = {bytes_a_rank(profile, a, b, world, precision): (a + b, precision) for a, b, precision in sizes}
        if max(needs) <= FREE * memory:
            break
    count, precision = needs[max(needs)]
    told = f"{count / 1e6:,.0f} million parameters in {precision} on {world} workers take {max(needs) / GIB:.1f} GiB"
    return name, f"{told} each of {memory / GIB:.0f} GiB, before activations"


GPUS = (1, 8, 64)
PUBLISHED = {"dynamicrafter": "512", "videocrafter1": "512", "svd": "512", "i2vgenxl": "256"}
WAYS: tuple[Trained, ...] = ("full", "temporal", "lora")


def parameters_of(family: Family, way: Trained, rank: int = 16) -> tuple[int, int]:
    """Trained ones and frozen ones of a family's network."""
    net = freeze(network_of(family), family, way, rank)
    counts = [sum(p.numel() for p in net.parameters() if p.requires_grad == kind) for kind in (True, False)]
    return counts[0], counts[1]


def network_of(family: Family) -> nn.Module:
    """Without its memory."""
    bare = families.load(family.name, family.frames, family.height, family.width, family.preset)
    with torch.device("meta"):
        return bare.network(0)


def table() -> str:
    """GiB a GPU, for as many GPUs as GPUS says; ZeRO 0 in float32, the others in bfloat16."""
    kinds = {name: zero.profile_of(name) for name in ("zero-0", *BY_DEFAULT)}
    lines = [f"| family, what is trained | million parameters | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for name, preset in PUBLISHED.items():
        for way in WAYS:
            trained, frozen = parameters_of(families.load(name, preset=preset), way)
            cells = [f"{name}, {way}", f"{trained / 1e6:,.0f} of {(trained + frozen) / 1e6:,.0f}"]
            for profile in kinds.values():
                kind = "bfloat16" if zero.stage_of(profile) else "float32"
                needs = (bytes_a_rank(profile, trained, frozen, gpus, kind) / GIB for gpus in GPUS)
                cells.append(" / ".join(f"{need:.1f}" for need in needs))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
