"""The Ray cluster of a job: the one that RAY_ADDRESS names (a submitted job's), or one started on this machine."""

import logging
import os

from pipelines.errors import UserError


def connect() -> None:
    """Once a process; a second call finds the first one's."""
    import ray

    if ray.is_initialized():
        return
    # The backend's log lines would stand between ours; what goes wrong in a task reaches us as an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    root = os.getcwd()
    # Workers import the same code as the driver.
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Never a cluster that somebody else left on this machine, unless RAY_ADDRESS says so.
    address = os.environ.get("RAY_ADDRESS", "local")
    environment = {"env_vars": {"PYTHONPATH": path}}
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    data.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def workers(gpus: float = 0) -> int:
    """How many the cluster has room for, of a CPU each, and of such a share of a GPU."""
    import ray

    have = ray.cluster_resources()
    if gpus and not have.get("GPU", 0) >= gpus:
        raise UserError(f"cache.gpus={gpus}: the cluster has {have.get('GPU', 0):g} GPUs; 0 encodes on CPUs")
    if not gpus:
        return int(have.get("CPU", 1))
    if not ray.get(ray.remote(num_gpus=gpus)(_sees_gpu).remote()):
        raise UserError(
            f"cache.gpus={gpus}: PyTorch sees no GPU where Ray has one (a build for CPUs, or for another driver?); "
            "0 encodes on CPUs"
        )
    return int(min(int(have["GPU"]) * int(1 / gpus), have.get("CPU", 1)))  # no worker has parts of two GPUs


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def refuse_unplaceable(workers: int, gpu: bool) -> None:
    """More workers than the cluster has resources for would wait for ever."""
    import ray

    resource = "GPU" if gpu else "CPU"
    have = int(ray.cluster_resources().get(resource, 0))
    if workers > have:
        raise UserError(f"finetune.workers={workers}: the cluster has {have} {resource}s; set fewer, or add nodes")


def refuse_local_store(uri: str) -> None:
    """A SQLite file cannot be written from several nodes."""
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and uri.startswith("sqlite:"):
        raise UserError(f"tracking.uri={uri}: {nodes} nodes cannot share a SQLite store; name an MLflow server")
