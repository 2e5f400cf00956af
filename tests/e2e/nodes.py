"""Two machines for the nodes of a Ray cluster: network namespaces with a cable between them, in one real machine.

Where none may be made (no root, no `ip`), two addresses of the loopback device: they cannot be cut off from each other.
"""

import contextlib
import os
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import BIN, ROOT, below, end, free_port, until

from pipelines.video import encode


@dataclass(frozen=True)
class Machine:
    address: str
    namespace: str = ""  # none: this machine's own

    @property
    def inside(self) -> list[str]:
        """What stands before a command that is to run there."""
        return ["ip", "netns", "exec", self.namespace] if self.namespace else []

    def cut_off(self, cut: bool = True) -> None:
        if not self.namespace:
            pytest.skip("no network namespace may be made here: a node cannot be cut off")
        _ip("-n", self.namespace, "link", "set", CABLE, "down" if cut else "up")


CABLE = "cable"  # its name at both ends


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    names = [f"cil-{os.getpid()}-{side}" for side in "ab"]
    machines = Machine("10.79.0.1", names[0]), Machine("10.79.0.2", names[1])
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
            for machine in machines:
                _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", CABLE)
                for device in ("lo", CABLE):
                    _ip("-n", machine.namespace, "link", "set", device, "up")
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            warnings.warn(
                f"both nodes on the loopback device, as no network namespace may be made: {said}", stacklevel=1
            )
            machines = Machine("127.0.0.2"), Machine("127.0.0.3")
        yield machines
    finally:
        for name in names:
            with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
                for pid in _ip("netns", "pids", name).split():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        psutil.Process(int(pid)).kill()
                _ip("netns", "delete", name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def cluster_environment(home: Path, machine: Machine) -> dict[str, str]:
    """Of the nodes of a cluster that begins on this machine, and of the jobs on it: with a home for its token, this
    Python first on the path, and nodes that are missed at once."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    missed = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2"}
    there = {"RAY_ADDRESS": f"{machine.address}:{free_port()}", "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
    made = kept | missed | there | {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=made, check=True, capture_output=True)
    return made


@contextlib.contextmanager
def first_node(
    machine: Machine,
    environment: dict[str, str],
    *options: str,
    cpus: int = 1,
    dashboard: int | None = None,
    sessions: Path | None = None,
    apart: bool = False,
) -> Iterator[subprocess.Popen]:
    """The one that the cluster begins with. `dashboard`: the port of one. `sessions`: where Ray keeps what it says."""
    port = environment["RAY_ADDRESS"].split(":")[1]
    made = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # short: Ray's sockets stand in it
    with contextlib.nullcontext(sessions) if sessions else made as folder:
        head = ["--head", f"--port={port}", f"--temp-dir={folder}", f"--include-dashboard={dashboard is not None}"]
        if dashboard is not None:
            head.append(f"--dashboard-port={dashboard}")
        with _node(machine, environment, *head, *options, cpus=cpus, apart=apart) as process:
            yield process


@contextlib.contextmanager
def another_node(
    machine: Machine, environment: dict[str, str], *options: str, hidden: str = "", apart: bool = False
) -> Iterator[subprocess.Popen]:
    """`hidden`: a folder which it sees empty."""
    there = f"--address={environment['RAY_ADDRESS']}"
    with _node(machine, environment, there, *options, hidden=hidden, apart=apart) as process:
        yield process


@contextlib.contextmanager
def _node(
    machine: Machine, environment: dict[str, str], *options: str, cpus: int = 1, hidden: str = "", apart: bool = False
) -> Iterator[subprocess.Popen]:
    """`apart`: neither sees the processes of the other, as on machines of their own; see `on`."""
    command = [str(BIN / "ray"), "start", "--block", f"--num-cpus={cpus}", "--disable-usage-stats"]
    command += [f"--node-ip-address={machine.address}", f"--dashboard-agent-listen-port={free_port()}"]
    if hidden:
        mount = 'mount -t tmpfs none "$0" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, hidden, *command]
    if apart:
        command = ["unshare", "--pid", "--fork", "--mount-proc", *command]
    for attempts_left in (2, 1, 0):  # Ray gives a node 30 s to start, and its agent 15 s, which is little on busy cores
        process = subprocess.Popen(
            [*machine.inside, *command, *options],
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "Ray runtime started" in line:
                    yield process
                    return
        finally:
            end(process)
        if not attempts_left:
            pytest.fail(f"ray start ended:\n{''.join(said)}")


def on(node: subprocess.Popen) -> list[str]:
    """What stands before a command that is to run on that node, which is `apart`, and to end when it is lost."""
    (first,) = psutil.Process(node.pid).children()
    return ["nsenter", f"--target={first.pid}", "--net", "--mount", "--pid", f"--wd={ROOT}"]


@contextlib.contextmanager
def held(process: subprocess.Popen, title: str = "MapWorker") -> Iterator[None]:
    """The workers of a node stand still, so that what is made meanwhile is made by another node's, or is not made."""
    workers = list[psutil.Process]()
    until(lambda: workers.extend(below(process, title)) or workers, 120)
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()


def of_small_videos(folder: Path, number: int) -> list[str]:
    """Arguments of a job, with videos that are made here; every twentieth is none."""
    random, names = np.random.default_rng(0), [f"video-{i}" for i in range(number)]
    for i, name in enumerate(names):
        frames = random.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        (folder / f"{name}.mp4").write_bytes(encode(frames, 8) if i % 20 else b"no video")
    (folder / "videos.csv").write_text("videoid,name\n" + "".join(f"{name},caption of {name}\n" for name in names))
    catalog = [f"catalog.csv={folder}/videos.csv", f"catalog.videos={folder}"]
    return ["--config", "tests/smallest.yaml", *catalog, "cache.stride=1"]
