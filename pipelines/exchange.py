"""An all-reduce over the whole cluster, as a training makes one a step: it works or not, and at what bandwidth."""

import socket
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from typing import Any

BYTES = {"nccl": 256 * 2**20, "gloo": 16 * 2**20}
ROUNDS = 3


class Rank:
    """An actor."""

    def place(self) -> str:
        """Where the others may find this one, on Ray's own network."""
        import ray.util

        from pipelines.rendezvous import name_interface

        name_interface()
        address = ray.util.get_node_ip_address()
        with closing(socket.create_server((address, 0))) as free:
            return f"{address}:{free.getsockname()[1]}"

    def reduce(self, meeting: str, rank: int, world: int, backend: str, seconds: float) -> dict[str, Any]:
        """Bytes a second over the bus, as NCCL's own tests count them."""
        import torch
        import torch.distributed as dist

        device = _device(backend)
        limit = timedelta(seconds=seconds)
        dist.init_process_group(backend, f"tcp://{meeting}", rank=rank, world_size=world, timeout=limit)
        try:
            took = []
            for _ in range(1 + ROUNDS):  # the first one makes the connections
                sent = torch.full((BYTES[backend] // 4,), rank + 1.0, device=device)
                dist.barrier()
                _wait_for(device)
                begin = time.monotonic()
                dist.all_reduce(sent)
                _wait_for(device)
                took.append(time.monotonic() - begin)
                if not bool((sent == world * (world + 1) / 2).all()):
                    raise RuntimeError(f"rank {rank} was given a wrong sum: a network or a GPU that is ill")
        finally:
            dist.destroy_process_group()
        return {"bandwidth": 2 * (world - 1) / world * BYTES[backend] / min(took[1:])}


def _device(backend: str) -> Any:
    import torch

    if backend != "nccl":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU where Ray has one: a build for CPUs, or for a newer driver")
    return torch.device("cuda")


def _wait_for(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def all_reduce(nodes: Sequence[str], gpu: bool, seconds: float) -> float:
    """A rank on each of these nodes of Ray's, which may stand there several times. Answers bytes a second."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    backend = "nccl" if gpu else "gloo"
    actor = ray.remote(num_cpus=0, num_gpus=int(gpu))(Rank)
    ranks: list[Any] = [
        actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    try:
        places = [rank.place.remote() for rank in ranks]
        here, _ = ray.wait(places, num_returns=len(places), timeout=seconds)
        if len(here) < len(places):
            why = "GPUs that others use, or a node that starts no process" if gpu else "a node that starts no process"
            raise TimeoutError(
                f"{len(places) - len(here)} of {len(places)} ranks did not start in {seconds:g} s: {why}"
            )
        meeting = ray.get(places)[0]
        made = [r.reduce.remote(meeting, i, len(ranks), backend, seconds) for i, r in enumerate(ranks)]
        done, late = ray.wait(made, num_returns=len(made), timeout=2 * seconds)
        ray.get(done)  # what went wrong, rather than who still waits for it
        if late:
            raise TimeoutError(f"{len(late)} of {len(made)} ranks still wait after {2 * seconds:g} s")
        return float(min(answer["bandwidth"] for answer in ray.get(made)))
    finally:
        for rank in ranks:
            ray.kill(rank)
