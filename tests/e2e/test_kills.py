"""Processes killed in the middle of the work: the run recovers, or the same command again does, to the same result."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.cache import build_cache
from pipelines.errors import Unfinished
from pipelines.finetune import finetune
from pipelines.make_shapes import make_shapes
from pipelines.tracking import runs, store_uri

pytestmark = pytest.mark.slow


def files(folder: str | Path, pattern: str = "[!.]*") -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).glob(pattern)) if p.is_file()}


def ray_workers(title: str) -> list[psutil.Process]:
    """Of the clusters that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


class Killer(threading.Thread):
    """Sends SIGKILL to one worker as soon as a condition holds, and says whom it killed."""

    def __init__(self, title: str, when: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self.title, self.when, self.killed = title, when, 0
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while not self.killed and time.monotonic() < deadline:
            if self.when() and (workers := ray_workers(self.title)):
                workers[0].kill()
                self.killed = workers[0].pid
            time.sleep(0.01)


@pytest.fixture(scope="module")
def disturbed(smallest, tmp_path_factory):
    """The road's first half again, with one worker killed at each station."""
    config = smallest(tmp_path_factory.mktemp("disturbed"))
    make_shapes(config)

    parts = Path(config.out, "cache/parts")
    killer = Killer("MapWorker", lambda: parts.exists() and any(parts.glob("*.index")))
    build_cache(config)
    assert killer.killed

    killer = Killer("RayTrainWorker", lambda: checkpoints(config) > 0)
    finetune(config)
    assert killer.killed
    return config


def checkpoints(config) -> int:
    return len(list(Path(config.out, "training").glob("*/*/manifest.json")))


def test_a_cache_whose_worker_was_killed_has_the_same_bytes(road, disturbed):
    assert files(disturbed.out + "/cache/parts") == files(road.out + "/cache/parts")
    for name in ("plan.arrow", "index.arrow", "rejects.jsonl"):
        assert files(disturbed.out + "/cache/snapshots", f"*/{name}") == files(
            road.out + "/cache/snapshots", f"*/{name}"
        )


def test_weights_whose_training_was_killed_are_bit_identical(road, disturbed):
    assert files(disturbed.out + "/weights", "*/*/toy.safetensors") == files(
        road.out + "/weights", "*/*/toy.safetensors"
    )


def test_the_curve_of_a_killed_training_has_each_point_once_and_the_same_losses(road, disturbed):
    def curves(config) -> dict[str, list[tuple[int, float]]]:
        client = MlflowClient(store_uri(config))
        found = {run.info.run_name: run.info.run_id for run in runs(config, "train")}
        return {n: [(m.step, m.value) for m in client.get_metric_history(i, "loss")] for n, i in found.items()}

    assert curves(disturbed) == curves(road)


def test_a_training_that_gave_up_is_continued_by_the_same_command(road, smallest, tmp_path):
    """And whatever the ZeRO stage: with two workers a sum has one order only."""
    (tmp_path / "cache").symlink_to(Path(road.out, "cache"))
    config = smallest(tmp_path, "finetune.max_failures=0", "finetune.deepspeed=zero-2")
    killer = Killer("RayTrainWorker", lambda: checkpoints(config) > 0)
    with pytest.raises(Unfinished, match=r"training of base, naive-1, .* stopped: .*The same command goes on"):
        finetune(config)
    assert killer.killed
    assert not Path(config.out, "weights/timenoise-2/manifest.json").exists()

    finetune(config)
    assert files(config.out + "/weights", "*/*/toy.safetensors") == files(road.out + "/weights", "*/*/toy.safetensors")
    tags = {run.data.tags["cil.zero_stage"] for run in runs(config, "train")}
    assert tags == {"2"}


def test_a_driver_that_is_killed_is_followed_by_the_same_command(road, smallest, tmp_path):
    config = smallest(tmp_path)
    make_shapes(config)
    parts = tmp_path / "cache/parts"
    command = [
        sys.executable,
        "-m",
        "jobs.build_cache",
        "--config",
        "tests/smallest.yaml",
        f"out={tmp_path}",
    ]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while first.poll() is None and not any(parts.glob("*.index")):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not list(tmp_path.glob("cache/snapshots/*/manifest.json"))
    kept = {p: p.stat().st_mtime_ns for name in parts.glob("*.index") for p in parts.glob(f"{name.stem}.*")}
    assert kept

    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert "clips are there already" in second.stdout
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert files(parts, "part*") == files(road.out + "/cache/parts")


def test_what_failed_for_a_passing_reason_is_tried_again_and_the_manifest_waits(road, smallest, tmp_path):
    config = smallest(tmp_path)
    make_shapes(config)
    video = sorted((tmp_path / "shapes/videos").glob("*/*.mp4"))[30]
    whole = video.read_bytes()
    video.unlink()
    video.symlink_to(video.name)  # reading it fails with an OSError, as from a disk or a network that is ill
    with pytest.raises(Unfinished, match=rf"1 parts wait .*{video.stem}.*cache\.accept_transient=true"):
        build_cache(config)
    assert not list(tmp_path.glob("cache/snapshots/*/manifest.json"))

    accepting = smallest(tmp_path, "cache.accept_transient=true", f"catalog.csv={tmp_path}/shapes/videos.csv")
    video.unlink()
    video.write_bytes(whole)
    build_cache(accepting)
    assert files(tmp_path / "cache/parts") == files(road.out + "/cache/parts")


def test_passing_failures_can_be_accepted(smallest, tmp_path):
    config = smallest(tmp_path, "shapes.videos=8", "cache.accept_transient=true")
    make_shapes(config)
    video = min((tmp_path / "shapes/videos").glob("*/*.mp4"))
    video.unlink()
    video.symlink_to(video.name)
    manifest = build_cache(config)
    reasons = [line for line in Path(manifest.manifest.uri, "rejects.jsonl").read_text().splitlines() if '"io"' in line]
    assert len(reasons) == 1
    assert video.stem in reasons[0]
    assert manifest.counts["clips"] + manifest.counts["rejected"] == manifest.counts["planned"]
