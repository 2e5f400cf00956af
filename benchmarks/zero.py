"""What each rank holds of parameters, gradients, Adam's state and averages, for every ZeRO stage, against the theory.

    python -m benchmarks.zero

Two ranks on CPUs (gloo, no Ray) train an MLP of 50 million parameters with the engine and the shards of jobs.finetune,
and no parameter is small enough to stay whole (stage3_param_persistence_threshold 0). After each of the two backward
passes of a step, every storage is counted of which a tensor is alive, whoever holds it; the larger count is ours. The
peer is theory, `pipelines.memory.bytes_a_rank`, by which jobs.finetune chooses a profile. Neither should be above the
other, so the ratio is the lesser of ours / peer and peer / ours.
"""

import gc
import json
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks import Row, main
from pipelines import memory, zero
from pipelines.config import RowConfig

WORLD = 2
STAGES = (0, 1, 2, 3)
PRECISIONS = ("float32", "bfloat16")
WIDTHS = {True: 512, False: 2048}  # by --quick
LAYERS = 12
BATCH = 2
PASSES = 2  # of a step: ZeRO 1 holds whole gradients between them


def measure(quick: bool) -> list[Row]:
    jobs = [(stage, kind) for kind in PRECISIONS for stage in STAGES if stage or kind == "float32"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        mp.start_processes(_rank, (port, jobs, WIDTHS[quick], folder), WORLD, start_method="spawn")
        held = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
    trained = sum(p.numel() for p in _net(WIDTHS[quick], "meta").parameters())
    rows = []
    for i, (stage, kind) in enumerate(jobs):
        ours = max(each[i] for each in held) / 1e6
        theory = memory.bytes_a_rank(_profile(stage), trained, 0, WORLD, kind) / 1e6
        agree = min(ours / theory, theory / ours)
        rows.append(Row(f"zero: theory, stage {stage}, {kind}", ours, theory, None, "MB a rank", agree, 0.9))
    return rows


def _profile(stage: int) -> zero.Profile:
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}


def _net(width: int, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.SiLU())))


def _rank(rank: int, port: int, jobs: list[tuple[int, str]], width: int, folder: str) -> None:
    told = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    os.dup2(2, 1)  # DeepSpeed prints, and stdout is for the rows
    torch.set_num_threads(1)
    zero.import_deepspeed(gpu=False)
    import torch.distributed as dist

    dist.init_process_group("gloo")
    held = [_held(stage, kind, width) for stage, kind in jobs]
    Path(folder, f"{rank}.json").write_text(json.dumps(held))
    dist.destroy_process_group()


def _held(stage: int, kind: str, width: int) -> int:
    """Bytes, at most, in the second step: by then all that training makes has been made."""
    from pipelines.shards import Shards

    before = _storages()
    row = RowConfig.model_validate({"batch": WORLD * BATCH * PASSES, "precision": kind})
    engine = zero.engine_of(_net(width), _profile(stage), row, BATCH, WORLD)
    shards = Shards(engine)
    x = torch.ones(BATCH, width, dtype=getattr(torch, kind))
    counts = []
    for _ in range(2 * PASSES):
        engine.backward(engine(x).float().square().mean())
        counts.append(sum(size for place, size in _storages().items() if place not in before))
        engine.step()
    shards.average(0.9)
    engine.destroy()
    return max(counts[-PASSES:])


def _storages() -> dict[int, int]:
    """Bytes by address, of all tensors that are alive."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.layout == torch.strided]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    storages = (each.untyped_storage() for each in tensors if each.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


if __name__ == "__main__":
    main(__doc__, measure)
