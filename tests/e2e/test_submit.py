"""`ray job submit` and `cil submit` to a cluster of their own, with Ray's token authentication left on."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Machine, first_node
from processes import BIN, ROOT, free_port, telling, until

from pipelines.artifact import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECRET = "a-secret-nobody-may-see"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """A home of its own, so that the token is this cluster's, and this Python first on the path."""
    home = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_worker_niceness": "0",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """What Ray keeps of its sessions."""
    made = tempfile.mkdtemp(prefix="ray")  # short: Ray's sockets stand in it
    yield Path(made)
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(environment, folder) -> Iterator[str]:
    """The address of the dashboard of a head node."""
    dashboard = free_port()  # another Ray of this machine may have the usual one
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    there = {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    with first_node(Machine("127.0.0.1"), environment | there, cpus=2, dashboard=dashboard, sessions=folder):
        yield f"http://127.0.0.1:{dashboard}"


def submit(cluster: str, environment: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess:
    command = [
        BIN / "ray",
        "job",
        "submit",
        "--address",
        cluster,
        "--working-dir",
        ".",
        "--",
        *entrypoint,
    ]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        # A head node takes jobs some seconds after it says that it has started.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done


def test_every_job_takes_its_configuration_in_the_cluster(cluster, environment, tmp_path):
    """By Ray's own command."""
    names = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith("_"))
    check = (
        f"for job in {' '.join(names)}; do python -m jobs.$job --check out={tmp_path} > {tmp_path}/$job || exit; done"
    )
    done = submit(cluster, environment, "bash", "-c", check)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert json.loads((tmp_path / name).read_text())["out"] == str(tmp_path), name


def test_the_cluster_refuses_those_who_have_no_token(cluster):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{cluster}/api/jobs/", timeout=10)
    assert error.value.code == 401


