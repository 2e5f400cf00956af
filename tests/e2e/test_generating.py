"""Generation over Ray, as processes: the same bytes on any number of workers, in any order, and after a SIGKILL."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from cil import families

pytestmark = pytest.mark.slow

ROWS, IMAGES, A_PART = 2, 14, 4
JOB = """
import sys
import ray
from pipelines import cluster
from pipelines.config import load
from pipelines.generate import generate

cpus, *settings = sys.argv[1:]
ray.init("local", num_cpus=int(cpus), log_to_driver=False)
print(cluster.workers(), "workers")
generate(load(None, settings))
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Images of names that a csv holds in two orders, and weights that are not zero anywhere."""
    folder = tmp_path_factory.mktemp("given")
    names = [f"{i:02d}.png" for i in range(IMAGES)]
    for i, name in enumerate(names):
        colour = tuple(random.Random(i).randrange(256) for _ in range(3))
        Image.linear_gradient("L").convert("RGB").point([c * x // 255 for c in colour for x in range(256)]).save(
            folder / name
        )
    for file, order in (("given", names), ("reversed", names[::-1])):
        (folder / f"{file}.csv").write_text("image\n" + "".join(f"{name}\n" for name in order))
    family, noise = families.load("toy"), torch.Generator().manual_seed(1)
    state = family.network(0).state_dict()
    family.export({name: t + 0.2 * torch.randn(t.shape, generator=noise) for name, t in state.items()}, folder)
    rows = f"generate.rows={{a: {{weights: {folder}, sweep: {{M: [700, 1000]}}}}}}"
    plan = ["generate.steps=40", f"generate.clips_per_part={A_PART}"]
    return ["family.preset=tiny", f"generate.images={folder}/given.csv", rows, *plan]


def command(cpus: int, out: Path, *settings: str) -> list[str]:
    return [sys.executable, "-c", JOB, str(cpus), f"out={out}", *settings]


def made(cpus: int, out: Path, *settings: str) -> dict[str, bytes]:
    """The videos and their indexes."""
    done = subprocess.run(command(cpus, out, *settings), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{cpus} workers" in done.stdout
    return videos(out)


def videos(out: Path) -> dict[str, bytes]:
    files = [*out.glob("videos/*/*.mp4"), *out.glob("videos/*/index.jsonl")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> dict[str, bytes]:
    return made(2, tmp_path_factory.mktemp("undisturbed"), *settings)


def test_one_worker_makes_the_bytes_that_two_make(settings, undisturbed, tmp_path):
    assert len(undisturbed) == ROWS * (IMAGES + 1)
    assert len(set(undisturbed.values())) == len(undisturbed)
    assert made(1, tmp_path, *settings) == undisturbed


def test_in_another_order_with_other_neighbours_each_sample_has_the_same_bytes(settings, undisturbed, tmp_path):
    other = [each.replace("given.csv", "reversed.csv") for each in settings]
    found = made(2, tmp_path, *other)
    assert {name: data for name, data in found.items() if name.endswith(".mp4")} == {
        name: data for name, data in undisturbed.items() if name.endswith(".mp4")
    }


def test_a_driver_that_is_killed_is_followed_by_the_same_command_which_makes_what_is_missing(
    settings, undisturbed, tmp_path
):
    first = subprocess.Popen(command(2, tmp_path, *settings), stdout=subprocess.DEVNULL, start_new_session=True)
    while first.poll() is None and not any(tmp_path.glob("videos/*/parts/*.jsonl")):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not list(tmp_path.glob("videos/*/manifest.json"))
    kept = {part: part.stat().st_mtime_ns for part in tmp_path.glob("videos/*/parts/*.jsonl")}
    assert 0 < len(kept) < ROWS * -(-IMAGES // A_PART)

    assert made(2, tmp_path, *settings) == undisturbed
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert len(list(tmp_path.glob("videos/*/manifest.json"))) == ROWS
