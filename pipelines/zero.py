"""DeepSpeed: which profile of infra/deepspeed a training takes, what it needs of memory, and the engine.

A profile is a DeepSpeed configuration without what the study says (batch, precision, clipping). Stage 0 keeps all on
every rank, 1 shares out the optimiser's state, 2 also gradients, 3 also weights; `offload` moves them to CPU memory.

    python -m pipelines.zero     # the table of docs/training.md: what each profile needs for the published networks
"""

import fcntl
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cil.trainable import Trained
from pipelines.config import RowConfig
from pipelines.errors import UserError

PROFILES = Path(__file__).parents[1] / "infra" / "deepspeed"
BY_DEFAULT = ("zero-1", "zero-2", "zero-3", "zero-2-offload", "zero-3-offload")  # the fastest first
OURS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("fp16", "bf16", "optimizer", "scheduler", "steps_per_print"),
}
FREE = 0.6  # of a device's memory for what is counted here; activations take the rest
GIB = 2**30

Profile = dict[str, Any]


def profile_of(name: str) -> Profile:
    """One of infra/deepspeed by its name, or a file of the user's."""
    path = Path(name) if name.endswith(".json") else PROFILES / f"{name}.json"
    try:
        profile = json.loads(path.read_text())
    except FileNotFoundError:
        there = ", ".join(sorted(each.stem for each in PROFILES.glob("*.json")))
        raise UserError(f"finetune.deepspeed={name}: auto, one of {there}, or a .json file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"finetune.deepspeed={name}: {path} cannot be read ({error})") from None
    if not isinstance(profile, dict):
        raise UserError(f"finetune.deepspeed={name}: {path} holds no DeepSpeed configuration")
    if taken := sorted(OURS & profile.keys()):
        raise UserError(f"finetune.deepspeed={name}: {path} sets {', '.join(taken)}, which the row of the study says")
    return profile


def stage_of(profile: Profile) -> int:
    return int(profile.get("zero_optimization", {}).get("stage", 0))


def offloads(profile: Profile, what: str = "optimizer") -> bool:
    return profile.get("zero_optimization", {}).get(f"offload_{what}", {}).get("device", "none") != "none"


def bytes_a_rank(profile: Profile, trained: int, frozen: int, world: int, precision: str) -> float:
    """On the device: weights, gradients, Adam's moments, the float32 copy of the weights, and their average.

    Between the parts of a batch: `python -m benchmarks.zero` counts it. Buckets and activations come on top.
    """
    stage, low = stage_of(profile), 4 if precision == "float32" else 2
    weights = 0.0 if offloads(profile, "param") else low * (trained + frozen) / (world if stage == 3 else 1)
    gradients = low * trained / (world if stage >= 2 else 1)
    if stage == 0:
        return weights + gradients + trained * (8 + 4)
    return weights + gradients + (0.0 if offloads(profile) else trained * (4 + 8 + 4) / world)


def choose(trained: int, frozen: int, world: int, precision: str, memory: int | None) -> tuple[str, str]:
    """The fastest profile that fits into a device's memory (none: a CPU's), and why."""
    if memory is None:
        return BY_DEFAULT[0], "on CPUs nothing is gained by sharing out more"
    for name in BY_DEFAULT:
        wanted = bytes_a_rank(profile_of(name), trained, frozen, world, precision)
        if wanted <= FREE * memory:
            break
    told = (
        f"{(trained + frozen) / 1e6:,.0f} million parameters in {precision} on {world} workers take {wanted / GIB:.1f}"
    )
    return name, f"{told} GiB each of {memory / GIB:.0f} GiB, before activations"


def prepare(gpu: bool) -> None:
    """Before deepspeed is imported."""
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed looks for ninja on the PATH, and pip has put it beside this Python.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def engine_of(net: nn.Module, profile: Mapping[str, Any], row: RowConfig, micro_batch: int, world: int) -> Any:
    """A DeepSpeedEngine with AdamW: DeepSpeed's own where the state lies in CPU memory, else PyTorch's."""
    import deepspeed

    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    zero = dict(profile.get("zero_optimization", {}))
    # Copies gradients into one buffer, which spares a GPU fragmentation and costs a CPU 2 % of a step.
    zero.setdefault("contiguous_gradients", gpu)
    settings = {
        **profile,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": row.batch // world // micro_batch,
        "gradient_clipping": row.clip_norm if stage_of(dict(profile)) else 0.0,  # without ZeRO `step` clips
        "bf16": {"enabled": row.precision == "bfloat16"},
        "fp16": {"enabled": row.precision == "float16"},
        "steps_per_print": 10**9,
    }
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    told: dict[str, Any] = {"lr": row.lr, "weight_decay": row.weight_decay}
    if not gpu:
        _load("ShareMemCommBuilder")
    if offloads(dict(profile)):
        _load("CPUAdamBuilder")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: Any = DeepSpeedCPUAdam(trained, **told)
    else:
        optimizer = torch.optim.AdamW(trained, fused=gpu, **told)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    return engine


def _load(builder: str) -> None:
    """An operator of DeepSpeed's, compiled where nobody has yet.

    PyTorch's lock is a file: a process that is killed with it leaves it behind, and all later ones wait for ever. Ours
    falls with its process, and whoever has it knows that theirs is nobody's.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    made = get_accelerator().create_op_builder(builder)
    folder = Path(_get_build_directory(made.name, verbose=False))
    with (folder / "lock-of-cil").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        made.load(verbose=False)


def step(engine: Any, loss: Tensor, clip_norm: float) -> float:
    """Backward, and after a batch's last part the optimiser's step; answers the norm of all gradients."""
    engine.backward(loss)
    norm = None
    if not engine.zero_optimization_stage() and engine.is_gradient_accumulation_boundary():
        norm = nn.utils.clip_grad_norm_(engine.module.parameters(), clip_norm)
    engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    return float(norm or 0)


def shapes_of(net: nn.Module) -> dict[str, list[int]]:
    """Of what is trained: stage 3 leaves nothing of a parameter in its place."""
    trained = ((name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad)
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained}


def loss_scale(engine: Any) -> float | None:
    """float16's, which has found its size over many steps."""
    return float(engine.optimizer.loss_scaler.cur_scale) if engine.fp16_enabled() else None


def set_loss_scale(engine: Any, scale: float | None) -> None:
    if scale is not None:
        engine.optimizer.loss_scaler.cur_scale = scale


GPUS = (1, 8, 64)
PUBLISHED = {"dynamicrafter": "512", "videocrafter1": "512", "svd": "512", "i2vgenxl": "256"}
WAYS: tuple[Trained, ...] = ("full", "temporal", "lora")


def parameters_of(name: str, preset: str, way: Trained) -> tuple[int, int]:
    """Trained ones and frozen ones of a family's network, which is not made for it."""
    from cil import families
    from cil.trainable import freeze

    family = families.load(name, preset=preset)
    with torch.device("meta"):
        net = freeze(family.network(0), family, way)
    counts = [sum(p.numel() for p in net.parameters() if p.requires_grad == kind) for kind in (True, False)]
    return counts[0], counts[1]


def table() -> str:
    """GiB a GPU, for as many GPUs as GPUS says; ZeRO 0 in float32, the others in bfloat16."""
    kinds = {name: profile_of(name) for name in ("zero-0", *BY_DEFAULT)}
    lines = [f"| family, what is trained | million parameters | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for name, preset in PUBLISHED.items():
        for way in WAYS:
            trained, frozen = parameters_of(name, preset, way)
            cells = [f"{name}, {way}", f"{trained / 1e6:,.0f} of {(trained + frozen) / 1e6:,.0f}"]
            for profile in kinds.values():
                kind = "bfloat16" if stage_of(profile) else "float32"
                needs = (bytes_a_rank(profile, trained, frozen, gpus, kind) / GIB for gpus in GPUS)
                cells.append(" / ".join(f"{need:.1f}" for need in needs))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
