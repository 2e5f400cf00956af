"""What a node says of itself when jobs.doctor asks. Everything here runs on the node, in one task of Ray's.

Each question is answered in a thread of its own: one that crashes or hangs costs its own answer alone.
"""

import hashlib
import os
import posixpath
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import artifact, storage
from pipelines.config import Config
from pipelines.errors import shown

PROBE = 8 * 2**20  # bytes that are written, read and removed
OURS = ("cil", "pipelines", "jobs")

Answer = Mapping[str, Any]  # {"is": ...}, or {"problem": "..."}


def answers(config: Config, places: Mapping[str, str], gpu: bool, seconds: float) -> dict[str, Answer]:
    """Of all that a node is asked. `places`: URIs that the configuration names, by their keys."""
    questions: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "code": code,
        "deepspeed": lambda: deepspeed(gpu),
        "gpus": gpus,
        "machine": lambda: machine(config),
        "tracking": lambda: reach_tracking(config),
    }
    questions |= {key: partial(seen, uri) for key, uri in places.items()}
    known = in_time(questions, seconds)
    # By itself, as it is measured.
    known |= in_time({"out": lambda: probe(config.out)}, seconds)
    return known | {"time": {"is": time.time()}}


def in_time(questions: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Answer]:
    found: dict[str, Answer] = {}

    def ask(name: str, question: Callable[[], Any]) -> None:
        try:
            found[name] = {"is": question()}
        except BaseException as error:  # whatever it is, it is what was found
            found[name] = {"problem": said(error)}

    threads = [threading.Thread(target=ask, args=each, daemon=True) for each in questions.items()]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    return {name: found.get(name, {"problem": f"no answer in {seconds:g} s"}) for name in questions}


def said(error: BaseException) -> str:
    told = " ".join(str(error).split())[:300]
    plain = isinstance(error, OSError) or type(error).__module__ == "pipelines.errors"
    return shown(told if plain and told else f"{type(error).__name__}: {told}")


def versions() -> dict[str, str]:
    import torch

    told = {"python": sys.version.split()[0]} | artifact.versions() | {"cuda": torch.version.cuda or "none"}
    told["torch"] = told["torch"].partition("+")[0]  # the same for CPUs and for CUDA
    if torch.version.cuda and torch.distributed.is_nccl_available():
        told["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return told


def code() -> str:
    """A digest of our own files, as this node would import them."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(file for name in OURS for file in (root / name).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def deepspeed(gpu: bool) -> str:
    """Imports it; on CPUs its operator is compiled when a training begins, but where that was done with DeepSpeed."""
    from pipelines import zero

    found = zero.import_deepspeed(gpu)
    from deepspeed.git_version_info import installed_ops

    compiled = installed_ops.get("deepspeed_shm_comm", False)  # as infra/install.sh has it
    if not gpu and not compiled and (missing := [tool for tool in ("g++", "ninja") if not shutil.which(tool)]):
        raise FileNotFoundError(f"{' and '.join(missing)} missing, with which DeepSpeed builds its operator for CPUs")
    return str(found.__version__)


def gpus() -> list[dict[str, Any]]:
    """By the driver, as Ray shows none of them to a task that asks for none."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # there is no driver
    found = []
    for i in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(i)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        found.append({"name": pynvml.nvmlDeviceGetName(handle), "memory": memory.total, "used": memory.used})
    return found


def machine(config: Config) -> dict[str, Any]:
    import psutil
    import ray

    here: Any = ray._private.worker._global_node  # Ray has no public name for it
    folders = {"Ray's temporary files": here.get_session_dir_path(), "kept downloads": str(storage.downloads())}
    if storage.is_local(config.out):
        folders["out"] = config.out
    memory, shared = psutil.virtual_memory(), shutil.disk_usage("/dev/shm")
    return {
        "cpus": os.cpu_count(),
        "memory": memory.total,
        "free_memory": memory.available,
        "shared_memory": shared.total,
        "disks": {name: _disk(Path(folder)) for name, folder in folders.items()},
    }


def _disk(folder: Path) -> dict[str, Any]:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(there)
    return {"folder": str(folder), "free": usage.free, "total": usage.total}


def reach_tracking(config: Config) -> None:
    """A training's first worker tells MLflow, on whichever node it is."""
    from pipelines.tracking import refuse_silent

    if config.tracking.uri:
        refuse_silent(config)


def seen(uri: str) -> bool:
    return bool(storage.glob(uri))


def probe(out: str) -> dict[str, float]:
    """Bytes a second, written and read: what every job does under `out`."""
    uri, data = storage.join(out, f".unfinished-probe-{uuid.uuid4().hex}"), os.urandom(PROBE)
    doing, begin = "written to", time.monotonic()
    try:
        storage.write(uri, data)
        written = time.monotonic()
        doing = "read"
        try:
            there = storage.read(uri)
        except OSError:
            with suppress(OSError):
                storage.remove(uri)
            raise
        read = time.monotonic()
        doing = "removed from"
        storage.remove(uri)
    except OSError as error:
        raise OSError(f"a file cannot be {doing}: {said(error)}") from None
    if there != data:
        raise OSError(f"{posixpath.basename(uri)} has other bytes than were written")
    return {"write": PROBE / (written - begin), "read": PROBE / (read - written)}
