"""What a user meets first: help and mistakes, of every job, as a process."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.config import load

JOBS = sorted(p.stem for p in (Path(__file__).parents[2] / "jobs").glob("*.py") if not p.stem.startswith("_"))
SECONDS = 2.0


def run(*arguments: str) -> tuple[subprocess.CompletedProcess, float]:
    """The fastest of two: the machine may be busy."""
    took = []
    for _ in range(2):
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=60)
        took.append(time.monotonic() - begin)
    return done, min(took)


def test_there_is_a_job_for_every_station():
    stations = {
        "doctor",
        "make_shapes",
        "build_cache",
        "show_cache",
        "initial_noise",
        "finetune",
        "export",
        "generate",
        "score",
        "compare",
        "paper",
    }
    assert stations == set(JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_help_teaches_and_answers_at_once(job):
    done, seconds = run(f"jobs.{job}", "--help")
    assert done.returncode == 0
    assert f"python -m jobs.{job}" in done.stdout
    assert "keys that this job reads" in done.stdout
    assert seconds < SECONDS


@pytest.mark.parametrize(
    ("job", "key"),
    [
        ("finetune", "finetune.row.train=full: .*; one of full, unet, temporal, lora"),
        ("finetune", "finetune.row.balance=None: .*; one of motion, cut, subject, aesthetic"),
        ("finetune", r"finetune.row.where={}: [^;]*"),
        ("export", "export.checkpoint=last: .*; one of last, best"),
    ],
)
def test_help_has_the_words_that_a_key_may_have(job, key):
    done, _ = run(f"jobs.{job}", "--help")
    assert re.search(rf"^    {key}$", done.stdout, re.M)


@pytest.mark.parametrize("job", JOBS)
def test_an_unknown_key_is_one_line_exit_2_and_at_once(job):
    done, seconds = run(f"jobs.{job}", "famly.name=toy")
    assert done.returncode == 2
    assert done.stderr.strip() == f"{job}: famly: there is no such key; did you mean family?"
    assert seconds < SECONDS


def test_check_prints_the_whole_configuration_and_does_nothing(tmp_path):
    done, _ = run("jobs.make_shapes", f"out={tmp_path}", "shapes.videos=3", "--check")
    assert done.returncode == 0
    assert json.loads(done.stdout) == load(None, [f"out={tmp_path}", "shapes.videos=3"]).model_dump(mode="json")
    assert not list(tmp_path.iterdir())


def test_cil_is_the_short_form(tmp_path):
    done, _ = run("jobs", "build_cache", f"catalog.csv={tmp_path}/none.csv")
    assert done.returncode == 2
    assert f"catalog.csv={tmp_path}/none.csv: there is no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_name_holds_does_nothing_to_a_terminal_and_tells_no_secret(tmp_path):
    (tmp_path / "\x1b[2J\n.csv").write_text("1,https://me:pass@host/1.mp4?X-Signature=hidden,x\n")
    done, _ = run("jobs", "build_cache", f"catalog.csv={tmp_path}/*.csv")
    wanted = r"\x1b[2J\n.csv: has no column videoid, name; found are '1, https://host/1.mp4?..., x' in its first row"
    assert done.stderr.endswith(f"{wanted}\n")
    done, _ = run("jobs", "build_cache", "catalog.csv=nowhere://me:pass@host/a.csv?X-Signature=hidden&b=hidden")
    assert done.stderr.startswith("build_cache: catalog.csv holds a password: give S3's keys in AWS_ACCESS_KEY_ID")
    assert "hidden" not in done.stderr


def test_cil_lists_the_jobs():
    done, _ = run("jobs", "no-such-job")
    assert done.returncode == 2
    assert all(job in done.stdout for job in JOBS)


@pytest.mark.parametrize(
    ("job", "artifact"),
    [
        ("initial_noise", "latent cache"),
        ("finetune", "latent cache"),
        ("generate", "latent cache"),
        ("score", "videos"),
    ],
)
def test_a_missing_artifact_is_one_line_that_names_the_job_which_makes_it(job, artifact, tmp_path):
    done, _ = run(f"jobs.{job}", f"out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert f"the {artifact} at {tmp_path}" in done.stderr
    assert "run the job that makes it" in done.stderr
