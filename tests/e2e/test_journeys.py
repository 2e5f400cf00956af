"""The README's three journeys, executed as they stand there: by one shell, in a copy of the repository.

In a network namespace of its own, as `ray start` and `mlflow ui` take their usual ports, and what they leave running is
known by it. `make setup` is left out: the environment is that of the tests.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator

import pytest
from processes import BIN, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LEFT_OUT = (".git", ".venv", "outputs", "build", "*.egg-info", ".*_cache", "__pycache__")
UI = "http://127.0.0.1:5000"  # where `mlflow ui` answers


def journeys() -> list[str]:
    """The commands of each."""
    section = (ROOT / "README.md").read_text().partition("\n## Three journeys\n")[2].partition("\n## ")[0]
    indented = [re.findall(r"(?m)^    (.*)$", part) for part in re.split(r"(?m)^\*\*\d\.", section)[1:]]
    return ["\n".join(lines) for lines in indented]


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"cil-{os.getpid()}-journeys"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace may be made here: {getattr(error, 'stderr', None) or error}")
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_the_three_journeys_of_the_readme_run_as_they_stand(namespace, tmp_path):
    cache, submit, compare = journeys()
    assert compare.splitlines()[-1].startswith("mlflow ui ")  # stays until it is interrupted
    answers = (
        f"until python -c 'import urllib.request; urllib.request.urlopen(\"{UI}\")' 2> /dev/null; do sleep 1; done"
    )
    script = "\n".join(["set -euo pipefail", cache, submit, f"{compare} &", answers, "echo MLflow answers; ss -ltnH"])
    here, ray = tmp_path / "repository", tempfile.mkdtemp(prefix="ray")  # short: Ray's sockets stand in it
    shutil.copytree(ROOT, here, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (here / ".venv/bin").mkdir(parents=True)
    shutil.copy(BIN / "activate", here / ".venv/bin")
    (tmp_path / "home").mkdir()
    environment = {"HOME": str(tmp_path / "home"), "PATH": os.defpath, "RAY_TMPDIR": ray, "PYTHONPATH": str(here)}
    environment |= {"MLFLOW_WORKERS": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # or it is a dozen processes
    try:
        with (tmp_path / "log").open("w+") as log:
            command = ["ip", "netns", "exec", namespace, "bash", "-c", script]
            done = subprocess.run(command, cwd=here, env=environment, stdout=log, stderr=log, timeout=800, check=False)
            log.seek(0)
            said = log.read()
        assert done.returncode == 0, said[-5000:]
        listening = said.partition("MLflow answers\n")[2]
        for port in (5000, 8265):  # MLflow, and Ray's dashboard
            assert re.findall(rf"(\S+):{port} ", listening) == ["127.0.0.1"], listening
        out = here / "outputs/demo"
        (page,) = out.glob("comparison/*/index.html")
        assert page.read_text().count("<video") > 0
        assert f"The page: {page}" in said
        assert sorted(p.name for p in (out / "weights").iterdir()) == [
            *("base", "naive-1", "naive-2", "timenoise-1", "timenoise-2")
        ]
    finally:
        shutil.rmtree(ray, ignore_errors=True)
