"""Figures and inputs of the reference implementation (golden/README.md)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.fill import fill
from tiny import PUBLISHED, SIZE, encoded
from torch import Tensor

from cil.families import Family, load


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    folder = Path(__file__).with_name("golden")
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="session")
def reference_input() -> Callable[..., torch.Tensor]:
    """reference_input(name, *shape): the standard normal float32 tensor that the reference was given by this name."""
    # numpy does not promise the same normals in every version: say so here, rather than blame a formula.
    first = fill("input:x", (2, 8, 4, 8, 12)).flatten()[:3].tolist()
    assert first == pytest.approx([-0.114341155, -0.342873096, 0.95981586], rel=1e-6), "numpy's normals have changed"
    return lambda name, *shape: torch.from_numpy(fill(f"input:{name}", shape))


@pytest.fixture(scope="module")
def plain() -> dict[str, Family]:
    return {name: load(name, *SIZE) for name in PUBLISHED}


@pytest.fixture(scope="module")
def batches(plain) -> dict[str, dict[str, Tensor]]:
    return {name: encoded(family) for name, family in plain.items()}


@pytest.fixture(scope="module", params=PUBLISHED)
def name(request) -> str:
    return request.param
