"""A latent cache and a training when the head of the cluster is lost, whose GCS keeps what it knows in a Redis.

Where the driver is decides what that costs. A head node does not outlive its GCS: what ran on it is gone, a driver too,
and the same command goes on. Nodes and drivers elsewhere wait for the next head.
"""

import contextlib
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from nodes import Machine, another_node, cluster_environment, first_node, held, of_small_videos, on, two_machines
from processes import BIN, ROOT, begun, below, end, files, finished, free_port, until
from tracking_server import Server, curve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PASSWORD = secrets.token_hex(8)
ELSEWHERE = '--resources={"elsewhere": 1}'  # by which a job asks for the node that is not the head
TRAINING = (
    *("finetune.workers=2", "finetune.checkpoint_every=160", "finetune.max_failures=1"),
    "finetune.rows={base: {weights: null, seeds: [0], where: {}, samples: 1600, lr: 2.0e-3}}",
    *("generate.rows={}", "compare.claims=[]"),
)


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    if not shutil.which("redis-server"):
        pytest.skip("there is no redis-server (apt-get install redis-server): a GCS has nowhere to keep what it knows")
    with two_machines() as made:
        if not made[0].namespace:
            pytest.skip("no network namespace may be made here: both nodes would be one machine")
        yield made


@pytest.fixture(scope="module")
def redis(machines, tmp_path_factory) -> Iterator[str]:
    """The address of one beside the head, which outlives it."""
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", PASSWORD, "--save", "", "--dir", folder]
    command = [*machines[0].inside, "redis-server", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: "Ready to accept connections" in process.stdout.readline(), 20)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def environment(machines, tmp_path_factory) -> dict[str, str]:
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "300"}  # of nodes and drivers; 60 by default
    return cluster_environment(tmp_path_factory.mktemp("home"), machines[0]) | patience


class Cluster:
    """Of two nodes, one CPU each. The first is the head, which is lost and started anew; the other one stays."""

    def __init__(self, machines: tuple[Machine, Machine], environment: dict[str, str], redis: str) -> None:
        self.machines, self.environment, self.redis = machines, environment, redis
        self.nodes, self.jobs = contextlib.ExitStack(), contextlib.ExitStack()
        self.dashboard = free_port()

    def start_head(self) -> None:
        kept = self.environment | {"RAY_REDIS_ADDRESS": self.redis}
        node = first_node(self.machines[0], kept, f"--redis-password={PASSWORD}", dashboard=self.dashboard, apart=True)
        self.head = self.nodes.enter_context(node)

    def start_other(self) -> None:
        self.other = self.nodes.enter_context(another_node(self.machines[1], self.environment, ELSEWHERE, apart=True))
        for process in below(self.other, ""):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.nice(19)  # a new head has the cores first, as on a machine of its own

    def lose_head(self) -> None:
        (gcs,) = below(self.head, "gcs/gcs_server")
        gcs.kill()
        until(lambda: self.head.poll() is not None, 60)  # by itself: Ray ends what is left of the node

    def begun(self, job: str, node: subprocess.Popen, *arguments: str) -> subprocess.Popen:
        return self.jobs.enter_context(begun(job, *arguments, inside=on(node), **self.environment))

    def submitted(self, job: str, *arguments: str) -> subprocess.Popen:
        """To the other node, and followed; by somebody who is on neither."""
        command = [*self.machines[0].inside, BIN / "python", "-m", "jobs", "submit", job, *arguments, "--follow"]
        command += [f"--address=http://127.0.0.1:{self.dashboard}", '--entrypoint-resources={"elsewhere": 1}']
        told = {"cwd": ROOT, "env": self.environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, start_new_session=True, **told)
        self.jobs.callback(end, process)
        return process


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    return [*of_small_videos(tmp_path_factory.mktemp("videos"), 40), "cache.videos_per_part=3", *TRAINING]


