"""How long training stands still for a checkpoint of 512 MB that goes to an S3 endpoint of 50 MB/s.

    python -m benchmarks.checkpoint

The state is that of an MLP of 32 million parameters under DeepSpeed ZeRO-1 in one process: weights, both moments and
their average. The peer is a copy of the same tensors in memory, into memory that was used before as ours is, and a
barrier. The checkpoint is then awaited, read again and compared; how much slower steps are meanwhile has no goal.
"""

import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks import Row, main, paired
from benchmarks.endpoint import served
from pipelines import checkpoints, zero
from pipelines.checkpoints import Stored, Writer
from pipelines.config import RowConfig
from pipelines.shards import Shards

WIDTH = 2048
RATE = 50e6


def measure(quick: bool) -> list[Row]:
    import torch.distributed as dist

    layers, rounds = (2, 2) if quick else (8, 4)
    zero.import_deepspeed(gpu=False)
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= told
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        row = RowConfig(batch=4)
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        engine = zero.engine_of(net, zero.profile_of("zero-1"), row, 4, 1)
        shards = Shards(engine)
        size = 4 * sum(tensor.numel() for one in shards.ranges for tensor in one.tensors.values())
        kept = {(one.name, kind): tensor.clone() for one in shards.ranges for kind, tensor in one.tensors.items()}
        with served(folder, rate=RATE):
            writer = Writer("s3://all/training", shards, keep=99)
            saved = iter(range(1, 100))

            def ours() -> None:
                writer.save(next(saved), {"shapes": zero.shapes_of(net), "validation_loss": None})

            def copy() -> None:
                for one in shards.ranges:
                    for kind, tensor in one.tensors.items():
                        kept[one.name, kind].copy_(tensor)
                dist.barrier()

            before = _seconds_a_step(engine, row)
            stalls, copies, during = [], [], []
            for number in range(rounds + 1):
                stall, copied = _timed(ours), _timed(copy)
                during.append(_seconds_a_step(engine, row))
                begin = time.perf_counter()
                writer.wait()
                if number:  # the first one takes its memory
                    stalls.append(stall)
                    copies.append(copied)
            sent = time.perf_counter() - begin
            ours()
            writer.wait()
            copy()
            stored = Stored(checkpoints.found("s3://all/training")[-1])
            assert all(torch.equal(stored[one.name].flatten(), kept[one.name, "weights"]) for one in shards.ranges)
        dist.destroy_process_group()
    name = f"checkpoint of {size / 1e6:.0f} MB to 50 MB/s"
    return [
        Row(f"{name}: standing still", median(stalls), median(copies), None, "s", paired(copies, stalls), 1 / 1.5),
        Row(f"{name}: a step meanwhile", median(during), before, before, "s", before / median(during)),
        Row(f"{name}: until it is whole", sent, size / RATE, size / RATE, "s", size / RATE / sent),
    ]


def _timed(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _seconds_a_step(engine: Any, row: RowConfig) -> float:
    x = torch.randn(row.batch, WIDTH)

    def step() -> None:
        zero.step(engine, engine(x).square().mean(), row.clip_norm)

    return median(_timed(step) for _ in range(5))


if __name__ == "__main__":
    main(__doc__, measure)
