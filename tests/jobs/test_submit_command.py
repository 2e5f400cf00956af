"""What `cil submit` refuses before anything is sent, and what it sends."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.submit import _runtime_env, identity, refuse_secrets

ROOT = Path(__file__).parents[2]


def submit(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs", "submit", *arguments]
    told = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=kept | told | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["finetune", "out=x"], "finetune: out=x: in a submitted job it must be an absolute path"),
        (["finetune", "out=/x", "famly.name=toy"], "finetune: famly: there is no such key; did you mean family?"),
        (["finetune", "out=/x", "--config", "/etc/hostname"], "submit: --config /etc/hostname: only what is in "),
        (["paper", "out=/x", "--full", "tracking.uri=http://me:hidden@host"], "paper: tracking.uri holds a password"),
        (["make_shapes", "out=/x", "--runtime-env", "none.yaml"], "submit: --runtime-env none.yaml: cannot be read"),
        (["make_shapes", "out=/x", "--address", "http://127.0.0.1:9"], "submit: http://127.0.0.1:9: no Ray dashboard"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_sent(arguments, said):
    done = submit(*arguments)
    assert done.returncode == (1 if "dashboard" in said else 2)
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert "hidden" not in done.stderr


def test_a_folder_without_our_jobs_is_not_sent(tmp_path):
    done = submit("make_shapes", "out=/x", cwd=tmp_path)
    assert done.returncode == 2
    assert "run from the repository" in done.stderr


def test_a_secret_is_not_kept_with_the_job(tmp_path):
    for word in ("compare.note=https://me:hidden@host/a", "compare.note=s3://b/a?X-Amz-Signature=hidden"):
        with pytest.raises(UserError, match=r"^compare\.note: a URL with a user, a password") as error:
            refuse_secrets(["python", "-m", "jobs.compare", word])
        assert "hidden" not in str(error.value)
    refuse_secrets(["compare.note=why? s3://b/a=b, a@b"])
    for told, name in (
        ("env_vars: {AWS_SECRET_ACCESS_KEY: hidden}", "env_vars.AWS_SECRET_ACCESS_KEY"),
        ("env_vars: {SSH_PRIVATE_KEY: hidden}", "env_vars.SSH_PRIVATE_KEY"),
        ("env_vars: {MYSQL_PWD: hidden}", "env_vars.MYSQL_PWD"),
        ("env_vars: {PIP_INDEX_URL: 'https://me:hidden@host/simple'}", "env_vars.PIP_INDEX_URL"),
        ("pip: [one, 'https://hidden@host/two.whl']", "pip.1"),
    ):
        (tmp_path / "env.yaml").write_text(told)
        with pytest.raises(UserError, match=re.escape(f"{name} would be kept with the job")) as error:
            _runtime_env(str(tmp_path / "env.yaml"))
        assert "hidden" not in str(error.value)
    assert _runtime_env("infra/runtime-env.yaml")


def test_the_same_job_configuration_and_out_have_the_same_id():
    config = {"seed": 0, "out": "/x"}
    assert identity("score", config) == identity("score", {"out": "/x", "seed": 0})
    others = {
        identity("finetune", config),
        identity("score", config | {"seed": 1}),
        identity("score", config | {"out": "/y"}),
    }
    assert len(others | {identity("score", config)}) == 4


@dataclass
class Dashboard:
    """Of Ray's API what a submission needs, to see what reaches it."""

    address: str = ""
    submitted: list[dict] = field(default_factory=list)
    succeeded: bool = False  # what is submitted does at once
    failing: int = 0  # of the next requests for the list of jobs

    def jobs(self) -> list[dict]:
        status = "SUCCEEDED" if self.succeeded else "RUNNING"
        return [{"type": "SUBMISSION", "status": status, **asked} for asked in self.submitted]


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    told = Dashboard()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/api/jobs/":
                self.answer({"ray_version": "2.60.0"})
            elif told.failing:
                told.failing -= 1
                self.answer("the head is about to go", status=503)
            else:
                self.answer(told.jobs())

        def do_POST(self) -> None:
            told.submitted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer({"job_id": "1", "submission_id": told.submitted[-1]["submission_id"]})

        def answer(self, value: object, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told.address = f"http://127.0.0.1:{server.server_port}"
        yield told
        server.shutdown()


def test_what_is_done_is_not_done_again_but_a_doctor_looks_anew(dashboard, tmp_path):
    dashboard.succeeded = True
    for job, ends in (("make_shapes", ["", ""]), ("doctor", ["", "-2"])):
        dashboard.submitted.clear()
        answers = [submit(job, f"out={tmp_path}", "--address", dashboard.address).stdout for _ in ends]
        first, *others = (asked["submission_id"] for asked in dashboard.submitted)
        assert [first + end for end in ends if end] == others
        assert [answer.split()[1] for answer in answers] == [first + end for end in ends]


def test_a_cluster_that_cannot_say_its_jobs_for_a_moment_is_asked_again(dashboard, tmp_path):
    dashboard.failing = 2
    done = submit("make_shapes", f"out={tmp_path}", "--address", dashboard.address)
    assert done.returncode == 0, done.stderr
    assert (len(dashboard.submitted), dashboard.failing) == (1, 0)


def test_what_is_asked_for_reaches_the_cluster(dashboard, tmp_path):
    address, submitted = dashboard.address, dashboard.submitted
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    (tmp_path / "study.yaml").write_text("tracking: {experiment: mine}")
    (tmp_path / "env.yaml").write_text("env_vars: {NCCL_DEBUG: INFO}")
    resources = ["--entrypoint-num-cpus", "2", "--entrypoint-num-gpus", "0.5", "--entrypoint-memory", "1000"]
    resources += ["--entrypoint-resources", '{"head": 1}', "--runtime-env", "env.yaml", "--address", address]
    job = [
        "build_cache",
        "--config",
        str(tmp_path / "study.yaml"),
        "out=/x",
        "catalog.csv=/a b/$(c);d.csv",
        "--dry-run",
    ]
    done = submit(*job, *resources, cwd=tmp_path, RAY_API_SERVER_ADDRESS="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    (asked,) = submitted
    command = "python -m jobs.build_cache --config study.yaml out=/x 'catalog.csv=/a b/$(c);d.csv' --dry-run"
    assert asked["entrypoint"] == command
    assert asked["metadata"] == {"job": "build_cache", "study": "mine", "out": "/x"}
    assert asked["runtime_env"]["env_vars"] == {"NCCL_DEBUG": "INFO"}
    assert asked["runtime_env"]["working_dir"].startswith("gcs://")
    numbers = ("num_cpus", "num_gpus", "memory", "resources")
    assert [asked[f"entrypoint_{name}"] for name in numbers] == [2, 0.5, 1000, {"head": 1}]
    assert done.stdout.startswith(f"submit: {asked['submission_id']} is submitted\n")
