"""A latent cache goes on when the head of the cluster is lost, whose GCS keeps what it knows in a Redis.

Ray starts a lost GCS again only with its whole head node. Nodes, actors and drivers elsewhere wait for it; what ran on
the head is gone, a driver too. So the driver's place decides: elsewhere the build goes on, on the head the same command
does it.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from nodes import Machine, another_node, cluster_environment, first_node, held, of_small_videos, two_machines
from test_cache_faults import begun, end, files, finished, until
from test_submit import free_port

pytestmark = pytest.mark.slow

PASSWORD = secrets.token_hex(8)


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    if not shutil.which("redis-server"):
        pytest.skip("there is no redis-server (apt-get install redis-server): a GCS has nowhere to keep what it knows")
    with two_machines() as made:
        yield made


@pytest.fixture
def redis(machines, tmp_path) -> Iterator[str]:
    """The address of one beside the head, which outlives it."""
    port = free_port()
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--requirepass",
        PASSWORD,
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    command = [*machines[0].inside, "redis-server", *options, "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: "Ready to accept connections" in process.stdout.readline(), 20)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture
def environment(machines, redis, tmp_path_factory) -> dict[str, str]:
    return cluster_environment(tmp_path_factory.mktemp("home"), machines[0]) | {"RAY_REDIS_ADDRESS": redis}


@pytest.fixture
def folder() -> Iterator[str]:
    made = tempfile.mkdtemp(prefix="ray")
    yield made
    shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def head(machines, environment, folder) -> Iterator[subprocess.Popen]:
    with first_node(machines[0], environment, f"--redis-password={PASSWORD}", folder=folder) as process:
        yield process


def parts(out: Path) -> dict[str, int]:
    """Those that are whole, each with its file's number, which another file of that name would not have."""
    return {file.name: file.stat().st_ino for file in out.glob("cache/parts/*.index")}


def test_a_lost_head_costs_a_driver_elsewhere_nothing_and_its_own_driver_the_same_command_again(
    machines, environment, folder, tmp_path
):
    (videos := tmp_path / "videos").mkdir()
    arguments = [*of_small_videos(videos, 60), "cache.videos_per_part=3"]
    outs = {name: tmp_path / name for name in ("quiet", "elsewhere", "on the head")}
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(head(machines, environment, folder))
        second = stack.enter_context(another_node(machines[1], environment))
        of = lambda name, machine: begun(  # noqa: E731
            "build_cache", *arguments, f"out={outs[name]}", inside=machine.inside, **environment
        )
        elsewhere = stack.enter_context(of("elsewhere", machines[1]))
        with held(first):
            until(lambda: len(parts(outs["elsewhere"])) > 2, 120)
            end(first.pid)
            before = parts(outs["elsewhere"])
        again = stack.enter_context(head(machines, environment, folder))
        assert elsewhere.poll() is None
        finished(elsewhere, 120)
        assert before.items() <= parts(outs["elsewhere"]).items()
