"""infra/Dockerfile and the shell scripts, by their linters; what is installed is what constraints.txt pins."""

import re
import subprocess
import tomllib
from fnmatch import fnmatch

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import BIN, ROOT

DOCKERFILE = (ROOT / "infra/Dockerfile").read_text().replace("\\\n", " ")
SCRIPTS = [*ROOT.glob("infra/*.sh"), ROOT / ".ci/run"]
PINNED = {canonicalize_name(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n((?:(?!FROM ).*\n)*)", DOCKERFILE, re.MULTILINE))


def test_hadolint_has_nothing_to_say():
    done = subprocess.run([BIN / "hadolint", ROOT / "infra/Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_runs_is_nobody_in_particular():
    for target in ("cpu", "cuda", "mlflow"):
        assert re.findall(r"^USER (.*)$", STAGES[target], re.MULTILINE) == ["1000:1000"]


def test_bases_are_pinned_and_bring_the_python_that_we_test_with():
    bases = {base for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if base not in STAGES}
    (base,) = bases
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)


def test_every_package_is_pinned():
    for text in (DOCKERFILE, (ROOT / "infra/install.sh").read_text()):
        for line in re.findall(r"^.*pip install .*$", text, re.MULTILINE):
            assert "--constraint constraints.txt" in line
    named = re.search(r"pip install --constraint constraints.txt (.*)", STAGES["build-mlflow"])[1].split()
    named += re.search(r"pip install --constraint constraints.txt (.*)", (ROOT / "infra/install.sh").read_text())[
        1
    ].split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    named += [Requirement(each).name for each in wanted]
    assert not [name for name in named if canonicalize_name(name) not in PINNED | {"cil"}]


def test_the_image_gets_what_it_copies_and_nothing_that_somebody_left_in_the_folder():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all((ROOT / path).exists() for path in kept)
    assert not [path for path in kept if fnmatch(".env", path) or path in (".git", "outputs", "infra")]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert all(source in [*kept, "."] for line in copied for source in line.split())
    floors = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    assert floors | {"infra/deepspeed"} <= {*kept}
