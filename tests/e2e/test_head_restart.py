"""A latent cache goes on when the head of the cluster is lost, whose GCS keeps what it knows in a Redis.

Ray starts a lost GCS again only with its whole head node. Nodes, actors and drivers elsewhere wait for it; what ran on
the head is gone, a driver too. So the driver's place decides: elsewhere the build goes on, on the head the same command
does it.
"""

import contextlib
import time
import traceback
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



T0 = time.monotonic()


def say(*what):
    with open("/tmp/s4/scale/exp.log", "a") as log:
        print(f"{time.monotonic() - T0:6.1f}", *what, file=log, flush=True)


def test_experiment(machines, environment, folder, tmp_path):
    say("=== begin")
    (videos := tmp_path / "videos").mkdir()
    arguments = [*of_small_videos(videos, 60), "cache.videos_per_part=3"]
    with contextlib.ExitStack() as stack:
        def start(where=folder):
            try:
                node = stack.enter_context(head(machines, environment, where))
                say("head started", where)
                return node
            except BaseException as error:
                say("head did not start", str(error)[-3000:])
                raise

        def build(name, machine):
            return stack.enter_context(
                begun("build_cache", *arguments, f"out={tmp_path}/{name}", inside=machine.inside, **environment)
            )

        def wait(job, seconds):
            try:
                out, error = job.communicate(timeout=seconds)
                say("job", job.returncode, "OUT", out[-1500:], "ERR", error[-2500:])
            except subprocess.TimeoutExpired:
                say("job still running after", seconds)

        try:
            first = start()
            second = stack.enter_context(another_node(machines[1], environment))
            say("second started")
            job = build("one", machines[1])
            until(lambda: len(parts(tmp_path / "one")) > 2, 90)
            say("parts", len(parts(tmp_path / "one")))
            for worker in [p for n in (first, second) for p in __import__("test_cache_faults").below(n, "MapWorker")]:
                say("worker", worker.pid)
            end(first.pid)
            say("head killed; parts", len(parts(tmp_path / "one")))
            time.sleep(2)
            say("parts", len(parts(tmp_path / "one")), "job", job.poll(), "second", second.poll())
            try:
                first = start()
            except BaseException:
                first = start(tempfile.mkdtemp(prefix="ray"))
            say("parts", len(parts(tmp_path / "one")), "job", job.poll(), "second", second.poll())
            wait(job, 45)
            say("parts", len(parts(tmp_path / "one")), "job", job.poll(), "second", second.poll())
            end(job.pid)
            say("--- driver on the head; only the gcs killed")
            job = build("two", machines[0])
            until(lambda: len(parts(tmp_path / "two")) > 2, 60)
            (gcs,) = __import__("test_cache_faults").below(first, "gcs_server --")
            say("gcs", " ".join(gcs.cmdline())[:3000])
            gcs.kill()
            for _ in range(8):
                time.sleep(1)
                say("parts", len(parts(tmp_path / "two")), "job", job.poll(), "head", first.poll(), "second", second.poll())
            wait(job, 5)
            end(job.pid)
            end(first.pid)
            first = start()
            job = build("two", machines[0])
            wait(job, 60)
        except BaseException:
            say(traceback.format_exc()[-3000:])
        say("second", second.poll())
        end(second.pid)
        say(second.stdout.read()[-2000:])
