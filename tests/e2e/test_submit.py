"""`ray job submit` to a cluster of its own, with Ray's token authentication left on."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.artifact import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """A home of its own, so that the token is this cluster's, and this Python first on the path."""
    home = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="module")
def cluster(environment) -> Iterator[str]:
    """The address of the dashboard of a head node."""
    folder = tempfile.mkdtemp(prefix="ray")  # short: Ray's sockets stand in it
    # Ports of its own: another Ray of this machine may have the usual ones.
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port()}
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]
    subprocess.run(
        [BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    head = subprocess.Popen(
        [*command, *(f"--{name}={port}" for name, port in ports.items())],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in head.stdout:
        if "Ray runtime started" in line:
            break
    else:
        pytest.fail("ray start ended")
    yield f"http://127.0.0.1:{dashboard}"
    head.terminate()
    try:
        head.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def submit(cluster: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [
        BIN / "ray",
        "job",
        "submit",
        "--address",
        cluster,
        "--working-dir",
        ".",
        "--",
        "python",
        "-m",
        *arguments,
    ]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        # A head node takes jobs some seconds after it says that it has started.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done


def test_the_cluster_refuses_those_who_have_no_token(cluster):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{cluster}/api/jobs/", timeout=10)
    assert error.value.code == 401


def test_a_relative_folder_would_be_lost_with_the_job_and_is_refused(cluster, environment):
    done = submit(cluster, environment, "jobs.make_shapes", "out=relative")
    assert done.returncode != 0
    assert "out=relative: in a submitted job it must be an absolute path" in done.stdout


def test_the_data_cache_and_training_jobs_run_when_submitted(cluster, environment, tmp_path):
    """With the same configuration file that a laptop uses."""
    configuration = ["--config", "tests/smallest.yaml", f"out={tmp_path}", "compare.claims=[]"]
    configuration += ["generate.rows={}"]
    configuration += ["finetune.rows={base: {weights: null, seeds: [0], samples: 64, where: {}}}"]
    for job in ("make_shapes", "build_cache", "finetune"):
        done = submit(cluster, environment, f"jobs.{job}", *configuration)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (snapshot,) = (tmp_path / "cache/snapshots").iterdir()
    assert read_manifest(str(snapshot), "snapshot").counts["clips"] == 339
    counts = read_manifest(f"{tmp_path}/weights/base", "weights").counts
    assert (counts["samples"], counts["steps"], counts["skipped_batches"]) == (64, 8, 0)