def cil(cluster: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [BIN / "python", "-m", "jobs", "submit", "--address", cluster, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_who_has_no_token_or_a_wrong_one_is_told_where_to_get_it(cluster, environment, tmp_path):
    mine = {key: value for key, value in environment.items() if key != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    for token, told in (("", "the cluster wants its token"), ("mine", "this token is not the cluster's; the cluster")):
        done = cil(cluster, mine | {"RAY_AUTH_TOKEN": token}, "make_shapes", f"out={tmp_path}")
        assert done.returncode == 2
        assert done.stderr.startswith(f"submit: {cluster}: {told}")
        assert done.stderr.count("\n") == 1


def test_a_relative_folder_would_be_lost_with_the_job_and_is_refused(cluster, environment):
    done = submit(cluster, environment, "python", "-m", "jobs.make_shapes", "out=relative")
    assert done.returncode != 0
    assert "out=relative: in a submitted job it must be an absolute path" in done.stdout


@pytest.fixture(scope="module")
def shapes(cluster, environment, tmp_path_factory) -> Path:
    """Made by a submitted job, as Ray's own command submits it."""
    out = tmp_path_factory.mktemp("shared")
    done = submit(
        cluster, environment, "python", "-m", "jobs.make_shapes", "--config", "tests/smallest.yaml", f"out={out}"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def configuration(shapes) -> list[str]:
    """The file that a laptop uses too, and what follows it for any job."""
    return ["--config", "tests/smallest.yaml", f"out={shapes}", "compare.claims=[]", "generate.rows={}"]


def followed(cluster: str, environment: dict[str, str], *arguments: str) -> list[str]:
    """What is said of a job that succeeds."""
    done = cil(cluster, environment, *arguments, "--follow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def built(cluster, environment, configuration) -> str:
    """A cache, made by a submitted job; answers the first line that was said."""
    first, *_, last = followed(cluster, environment, "build_cache", *configuration)
    assert first.endswith(" is submitted")
    assert last == first.replace(" is submitted", " succeeded")
    return first


def test_a_cache_is_built_once_however_often_it_is_submitted(cluster, environment, shapes, configuration, built):
    (snapshot,) = (shapes / "cache/snapshots").iterdir()
    assert read_manifest(str(snapshot), "snapshot").counts["clips"] == 339
    again = cil(cluster, environment, "build_cache", *configuration)
    assert again.returncode == 0
    assert again.stdout.startswith(built.replace(" is submitted", " has succeeded already"))
    once_more = followed(cluster, environment, "build_cache", *configuration, "--again")
    assert once_more[0].startswith(built.replace(" is submitted", "-2 is submitted, as "))
    assert any("nothing to do" in line for line in once_more)


def test_a_training_that_is_stopped_goes_on_from_its_checkpoint(cluster, environment, shapes, configuration, built):
    rows = "finetune.rows={base: {weights: null, seeds: [0], samples: 1600, where: {}}}"
    command = ("finetune", *configuration, rows, "finetune.checkpoint_every=160")
    known_by = cil(cluster, environment, *command).stdout.split()[1]
    until(lambda: any(shapes.glob("training/base-*/*/manifest.json")))
    assert api(cluster, environment, f"{known_by}/stop", method="POST") == {"stopped": True}  # `ray job stop`
    until(lambda: api(cluster, environment, known_by)["status"] == "STOPPED", 60)
    assert not (shapes / "weights/base/manifest.json").exists()

    first, *said, last = followed(cluster, environment, *command)
    assert first == f"submit: {known_by}-2 is submitted, as {known_by} was stopped; the same command goes on"
    assert any(re.match(r"finetune base: goes on from the checkpoint at \d+ samples", line) for line in said)
    assert last == f"submit: {known_by}-2 succeeded"
    counts = read_manifest(f"{shapes}/weights/base", "weights").counts
    assert (counts["samples"], counts["steps"], counts["skipped_batches"]) == (1600, 200, 0)


def api(cluster: str, environment: dict[str, str], path: str, **options: str) -> object:
    """As Ray's own commands ask it, without the seconds that they take to start."""
    token = Path(environment["HOME"], ".ray/auth_token").read_text().strip()
    request = urllib.request.Request(
        f"{cluster}/api/jobs/{path}", headers={"Authorization": f"Bearer {token}"}, **options
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_who_follows_a_job_ends_with_its_exit_code_and_what_failed_is_submitted_anew(cluster, environment, tmp_path):
    command = ("build_cache", f"out={tmp_path}", f"catalog.csv={tmp_path}/$(none).csv", "--follow")
    first, second = (cil(cluster, environment, *command) for _ in range(2))
    for done in (first, second):
        assert done.returncode == 2, done.stdout + done.stderr
        *_, said, last = done.stdout.splitlines()
        assert said.startswith(f"build_cache: catalog.csv={tmp_path}/$(none).csv: there is no such file")
        assert last.endswith("failed with exit code 2")
    known_by = first.stdout.split()[1]
    told = f"submit: {known_by}-2 is submitted, as {known_by} failed with exit code 2"
    assert second.stdout.splitlines()[0] == told
    told = api(cluster, environment, known_by)["metadata"]
    assert {key: told[key] for key in ("job", "study", "out")} == {
        "job": "build_cache",
        "study": "shapes",
        "out": str(tmp_path),
    }


def test_a_job_that_is_stopped_says_so_last_and_the_same_command_finishes_it(cluster, environment, shapes, tmp_path):
    command = ["build_cache", "--config", "tests/smallest.yaml", f"out={tmp_path}", "cache.videos_per_part=1"]
    command += [f"catalog.csv={shapes}/shapes/videos.csv", f"catalog.videos={shapes}/shapes/videos", "catalog.limit=60"]
    sent = cil(cluster, environment, *command)
    assert sent.returncode == 0, sent.stderr
    known_by = sent.stdout.split()[1]
    with subprocess.Popen(
        [BIN / "python", "-m", "jobs", "submit", "--address", cluster, *command, "--follow"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as follower:
        until(lambda: any(tmp_path.glob("cache/parts/*.index")))
        assert api(cluster, environment, f"{known_by}/stop", method="POST") == {"stopped": True}  # `ray job stop`
        said = follower.communicate(timeout=60)[0].splitlines()
    assert re.fullmatch(rf"submit: {known_by} is (pending|running) already", said[0])
    assert said[-2:] == [
        "build_cache: stopped by SIGTERM; what is made stays, and the same command goes on from there",
        f"submit: {known_by} was stopped; the same command goes on",
    ]
    assert follower.returncode == 143
    assert not any(tmp_path.glob("cache/snapshots/*/manifest.json"))

    done = cil(cluster, environment, *command, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clips are there already" in done.stdout
    assert done.stdout.splitlines()[-1] == f"submit: {known_by}-2 succeeded"


def test_the_doctor_looks_at_the_cluster_that_it_is_submitted_to(cluster, environment, tmp_path):
    done = cil(cluster, environment, "doctor", f"out={tmp_path}", "--json", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("[\n") : done.stdout.rindex("]") + 1])
    assert "failed" not in {each["state"] for each in found}
    checks = {"cluster", "versions", "code", "deepspeed", "gpus", "memory", "shared memory", "disk", "clock", "out"}
    assert checks | {"tracking", "workers", "study", "weights", "all-reduce"} == {each["check"] for each in found}


def test_ray_keeps_neither_the_token_nor_a_secret_of_the_nodes(cluster, environment, folder):
    """Of what the tests above have submitted."""
    done = submit(cluster, environment, "python", "-c", "import os; print(len(os.environ['AWS_SECRET_ACCESS_KEY']))")
    assert str(len(SECRET)) in done.stdout  # the job has it
    token = Path(environment["HOME"], ".ray/auth_token").read_text().strip()
    assert {"raylet.out", "gcs_server.out", "dashboard.log"} <= {file.name for file in folder.rglob("logs/*")}
    assert telling(token, folder) == []
    assert telling(SECRET, folder) == []
