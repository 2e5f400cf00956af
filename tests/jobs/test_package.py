"""What `ray job submit --working-dir .` sends, made by Ray's own packaging; and what a node is to install."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]


def names_in(folder: Path, package: Path) -> set[str]:
    create_package(str(folder), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        return set(archive.namelist())


def test_the_package_is_small_and_holds_what_jobs_need(tmp_path):
    names = names_in(ROOT, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < 2 * 2**20  # Ray refuses 100 MiB
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = {name for name in tracked if name.startswith(("cil/", "pipelines/", "jobs/", "infra/"))}
    assert needed | {"constraints.txt", "tests/smallest.yaml"} <= names
    assert not [name for name in names if name.startswith(("docs/", "benchmarks/", "tests/cil/", ".git/", ".venv/"))]


@pytest.fixture
def folder(tmp_path) -> Path:
    """As somebody's who has worked in it."""
    folder = tmp_path / "repository"
    for name in ("jobs/finetune.py", "study.yaml", ".venv/big.so", "outputs/paper/x.arrow", "mlruns/0/meta.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name in ("a.mp4", "shard.tar", "model.ckpt", "model.pt", "model.safetensors", ".git", ".env", "s3.env"):
        (folder / name).write_text("x")
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_neither_outputs_nor_weights_nor_videos_nor_passwords_are_sent(folder, tmp_path):
    files = {name for name in names_in(folder, tmp_path / "package.zip") if not name.endswith("/")}
    assert files == {"jobs/finetune.py", "study.yaml", ".rayignore", ".gitignore"}


def test_a_change_of_code_is_another_package_and_one_of_outputs_is_not(folder):
    """One name for all states would have the cluster run old code."""
    before = get_uri_for_directory(str(folder), include_gitignore=True)
    (folder / "outputs/paper/x.arrow").write_text("y")
    assert get_uri_for_directory(str(folder), include_gitignore=True) == before
    (folder / "jobs/finetune.py").write_text("y")
    assert get_uri_for_directory(str(folder), include_gitignore=True) != before


def test_the_runtime_environment_is_what_the_project_depends_on_as_constraints_pin_it():
    told = yaml.safe_load((ROOT / "infra/runtime-env.yaml").read_text())
    assert RuntimeEnv(**told).to_dict()["pip"]["packages"] == told["pip"]["packages"]
    constraints, *packages = told["pip"]["packages"]
    assert constraints == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert set(packages) <= set((ROOT / "constraints.txt").read_text().split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for name in extras["all"][0][4:-1].split(",") for each in extras[name])]
    names = {re.match(r"[\w-]+", each)[0] for each in wanted}
    assert {package.partition("==")[0].lower() for package in packages} == names - {"torch", "ray"}  # the image's
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet", "--no-deps", *packages]
    subprocess.run(pip, check=True)
