"""What is told of a build while it goes, with an MLflow server that is there, that is away, and that comes back."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from processes import free_port
from tracking_server import Server

from pipelines import clips, storage, watch
from pipelines.artifact import Artifact
from pipelines.cache import SNAPSHOT, build_cache
from pipelines.config import load
from pipelines.errors import Unfinished, UserError
from pipelines.progress import Progress
from pipelines.tracking import runs
from pipelines.watch import Watch

PARTS = [6, 12, 18, 24, 30]  # clips after each of them but the last, of 34: all parts hold three videos, of two clips


@pytest.fixture(scope="module")
def _server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow"), free_port())
    yield made
    made.kill()


@pytest.fixture
def server(_server, monkeypatch) -> Server:
    """It answers."""
    monkeypatch.setattr(watch, "EVERY", 0)
    monkeypatch.setattr(watch, "PATIENCE", 20)
    if not _server.process:
        _server.start()
    return _server


@pytest.fixture
def when_read(monkeypatch, ids) -> Callable[..., None]:
    """when_read(c0=f, ...): f() is called when that video is read, which then is read as ever."""
    real = storage.read

    def wanted(**does: Callable[[], None]) -> None:
        def read(uri: str, *most: int) -> bytes:
            for name, do in does.items():
                if uri.endswith(f"/{ids[name]}.mp4"):
                    do()
            return real(uri, *most)

        monkeypatch.setattr(clips.storage, "read", read)

    return wanted


def run_of(config):
    (run,) = runs(config, "cache")
    return run


def points(config, name: str) -> list[tuple[int, float]]:
    history = MlflowClient(config.tracking.uri).get_metric_history(run_of(config).info.run_id, name)
    return [(m.step, m.value) for m in history]


@pytest.mark.slow
def test_a_build_has_a_run_with_curves_that_end_with_the_counts_of_the_whole(server, tmp_path, settings, here):
    config = settings(tmp_path, f"tracking.uri={server.uri}", "tracking.experiment=whole")
    cache = build_cache(config)
    run = run_of(config)
    assert run.info.status == "FINISHED"
    assert run.data.tags["cil.cache"] == cache.uri
    assert run.data.tags["cil.cache_fingerprint"] == cache.fingerprint
    assert run.data.params["cache.views_per_video"] == "2"
    for name in ("videos_per_second", "clips_per_second", "rejected_videos", "bytes", "decoding_busy", "encoding_busy"):
        assert [step for step, _ in points(config, name)] == [*PARTS, 34], name
    assert points(config, "clips") == [*zip(PARTS, [6, 12, 18, 24, 24], strict=True), (34, 26)]
    assert points(config, "rejected_videos") == [*zip(PARTS, [0, 0, 0, 0, 3], strict=True), (34, 4)]
    assert run.data.metrics.items() >= cache.counts.items()
    assert 0 < run.data.metrics["encoding_busy"] < 1
    build_cache(config)
    assert run_of(config).data.metrics == run.data.metrics


@pytest.mark.slow
def test_a_build_that_goes_on_goes_on_with_its_run_and_no_step_has_two_points(
    server, tmp_path, settings, here, when_read
):
    config = settings(tmp_path, f"tracking.uri={server.uri}", "tracking.experiment=again")

    def away() -> None:
        raise OSError("the disk is away")

    when_read(c1=away)
    with pytest.raises(Unfinished, match="1 parts wait"):
        build_cache(config)
    first = run_of(config)
    assert first.info.status == "RUNNING"
    assert [step for step, _ in points(config, "bytes")] == [6, 12, 18, 24, 28]  # of all parts but one
    when_read()
    cache = build_cache(config)
    again = run_of(config)
    assert (again.info.run_id, again.info.status) == (first.info.run_id, "FINISHED")
    assert [step for step, _ in points(config, "bytes")] == [6, 12, 18, 24, 28, 34]
    assert points(config, "bytes")[-1] == (34, cache.counts["bytes"])


@pytest.mark.slow
def test_a_server_that_stops_answering_and_comes_back_costs_no_point_and_one_line(
    server, tmp_path, settings, here, when_read, capsys
):
    config = settings(tmp_path, f"tracking.uri={server.uri}", "tracking.experiment=silent")
    when_read(b0=lambda: server.send(signal.SIGSTOP), f0=lambda: server.send(signal.SIGCONT))
    cache = build_cache(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tracking: ")]
    assert len(lines) <= 1  # none, if all was built while one request waited
    assert run_of(config).info.status == "FINISHED"
    assert [step for step, _ in points(config, "bytes")] == [*PARTS, 34]
    assert points(config, "bytes")[-1] == (34, cache.counts["bytes"])


@pytest.mark.slow
def test_a_server_that_ends_for_good_does_not_stop_the_build(
    server, tmp_path, settings, here, when_read, capsys, monkeypatch
):
    monkeypatch.setattr(watch, "PATIENCE", 3)
    config = settings(tmp_path, f"tracking.uri={server.uri}")
    times = []
    when_read(b0=lambda: (server.kill(), times.append(time.monotonic())))
    cache = build_cache(config)
    assert time.monotonic() - times[0] < 20  # where MLflow's client alone tries for minutes
    assert cache.counts["clips"] == 26
    lines = [line for line in capsys.readouterr().out.splitlines() if "track" in line]
    assert len(lines) == 2
    assert lines[0].endswith("tried again until it works")
    assert lines[1].startswith("the tracking server cannot be reached")
    assert lines[1].endswith("lacks its last figures")


def test_a_server_that_is_not_there_is_told_before_anything_is_begun(tmp_path, settings, here):
    with pytest.raises(Unfinished, match=r"^tracking\.uri=http://127\.0\.0\.1:9: cannot be reached"):
        build_cache(settings(tmp_path, "tracking.uri=http://127.0.0.1:9"))
    assert not (tmp_path / "cache").exists()
    assert here.made == []


def test_a_build_that_is_refused_leaves_no_run(tmp_path, settings, here):
    (tmp_path / "vidoes").mkdir()
    told = (f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"catalog.videos={tmp_path}/vidoes")
    config = settings(tmp_path / "out", *told)
    with pytest.raises(UserError, match="that were looked for is there"):
        build_cache(config)
    assert runs(config, "cache") == []


def test_points_are_ten_seconds_apart(tmp_path, monkeypatch):
    logged, now = [], [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    told = Watch(load(None), Artifact(f"{tmp_path}", SNAPSHOT, {}), 1000)
    told._feed = SimpleNamespace(metrics=lambda values, step: logged.append(step))
    for step in range(1, 101):
        told(step, Counter(seconds=1))
        now[0] += 1
    assert logged == list(range(1, 101, 10))


@pytest.mark.parametrize("hours", [20, 200])
def test_the_line_of_progress_of_webvid_10m_fits_into_120_columns(hours, tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    total = 10_700_000
    progress = Progress("cache", "clips", total)
    watched = Watch(load(None), Artifact(f"{tmp_path}", SNAPSHOT, {}), total)
    now[0] = seconds = hours * 3600 / 9
    done = total // 10
    told = Counter(videos=done, clips=done, rejected_videos=done // 80, bytes=done * 480_000, seconds=seconds)
    told |= Counter(decoding=0.97 * seconds, encoding=0.34 * seconds)
    progress.advance(done, watched(done, told))
    line = capsys.readouterr().out.strip()
    assert "1070000/10700000 clips" in line
    for said in (" videos/s, 13375 rejected, 513.6 GB, ", "decode 97%", "encode 34%"):
        assert said in line
    assert len(line) <= 120, f"{len(line)}: {line}"
