"""DeepSpeed: the profiles of infra/deepspeed, and the engine of a training.

A profile is a DeepSpeed configuration without what the study says (batch, precision, clipping). Stage 0 keeps all on
every rank, 1 shares out the optimiser's state, 2 also gradients, 3 also weights; `offload` moves them to CPU memory.
"""

import fcntl
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.config import RowConfig
from pipelines.errors import UserError

PROFILES = Path(__file__).parents[1] / "infra" / "deepspeed"
OURS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("fp16", "bf16", "optimizer", "scheduler", "steps_per_print"),
}

Profile = Mapping[str, Any]


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
    told: str = profile.get("zero_optimization", {}).get(f"offload_{what}", {}).get("device", "none")
    return told != "none"


def import_deepspeed(gpu: bool) -> ModuleType:
    """As it is used here, before all other use of it. Meanwhile no other thread can import MLflow."""
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        # Operators are compiled once for a virtual environment, whatever the home and whoever else's are there.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    # DeepSpeed looks for ninja on the PATH, and pip has put it beside this Python.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled here, but its Muon loads the compiler
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its autotuner wants MLflow if it is there, which takes four fifths of the import, and is not used.
    hidden = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
    try:
        import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    module: ModuleType = deepspeed
    return module


def engine_of(net: nn.Module, profile: Profile, row: RowConfig, micro_batch: int, world: int) -> Any:
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
        "gradient_clipping": row.clip_norm if stage_of(profile) else 0.0,  # without ZeRO `step` clips
        "bf16": {"enabled": row.precision == "bfloat16"},
        "fp16": {"enabled": row.precision == "float16"},
        "steps_per_print": 10**9,
    }
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    told: dict[str, Any] = {"lr": row.lr, "weight_decay": row.weight_decay}
    if not gpu:
        load_operator("ShareMemCommBuilder")
    if offloads(profile):
        load_operator("CPUAdamBuilder")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: Any = DeepSpeedCPUAdam(trained, **told)
    else:
        optimizer = torch.optim.AdamW(trained, fused=gpu, **told)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    return engine


def load_operator(builder: str) -> None:
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
    whole, norm = engine.is_gradient_accumulation_boundary(), None
    if whole and not engine.zero_optimization_stage():
        norm = nn.utils.clip_grad_norm_(engine.module.parameters(), clip_norm)
    engine.step()
    if not whole:
        return 0.0
    norm = engine.get_global_grad_norm() if norm is None else norm
    if norm is None:
        raise UserError("finetune.deepspeed: a profile without the norm of gradients cannot tell NaN")
    return float(norm)


def shapes_of(net: nn.Module) -> dict[str, list[int]]:
    """Of what is trained: stage 3 leaves nothing of a parameter in its place."""
    trained = ((name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad)
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained}


LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter")  # float16's, which has found its size over many steps


def loss_scale(engine: Any) -> dict[str, float]:
    scaler = engine.optimizer.loss_scaler if engine.fp16_enabled() else None
    return {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}


def set_loss_scale(engine: Any, told: dict[str, float]) -> None:
    for name, value in told.items():
        setattr(engine.optimizer.loss_scaler, name, value)
