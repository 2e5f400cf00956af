"""What listens to a network, what runs in a Ray of our own, and that nothing is installed which nobody has chosen."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

STARTS = """
import contextlib, json, os, psutil, ray
from pipelines import cluster
cluster.connect()

def worker():
    import beside, sys
    return [beside.__file__, os.environ["TOLD"], sys.executable]

ran = ray.get(ray.remote(worker).remote())
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
found, commands = [], []
for process in family:
    with contextlib.suppress(psutil.NoSuchProcess):  # some are gone by now
        commands.append(" ".join(process.cmdline()))
        found += [each.laddr for each in process.net_connections("inet") if each.status == "LISTEN"]
print(json.dumps([found, commands, ran]))
"""


@pytest.mark.slow  # starts a cluster
def test_a_ray_of_our_own_listens_to_this_machine_alone_and_its_workers_run_what_the_driver_does(tmp_path):
    (tmp_path / "beside.py").touch()
    told = {"cwd": tmp_path, "env": os.environ | {"TOLD": "something"}}
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, check=True, **told)
    addresses, commands, ran = json.loads(done.stdout.splitlines()[-1])
    assert len(addresses) > 4
    for nobody_needs in ("ray-dashboard-", "/monitor.py", "/log_monitor.py"):
        assert not any(nobody_needs in command for command in commands), nobody_needs
    assert [address for address in addresses if address[0] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []
    assert ran == [str(tmp_path / "beside.py"), "something", sys.executable]


def pinned() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = [re.fullmatch(r"([\w.-]+)==([\w.!]+)", line) for line in lines if line]
    assert None not in pins, "a line that is no pin"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def wanted() -> Iterator[Requirement]:
    """Everything that pyproject.toml asks for, with what that asks for in turn."""
    groups = PYPROJECT["project"]["optional-dependencies"].values()
    queue = [*PYPROJECT["build-system"]["requires"], *PYPROJECT["project"]["dependencies"]]
    queue = [Requirement(each) for each in [*queue, *(each for group in groups for each in group)]]
    seen = set()
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen or key[0] == "cil":
            continue
        seen.add(key)
        yield requirement
        try:
            asks = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform, or of the build alone
            continue
        for each in map(Requirement, asks):
            extras = requirement.extras or {""}
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(each)


def test_every_dependency_has_one_version_that_was_chosen():
    """Here, or as CUDA's packages by torch itself."""
    pins = pinned()
    free = {each.name for each in wanted() if not any(limit.operator == "==" for limit in each.specifier)}
    assert sorted(name for name in free if canonicalize_name(name) not in pins) == []


def test_the_versions_that_were_chosen_are_those_that_are_tested_here():
    other = {}
    for name, version in pinned().items():
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        if found != version:
            other[name] = f"{found}, not {version}"
    assert other == {}


def test_what_packages_are_built_with_is_chosen_too():
    """pip makes environments of its own to build in, which an option of the command line does not reach."""
    setup = (ROOT / "infra/setup.sh").read_text()
    assert re.search(r"^export PIP_CONSTRAINT=\"\$PWD/constraints.txt\" PIP_BUILD_CONSTRAINT=", setup, re.M)
    built = {canonicalize_name(Requirement(each).name) for each in PYPROJECT["build-system"]["requires"]}
    assert built <= pinned().keys()


def test_no_shell_is_given_a_word_of_anybody():
    """No process is started through a shell, nothing is evaluated, and nothing is unpickled but through our readers."""
    forbidden = re.compile(
        r"shell=True|os\.system|os\.popen|(?<![\w.])(eval|exec)\(|pickle\.loads?\(|weights_only=False|yaml\.(load|unsafe_load|full_load)\("
        r"|allow_pickle=True|trust_remote_code=True|verify=False"
    )
    found = []
    for folder in ("cil", "pipelines", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            found += [
                f"{path.name}: {line.strip()}" for line in path.read_text().splitlines() if forbidden.search(line)
            ]
    assert found == []
