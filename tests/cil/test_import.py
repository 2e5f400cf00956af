"""cil is for people who have never heard of Ray: importing it costs next to nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cil

HEAVY = {"matplotlib", "ray", "mlflow", "deepspeed", "s3fs", "diffusers", "cv2", "pyarrow", "pydantic", "scipy"}

PROGRAM = """
import json, sys, time
import numpy, torch
before = set(sys.modules)
begin = time.perf_counter()
import cil
seconds = time.perf_counter() - begin
import importlib, pkgutil
names = [module.name for module in pkgutil.walk_packages(cil.__path__, "cil.")]
for name in names:
    importlib.import_module(name)
added = {module.split(".")[0] for module in set(sys.modules) - before}
print(json.dumps({"seconds": seconds, "modules": names, "added": sorted(added)}))
"""


@pytest.fixture(scope="module")
def imports() -> list[dict]:
    """Three fresh processes that import torch and numpy, and only then cil and everything in it."""
    root = Path(cil.__file__).parents[1]
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    return [json.loads(run.stdout) for run in runs]


def test_importing_cil_and_everything_in_it_loads_nothing_heavy(imports):
    assert {
        "cil.families.toy",
        "cil.nets.toy",
        "cil.recipes",
        "cil.pictures",
        "cil.metrics.motion",
        "cil.samplers",
    } <= set(imports[0]["modules"])
    assert HEAVY & set(imports[0]["added"]) == set()


def test_importing_cil_adds_less_than_a_third_of_a_second_to_importing_torch(imports):
    assert min(run["seconds"] for run in imports) < 0.3


def test_everything_that_cil_offers_is_there():
    assert [name for name in cil.__all__ if not hasattr(cil, name)] == []
