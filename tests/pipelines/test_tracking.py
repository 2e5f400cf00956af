import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.artifact import Artifact
from pipelines.config import load
from pipelines.errors import UserError
from pipelines.tracking import Feed, Run, refuse_unreachable, runs, store_uri


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load(None, [f"out={tmp_path_factory.mktemp('tracking')}", "tracking.experiment=study"])


def points(config, run: Run, name: str) -> list[tuple[int, float]]:
    history = MlflowClient(store_uri(config)).get_metric_history(run.id, name)
    return [(m.step, m.value) for m in history]


def test_a_resumed_run_is_the_same_run_and_logs_each_step_once(config):
    first = Run(config, "row", "train", "print-1")
    first.parameters({"row": {"lr": 0.1}})
    for step in (10, 20, 30):
        first.metrics({"loss": 1 / step}, step)
    # Killed here; the checkpoint was of step 10, so 20 and 30 come again.
    again = Run(config, "row", "train", "print-1")
    again.parameters({"row": {"lr": 0.1}})
    for step in (20, 30, 40):
        again.metrics({"loss": 1 / step}, step)
    assert again.id == first.id
    assert points(config, again, "loss") == [(s, 1 / s) for s in (10, 20, 30, 40)]


def test_what_is_told_again_in_one_attempt_is_one_point(config):
    """As by a training that goes back to its last checkpoint."""
    run = Run(config, "back", "train", "print-7")
    for step in (10, 20, 10, 20, 30):
        run.metrics({"loss": 1 / step}, step)
    assert points(config, run, "loss") == [(s, 1 / s) for s in (10, 20, 30)]


def test_weights_are_registered_once_with_their_place_and_what_they_are(config, tmp_path):
    run, told = Run(config, "row", "train", "print-8"), {"samples": 8, "steps": 1, "files": {"ema/net": "ab12"}}
    weights = [Artifact(f"{tmp_path}/weights/row", "weights", {"preset": "tiny", "of": of}) for of in (1, 1, 2)]
    for made in weights:
        run.register("study.row", made, told)
    Run(config, "row", "train", "print-8").register("study.row", weights[2], told)
    client = MlflowClient(store_uri(config))
    versions = client.search_model_versions("name = 'study.row'")
    assert sorted(v.tags["cil.fingerprint"] for v in versions) == sorted({made.fingerprint for made in weights})
    assert {v.tags["cil.uri"] for v in versions} == {f"{tmp_path}/weights/row"}
    files = hashlib.sha256(b'{"ema/net": "ab12"}').hexdigest()
    assert {v.tags["cil.sha256"] for v in versions} == {files}
    card = json.loads(Path(client.download_artifacts(run.id, "model/card.json")).read_text())
    assert card == {
        "uri": f"{tmp_path}/weights/row",
        "fingerprint": weights[2].fingerprint,
        "preset": "tiny",
        "of": 2,
        "samples": 8,
        "steps": 1,
        "files": {"ema/net": "ab12"},
    }


def test_a_value_that_changes_has_a_step_of_its_own_each_time(config):
    run = Run(config, "set", "other", "print-10")
    for value in (0.5, 0.5, 0.25, 0.25, 0.5):
        run.renew("leakage", value)
    assert points(config, run, "leakage") == [(0, 0.5), (1, 0.25), (2, 0.5)]
    Run(config, "set", "other", "print-10").renew("leakage", 0.5)
    assert len(points(config, run, "leakage")) == 3


def test_another_fingerprint_is_another_run(config):
    assert Run(config, "row", "train", "print-2").id != Run(config, "row", "train", "print-3").id


def test_twins_of_another_name_have_runs_of_their_own(config):
    assert Run(config, "row", "train", "print-6").id != Run(config, "twin", "train", "print-6").id


def test_runs_are_found_by_stage(config):
    Run(config, "set", "evaluate", "print-4").finish()
    found = runs(config, "evaluate")
    assert [run.info.run_name for run in found] == ["set"]
    assert found[0].info.status == "FINISHED"


def test_nested_parameters_are_logged_under_dotted_names(config):
    run = Run(config, "row", "train", "print-5")
    run.parameters({"row": {"conditioning": {"kind": "timenoise"}}})
    assert MlflowClient(store_uri(config)).get_run(run.id).data.params == {"row.conditioning.kind": "timenoise"}


def test_what_will_never_be_taken_is_left_out_and_the_rest_is_told(config, capsys):
    feed = Feed(config, "row", "train", "print-9")
    feed.parameters({"lr": 1})
    feed.parameters({"lr": 2})  # a parameter has one value
    feed.metrics({"loss": 1.0}, 8)
    feed.flush(patience=60)
    assert points(config, Run(config, "row", "train", "print-9"), "loss") == [(8, 1.0)]
    assert "tracking: parameters is left out: " in capsys.readouterr().out


def test_a_server_that_is_none_of_mlflows_is_told_in_seconds():
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *told: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri, begin = f"http://127.0.0.1:{server.server_port}", time.monotonic()
    with pytest.raises(UserError, match=rf"^tracking\.uri={uri}: .*404.*") as error:
        refuse_unreachable(load(None, [f"tracking.uri={uri}"]))
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 20
    server.shutdown()
    server.server_close()


def test_the_store_stands_beside_the_artifacts_unless_a_server_is_named(tmp_path):
    assert store_uri(load(None, [f"out={tmp_path}"])) == f"sqlite:///{tmp_path}/mlflow.db"
    assert store_uri(load(None, ["tracking.uri=http://127.0.0.1:5000"])) == "http://127.0.0.1:5000"


def test_runs_that_begin_at_once_with_a_store_that_none_has_made_yet_are_all_in_it(tmp_path):
    config, begin = load(None, [f"out={tmp_path}"]), threading.Barrier(4)

    def run(i: int) -> str:
        begin.wait()
        made = Run(config, f"row-{i}", "train", f"print-{i}")
        made.metrics({"loss": float(i)}, 8)
        return made.id

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(run, range(4)))
    assert {each.info.run_id for each in runs(config, "train")} == {*made}
    for i, there in enumerate(made):
        (loss,) = MlflowClient(store_uri(config)).get_metric_history(there, "loss")
        assert loss.value == i
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_store_is_made_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    def link(made: Path, file: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # of vfat, and of many a bucket that is mounted

    monkeypatch.setattr(os, "link", link)
    config = load(None, [f"out={tmp_path}"])
    run = Run(config, "row", "train", "print")
    assert [each.info.run_id for each in runs(config, "train")] == [run.id]
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_store_whose_making_was_killed_is_made_again(tmp_path):
    config = load(None, [f"out={tmp_path}"])
    first = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from pipelines import config, tracking\ntracking.open_study(config.load(None, ['out={tmp_path}']))",
        ]
    )
    while first.poll() is None and not any(path.stat().st_size for path in tmp_path.glob(".unfinished-*/mlflow.db")):
        time.sleep(0.001)
    first.kill()
    first.wait()
    assert not (tmp_path / "mlflow.db").exists()
    run = Run(config, "row", "train", "print-1")
    run.metrics({"loss": 1.0}, 8)
    assert points(config, run, "loss") == [(8, 1.0)]
