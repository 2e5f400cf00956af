"""The Ray cluster of a job: the one that RAY_ADDRESS names (a submitted job's), or one started on this machine."""

import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterable
from typing import Any

from pipelines import storage
from pipelines.errors import Unfinished, UserError

DOES = {"cache.gpus": "encodes", "generate.gpus": "samples", "score.gpus": "scores"}
PROBE_SECONDS = 60  # for a node to start a process and look at a file


def connect() -> None:
    """Once a process; a second call finds the first one's."""
    import ray

    if ray.is_initialized():
        return
    # The backend's log lines would stand between ours; what goes wrong in a task reaches us as an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Never a cluster that somebody else left on this machine, unless RAY_ADDRESS says so.
    address = os.environ.get("RAY_ADDRESS", "local")
    options: dict[str, Any]
    if address == "local":
        _keep_small()
        # No dashboard: it is a dozen processes, which would compete with a short job. No runtime environment: workers
        # have this process's folder and environment without it, and those that Ray starts ahead can be used.
        options = {"include_dashboard": False}
    else:  # workers import the same code as the driver
        path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
        options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    stopped = signal.getsignal(signal.SIGTERM)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stopped or signal.SIG_DFL)  # Ray puts its own there
    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    data.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _keep_small() -> None:
    """The Ray that this process will start is of this machine, and of one job."""
    from ray._private import ray_constants
    from ray._private.node import Node

    # As Ray does it on a Mac: else whoever reaches the machine reaches a dozen ports.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # The autoscaler, and who gathers logs for drivers, have nothing to do, and cost each job two seconds or more. What
    # include_dashboard=False leaves of a dashboard must stay: else a training took ten seconds more (docs/log.md).
    for start in ("start_monitor", "start_log_monitor"):
        setattr(Node, start, lambda *_, **__: None)


def workers(gpus: float = 0, key: str = "cache.gpus") -> int:
    """How many the cluster has room for, of a CPU each, and of such a share of a GPU, for which `key` asks."""
    import ray

    have = ray.cluster_resources()
    if gpus and not have.get("GPU", 0) >= gpus:
        raise UserError(f"{key}={gpus}: the cluster has {have.get('GPU', 0):g} GPUs; 0 {DOES[key]} on CPUs")
    if not gpus:
        return int(have.get("CPU", 1))
    if not ray.get(ray.remote(num_gpus=gpus)(_sees_gpu).remote()):
        raise UserError(
            f"{key}={gpus}: PyTorch sees no GPU where Ray has one (a build for CPUs, or for another driver?); "
            f"0 {DOES[key]} on CPUs"
        )
    return int(min(int(have["GPU"]) * int(1 / gpus), have.get("CPU", 1)))  # no worker has parts of two GPUs


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def gpu_memory() -> int:
    """Bytes of a GPU of the cluster."""
    import ray

    @ray.remote(num_gpus=1)
    def ask() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)

    return int(ray.get(ask.remote()))


def refuse_unplaceable(workers: int, gpu: bool) -> None:
    """More workers than the cluster has resources for would wait for ever."""
    import ray

    resource = "GPU" if gpu else "CPU"
    have = int(ray.cluster_resources().get(resource, 0))
    if workers > have:
        raise UserError(f"finetune.workers={workers}: the cluster has {have} {resource}s; set fewer, or add nodes")


def unplaced(workers: int, gpu: bool) -> str:
    """Which workers of this job wait for others to go, or for nodes to come; nothing where they have their places."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # the ids of what it has asked for end with it
    resource = "GPU" if gpu else "CPU"
    have, free = (int(each.get(resource, 0)) for each in (ray.cluster_resources(), ray.available_resources()))
    placed = any(id.endswith(job) and each["state"] == "CREATED" for id, each in placement_group_table().items())
    if placed or free >= workers:
        return ""
    told = f"{workers} workers of 1 {resource} each: the cluster has {have} {resource}{'s' * (have != 1)}"
    return told if have < workers else f"{told}, {free} of them free"


def refuse_local_store(uri: str) -> None:
    """A SQLite file cannot be written from several nodes."""
    nodes = len(_nodes())
    if nodes > 1 and uri.startswith("sqlite:"):
        raise UserError(f"tracking.uri={uri}: {nodes} nodes cannot share a SQLite store; name an MLflow server")


def refuse_unshared(folder: str) -> None:
    """Where several nodes write to a local folder, each must see what the others have written there."""
    if not storage.is_local(folder) or len(_nodes()) < 2:
        return
    probe = storage.join(folder, f".unfinished-probe-{uuid.uuid4().hex}")
    storage.write(probe, b"")
    try:
        refuse_unseen([probe])
    finally:
        storage.remove(probe)


def refuse_unseen(files: Iterable[str]) -> None:
    """Local files that are here, and that workers on every node are to read."""
    import ray
    from ray import exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _nodes()
    if len(nodes) < 2 or not (here := list(files)):
        return
    look = ray.remote(num_cpus=0)(_unseen)  # a node that is busy, or takes no work, answers too
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(here): address
        for node, address in nodes.items()
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
    unseen: dict[str, list[str]] = {}
    silent: list[str] = []
    for answer, address in asked.items():
        try:
            if missing := ray.get(answer, timeout=0):
                unseen[address] = missing
        except (exceptions.GetTimeoutError, exceptions.NodeDiedError, exceptions.TaskUnschedulableError):
            silent.append(address)
    if unseen:
        folder = os.path.dirname(next(iter(unseen.values()))[0])
        raise UserError(
            f"{folder}: the nodes {_listed(unseen)} do not see the files in it; on several nodes a local path must be "
            "a folder that all of them share; mount one there, or name an s3:// prefix"
        )
    if silent:
        raise Unfinished(
            f"{_listed(silent)}: these nodes are lost, or did not say in {PROBE_SECONDS} s whether they see {here[0]}; "
            "run the same command again when the cluster is well"
        )


def _unseen(files: list[str]) -> list[str]:
    return [file for file in files if not storage.exists(file)]


def _nodes() -> dict[str, str]:
    """Those that are alive, with their addresses."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _listed(addresses: Iterable[str]) -> str:
    return ", ".join(sorted(addresses))
