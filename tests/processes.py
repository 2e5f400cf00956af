"""Jobs and other processes of the tests: begun, waited for, ended; and what they leave."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def command(job: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{job}", *arguments]


def run(job: str, *arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(job, *arguments),
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@contextlib.contextmanager
def begun(job: str, *arguments: str, inside: Sequence[str] = (), **environment: str) -> Iterator[subprocess.Popen]:
    """What is still there of it at the end is killed: the job, and what its Ray has started."""
    process = subprocess.Popen(
        [*inside, *command(job, *arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """SIGKILL to a process and to all that it has started, unless it has ended: its number may be another's by then."""
    if process.poll() is None:
        for each in [*below(process, ""), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def until(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def finished(process: subprocess.Popen, seconds: float = 300) -> str:
    out, error = process.communicate(timeout=seconds)
    assert process.returncode == 0, error
    return out


def one_line(error: str) -> str:
    """Ray says of itself that its log has a level."""
    lines = [line for line in error.strip().splitlines() if "Set ray log level" not in line]
    assert len(lines) == 1, error
    return lines[0]


def below(process: subprocess.Popen, title: str) -> list[psutil.Process]:
    """The processes of that title which a job, or a node of a cluster, has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if title in " ".join(child.cmdline()):
                found.append(child)
    return found


def files(cache: Path) -> dict[str, bytes]:
    """All of them, hidden ones too; but for those that name the catalog's place and how long it took."""
    found = (file for file in cache.rglob("*") if file.is_file() and file.name not in ("config.json", "build.json"))
    return {str(file.relative_to(cache)): file.read_bytes() for file in found}


def telling(secret: str, folder: Path) -> list[Path]:
    """The files in which it stands, of those below a folder, of which there are some."""
    found = {}
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it has just gone
            if file.is_file():
                found[file] = secret.encode() in file.read_bytes()
    assert found
    return [file for file, tells in found.items() if tells]
