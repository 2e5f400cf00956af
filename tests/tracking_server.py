"""An MLflow server of the tests, and what a store has of a training."""

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from processes import until

from pipelines.config import Config
from pipelines.tracking import runs, store_uri

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
        assert self.process.poll() is None, f"{self.command}: it has ended"
        if not self.inside:  # this machine's network is ours: no process has to look
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
            return False
        look = [*self.inside, sys.executable, "-c", LOOK, f"{self.uri}/health"]
        return subprocess.run(look, stderr=subprocess.DEVNULL).returncode == 0

    def send(self, sign: signal.Signals) -> None:
        os.killpg(self.process.pid, sign)

    def kill(self) -> None:
        if self.process:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None


def curve(config: Config) -> list[tuple[int, float]]:
    """The losses of a study's only training, as the store in its folder has them."""
    (run,) = runs(config, "train")
    return [(m.step, m.value) for m in MlflowClient(store_uri(config)).get_metric_history(run.info.run_id, "loss")]