@pytest.fixture(scope="module")
def quiet(machines, arguments, tmp_path_factory) -> Iterator[Callable[[], Path]]:
    """What this machine makes without a cluster, meanwhile."""

    def make() -> Path:
        out = tmp_path_factory.mktemp("quiet")
        for job in ("build_cache", "finetune"):
            with begun(job, *arguments, f"out={out}", RAY_ADDRESS="local") as alone:
                finished(alone)
        return out

    with ThreadPoolExecutor(1) as beside:
        yield beside.submit(make).result


@pytest.fixture(scope="module")
def _cluster(quiet, machines, redis, environment) -> Iterator[Cluster]:
    cluster = Cluster(machines, environment, redis)
    with cluster.nodes:
        cluster.start_head()
        cluster.start_other()
        yield cluster


@pytest.fixture
def cluster(_cluster) -> Iterator[Cluster]:
    """With a head. What a test has begun ends with it, but for what it has submitted."""
    if _cluster.head.poll() is not None:
        _cluster.start_head()
    with _cluster.jobs:
        yield _cluster


def parts(out: Path) -> dict[str, int]:
    """Those that are whole, each with the number of its file, which another file of that name would not have."""
    return {file.name: file.stat().st_ino for file in out.glob("cache/parts/*.index")}


def same(cache: Path, quiet: Path) -> bool:
    """But for what a worker of the head was just writing."""
    there = {name: data for name, data in files(cache).items() if ".unfinished-" not in name}
    return there == files(quiet / "cache")


def test_a_lost_head_costs_a_submitted_build_whose_driver_is_elsewhere_nothing(arguments, quiet, cluster, tmp_path):
    job = cluster.submitted("build_cache", *arguments, f"out={tmp_path}")
    until(lambda: len(parts(tmp_path)) > 1)
    cluster.lose_head()
    made = parts(tmp_path)
    assert not any(tmp_path.glob("cache/snapshots/*/manifest.json"))
    cluster.start_head()
    first, *said, last = finished(job).splitlines()
    assert last == first.replace(" is submitted", " succeeded")
    told = [line for line in said if line.startswith(("cache: ", "latent cache: "))]
    assert re.match(r"latent cache: \d+ clips in 14 parts; ", told[-1])  # who follows it reads on to its end
    assert len(told) == len({*told})  # and each line once
    assert made.items() <= parts(tmp_path).items()
    assert same(tmp_path / "cache", quiet())


def test_a_training_whose_driver_is_elsewhere_goes_on_when_there_is_a_head_again(
    arguments, quiet, cluster, machines, smallest, tmp_path
):
    (tmp_path / "cache").symlink_to(quiet() / "cache")
    server = Server(tmp_path, free_port(), machines[1].address, machines[1].inside)
    cluster.jobs.callback(server.kill)
    server.start()
    job = cluster.begun("finetune", cluster.other, *arguments, f"out={tmp_path}", f"tracking.uri={server.uri}")
    until(lambda: any(tmp_path.glob("training/*/*/manifest.json")))
    with held(cluster.head, "RayTrainWorker"):
        assert not (tmp_path / "weights/base/manifest.json").exists()
        cluster.lose_head()
    cluster.start_head()
    assert "goes on from the checkpoint at" in finished(job)
    for kind in ("raw", "ema"):
        weights = f"weights/base/{kind}/toy.safetensors"
        assert (tmp_path / weights).read_bytes() == (quiet() / weights).read_bytes()
    assert curve(smallest(tmp_path)) == curve(smallest(quiet()))


def test_a_driver_that_is_lost_with_its_head_is_followed_by_the_same_command(arguments, quiet, cluster, tmp_path):
    job = cluster.begun("build_cache", cluster.head, *arguments, f"out={tmp_path}")
    until(lambda: len(parts(tmp_path)) > 1)
    cluster.lose_head()
    made = parts(tmp_path)
    until(lambda: job.poll() is not None, 60)
    assert job.returncode
    cluster.start_head()
    finished(cluster.begun("build_cache", cluster.head, *arguments, f"out={tmp_path}"))
    assert made.items() <= parts(tmp_path).items()
    assert same(tmp_path / "cache", quiet())
