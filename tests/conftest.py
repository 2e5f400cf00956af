"""What several tests start from: the smallest configuration, and one undisturbed run of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import paper
from pipelines.config import Config, load

SMALLEST = Path(__file__).with_name("smallest.yaml")


@pytest.fixture(scope="session")
def smallest() -> Callable[..., Config]:
    """smallest(out, "key=value", ...) -> the smallest configuration under that folder."""
    return lambda out, *overrides: load(SMALLEST, [f"out={out}", *overrides])


@pytest.fixture(scope="session")
def road(smallest: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The whole road walked once, undisturbed. Tests read its artifacts and leave them as they are."""
    config = smallest(tmp_path_factory.mktemp("road"))
    paper.run(config)
    return config
