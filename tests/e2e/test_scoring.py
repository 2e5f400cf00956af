"""Scoring that is killed, or whose tracking server goes away: the same command again ends as if nothing had been."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from in_process import instead_of_ray
from mlflow import MlflowClient
from processes import free_port, until
from tracking_server import Server

from pipelines.compare import compare
from pipelines.config import Config, load
from pipelines.errors import Unfinished
from pipelines.score import score
from pipelines.tracking import runs
from pipelines.video import encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> tuple[str, ...]:
    """What is scored: three parts, of three sets."""
    root = tmp_path_factory.mktemp("sets")
    for number, name in enumerate(("ours", "theirs", "reference")):
        (root / name).mkdir()
        for k in range(4):
            coarse = np.random.default_rng([number, k]).integers(0, 255, (6, 4, 4, 3), np.uint8)
            (root / name / f"{k}.mp4").write_bytes(encode(coarse.repeat(8, 1).repeat(8, 2), 8))
    (root / "ours/broken.mp4").write_bytes(b"no video")
    videos = f"{{ours: {root}/ours, theirs: {root}/theirs}}"
    return f"score.videos={videos}", f"score.reference={root}/reference"


def tables(out: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(Path(out, "scores").rglob("*.jsonl"))}


def told_once(config: Config) -> dict[str, dict[str, float]]:
    """The metrics of the evaluate runs, by set, each of which is there once and has one point of each."""
    client, found = MlflowClient(config.tracking.uri or f"sqlite:///{config.out}/mlflow.db"), runs(config, "evaluate")
    assert sorted(run.info.run_name for run in found) == ["ours", "theirs"]
    for run in found:
        assert run.info.status == "FINISHED"
        assert all(len(client.get_metric_history(run.info.run_id, name)) == 1 for name in run.data.metrics)
    return {run.info.run_name: run.data.metrics for run in found}


def metrics_logged(out: Path) -> bool:
    if not (out / "mlflow.db").exists():
        return False
    with closing(sqlite3.connect(f"file:{out}/mlflow.db?mode=ro", uri=True)) as store:
        return store.execute("select count(*) from metrics").fetchone()[0] > 0


def test_a_scoring_that_is_killed_at_any_time_ends_with_the_same_bytes_and_tells_nothing_twice(
    named, tmp_path, monkeypatch
):
    out, killed_at = tmp_path / "out", []
    command = [sys.executable, "-m", "jobs.score", f"out={out}", *named]
    points = {
        "some parts": lambda: any(out.glob("scores/*/parts/*.jsonl")),
        "some sets": lambda: any(out.glob("scores/*/manifest.json")),
        "some metrics": lambda: metrics_logged(out),
    }
    for name, reached in points.items():
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while job.poll() is None and not reached():
            time.sleep(0.002)
        os.kill(job.pid, signal.SIGKILL)
        if job.wait() == -signal.SIGKILL:
            killed_at.append(name)
    assert killed_at == list(points)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

    undisturbed = load(None, [f"out={tmp_path}/undisturbed", *named])
    instead_of_ray(monkeypatch)
    score(undisturbed)
    assert tables(out) == tables(undisturbed.out)
    assert told_once(load(None, [f"out={out}", *named])) == told_once(undisturbed)


def test_a_tracking_server_that_is_away_is_one_line_and_the_same_command_goes_on(named, tmp_path, monkeypatch):
    server = Server(tmp_path / "server", free_port())
    (tmp_path / "server").mkdir()
    here = instead_of_ray(monkeypatch)
    config = load(None, [f"out={tmp_path}/out", f"tracking.uri={server.uri}", *named])
    away = rf"^tracking\.uri={server.uri}: cannot be reached"
    goes_on = "what is made stays, and the same command goes on when the store answers$"

    def made_while_it_goes(*arguments, **settings) -> list[str]:
        answer = here.make_parts(*arguments, **settings)
        server.kill()
        return answer

    try:
        with pytest.raises(Unfinished, match=away):
            score(config)
        assert not Path(config.out).exists()
        server.start()
        monkeypatch.setattr("pipelines.score.make_parts", made_while_it_goes)
        with pytest.raises(Unfinished, match=rf"^tracking\.uri={server.uri}: .*{goes_on}") as error:
            score(config)
        assert "\n" not in str(error.value)
        made = tables(config.out)
        assert len(made) == 9
        with pytest.raises(Unfinished, match=away):
            compare(config)
        monkeypatch.setattr("pipelines.score.make_parts", here.make_parts)
        server.start()
        score(config)
        assert told_once(config).keys() == {"ours", "theirs"}
        assert tables(config.out) == made

        server.send(signal.SIGSTOP)  # it takes what it is asked, and never answers
        begin = time.monotonic()
        for call in (score, compare):
            with pytest.raises(Unfinished, match=rf"^tracking\.uri={server.uri}: does not answer"):
                call(config)
        assert time.monotonic() - begin < 120
        server.send(signal.SIGCONT)
        until(server.answers)
        assert compare(config).counts["rows"] == 2
    finally:
        server.kill()
