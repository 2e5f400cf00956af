"""An MLflow server of the tests."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

LOOK = "import sys; from urllib.request import urlopen; urlopen(sys.argv[1], timeout=1)"


class Server:
    """`mlflow server` on one port, with one store, however often it is started.

    `inside`: what stands before a command that is to run on its machine, as nodes.Machine has it.
    """

    def __init__(self, folder: Path, port: int, host: str = "127.0.0.1", inside: Sequence[str] = ()) -> None:
        self.uri, self.inside = f"http://{host}:{port}", inside
        options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
        options += ["--host", host, "--port", str(port), "--allowed-hosts", f"{host}:{port}", "--workers", "1"]
        self.command = [*inside, sys.executable, "-m", "mlflow", "server", *options]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        alone = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # or there are a dozen processes
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, start_new_session=True, env=alone, **quiet)
        until(self.answers)

    def answers(self) -> bool:
        if not self.inside:  # this machine's network is ours: no process has to look
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
            return False
        look = [*self.inside, sys.executable, "-c", LOOK, f"{self.uri}/health"]
        return subprocess.run(look, stderr=subprocess.DEVNULL).returncode == 0

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
