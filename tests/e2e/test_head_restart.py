"""A latent cache when the head of the cluster is lost, whose GCS keeps what it knows in a Redis.

Where the driver is decides what that costs. A head node does not outlive its GCS: what ran on it is gone, a driver too,
and the same command goes on. Nodes and drivers elsewhere wait for the next head.
"""

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Machine, another_node, cluster_environment, first_node, of_small_videos, on, two_machines
from test_cache_faults import begun, below, files, finished, until
from test_submit import free_port

pytestmark = pytest.mark.slow

PASSWORD = secrets.token_hex(8)


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


def parts(out: Path) -> dict[str, int]:
    """Those that are whole, each with the number of its file, which another file of that name would not have."""
    return {file.name: file.stat().st_ino for file in out.glob("cache/parts/*.index")}


def test_a_lost_head_costs_a_driver_elsewhere_nothing_and_its_own_driver_the_same_command_again(
    machines, redis, environment, tmp_path
):
    (tmp_path / "videos").mkdir()
    arguments = [*of_small_videos(tmp_path / "videos", 40), "cache.videos_per_part=3"]
    quiet, elsewhere, here = (tmp_path / name for name in ("quiet", "elsewhere", "here"))
    with contextlib.ExitStack() as stack:

        def head() -> subprocess.Popen:
            kept = environment | {"RAY_REDIS_ADDRESS": redis}
            return stack.enter_context(first_node(machines[0], kept, f"--redis-password={PASSWORD}", apart=True))

        def build(out: Path, node: subprocess.Popen) -> subprocess.Popen:
            return stack.enter_context(begun("build_cache", *arguments, f"out={out}", inside=on(node), **environment))

        def lost(head: subprocess.Popen, out: Path) -> dict[str, int]:
            """When some parts are made, the head's GCS is killed; answers the parts that are whole by then."""
            until(lambda: len(parts(out)) > 1)
            (gcs,) = below(head, "gcs/gcs_server")
            gcs.kill()
            until(lambda: head.poll() is not None, 60)  # by itself: Ray ends what is left of the node
            return parts(out)

        def alone(out: Path) -> subprocess.Popen:
            """By this machine, without a cluster."""
            return stack.enter_context(begun("build_cache", *arguments, f"out={out}", RAY_ADDRESS="local"))

        def same(out: Path) -> bool:
            """But for what a worker of the head was just writing."""
            there = {name: data for name, data in files(out / "cache").items() if ".unfinished-" not in name}
            return there == files(quiet / "cache")

        undisturbed = alone(quiet)
        first = head()
        second = stack.enter_context(another_node(machines[1], environment, apart=True))
        finished(undisturbed)

        job = build(elsewhere, second)
        made = lost(first, elsewhere)
        first = head()
        assert job.poll() is None
        finished(job)
        assert made.items() <= parts(elsewhere).items()
        assert same(elsewhere)

        job = build(here, first)
        made = lost(first, here)
        until(lambda: job.poll() is not None, 60)
        assert job.returncode
        finished(alone(here))
        assert made.items() <= parts(here).items()
        assert same(here)
