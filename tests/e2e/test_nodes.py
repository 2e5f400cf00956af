"""A latent cache that two nodes of a Ray cluster build has the bytes of one that a single machine builds.

Each node is in a network namespace of its own, with an address of its own; the job runs in the first one's.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from nodes import Machine, another_node, cluster_environment, first_node, held, of_small_videos, two_machines
from processes import ROOT, begun, end, files, finished, one_line, until

pytestmark = pytest.mark.slow

CUT = 4  # seconds


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Of a job that makes 20 parts."""
    return [*of_small_videos(tmp_path_factory.mktemp("videos"), 60), "cache.videos_per_part=3"]


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory) -> Iterator[Callable[[], dict[str, bytes]]]:
    """The files of a cache that this machine builds alone, while the nodes start."""
    out = tmp_path_factory.mktemp("alone")
    with begun("build_cache", *arguments, f"out={out}", RAY_ADDRESS="local") as build:

        def made() -> dict[str, bytes]:
            if build.poll() is None:
                finished(build)
            return files(out / "cache")

        yield made


@pytest.fixture(scope="module")
def machines(expected) -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as made:
        yield made


@pytest.fixture(scope="module")
def environment(machines, tmp_path_factory) -> dict[str, str]:
    return cluster_environment(tmp_path_factory.mktemp("home"), machines[0])


@pytest.fixture(scope="module")
def first(machines, environment) -> Iterator[subprocess.Popen]:
    with first_node(machines[0], environment) as process:
        yield process


@pytest.fixture
def second(machines, environment, first) -> Iterator[subprocess.Popen]:
    with another_node(machines[1], environment) as process:
        yield process


@pytest.fixture
def build(arguments, machines, environment, first, second, tmp_path) -> Iterator[subprocess.Popen]:
    with begun("build_cache", *arguments, f"out={tmp_path}", inside=machines[0].inside, **environment) as process:
        yield process


def wait_for_another_part(out: Path) -> None:
    before = len(list(out.glob("cache/parts/*.index")))
    until(lambda: len(list(out.glob("cache/parts/*.index"))) > before, 120)


def test_two_nodes_share_the_work_and_the_cache_has_the_bytes_of_one_of_a_single_node(
    build, first, second, expected, tmp_path
):
    for other in (first, second):
        with held(other):
            wait_for_another_part(tmp_path)
    finished(build)
    assert files(tmp_path / "cache") == expected()


def test_a_node_that_comes_later_takes_its_share(arguments, machines, environment, first, expected, tmp_path):
    with contextlib.ExitStack() as stack:
        told = {"inside": machines[0].inside, **environment}
        build = stack.enter_context(begun("build_cache", *arguments, f"out={tmp_path}", **told))
        wait_for_another_part(tmp_path)
        with held(first):
            stack.enter_context(another_node(machines[1], environment))
            wait_for_another_part(tmp_path)
        finished(build)
    assert files(tmp_path / "cache") == expected()


def test_a_build_goes_on_when_a_node_is_lost(build, first, second, expected, tmp_path):
    with held(first):
        wait_for_another_part(tmp_path)
        end(second)
    assert build.poll() is None
    finished(build)
    there = files(tmp_path / "cache")
    assert {name: data for name, data in there.items() if ".unfinished-" not in name} == expected()  # of that moment


def test_a_build_goes_on_when_a_node_was_cut_off_for_a_while(build, machines, first, second, expected, tmp_path):
    with held(first):
        wait_for_another_part(tmp_path)
        machines[1].cut_off()
    time.sleep(CUT)
    assert build.poll() is None
    machines[1].cut_off(False)
    finished(build)
    assert files(tmp_path / "cache") == expected()


@pytest.fixture
def hidden(machines, environment, first, tmp_path) -> Iterator[Path]:
    """A folder that the second node sees empty."""
    if os.geteuid():
        pytest.skip("only root may give a node another view of a folder")
    folder = tmp_path / "hidden"
    folder.mkdir()
    with another_node(machines[1], environment, hidden=str(folder)):
        yield folder


def test_a_local_path_that_a_node_does_not_see_is_refused(arguments, machines, environment, expected, hidden, tmp_path):
    """Be it where parts are to be written, videos to be read, or checkpoints to be shared."""
    for name, data in expected().items():
        file = hidden / "trained/cache" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    videos = hidden / "videos"
    shutil.copytree(arguments[3].partition("=")[2], videos)
    asked = {
        f"{hidden}/made/cache/parts": ("build_cache", f"out={hidden}/made"),
        f"{videos}": ("build_cache", f"out={tmp_path}/made", f"catalog.videos={videos}"),
        f"{hidden}/trained": ("finetune", f"out={hidden}/trained"),
    }
    with contextlib.ExitStack() as stack:
        told = {"inside": machines[0].inside, **environment}
        jobs = {
            folder: stack.enter_context(begun(job, *arguments, *more, **told)) for folder, (job, *more) in asked.items()
        }
        doctor = stack.enter_context(
            begun("doctor", *arguments, f"out={hidden}/doctored", "finetune.workers=4", **told)
        )
        for folder, job in jobs.items():
            error = job.communicate(timeout=120)[1]
            assert job.returncode == 2, error
            assert f"{folder}: the nodes {machines[1].address} do not see the files in it" in one_line(error)
        found, error = doctor.communicate(timeout=120)
        assert "checks failed: shared out, tracking, workers" in one_line(error)
        assert "2 nodes cannot share a SQLite store" in found
        assert re.search("(good|warning) +all-reduce: 2 ranks on 2 nodes by gloo: [0-9.]+ GB/s", found)
    assert not [file for folder in (hidden, tmp_path) for file in folder.rglob(".unfinished*")]
    assert not list(tmp_path.glob("*/cache/parts/*"))


LOOK = """
import sys
from pipelines import cluster
from pipelines.errors import Unfinished

cluster.connect()
for cluster.PROBE_SECONDS in (2, 60):
    try:
        cluster.refuse_unshared(sys.argv[1])
    except Unfinished as error:
        print(error, flush=True)
"""


def test_a_node_that_does_not_answer_or_is_lost_meanwhile_is_named(machines, environment, second, tmp_path):
    for process in [*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)]:
        process.suspend()
    look, probes = [*machines[0].inside, sys.executable, "-c", LOOK, tmp_path], set()
    with subprocess.Popen(look, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as job:
        until(lambda: probes.update(tmp_path.iterdir()) or len(probes) == 2, 120)
        end(second)
        out = job.communicate(timeout=60)[0]
    for seconds in (2, 60):
        assert f"{machines[1].address}: these nodes are lost, or did not say in {seconds} s whether they see" in out
    assert not list(tmp_path.iterdir())
