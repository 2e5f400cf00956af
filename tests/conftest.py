"""What several tests start from: the smallest configuration, and one undisturbed run of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from jobs import paper
from pipelines.config import Config, load

SMALLEST = Path(__file__).with_name("smallest.yaml")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Networks here are so small that threads waiting for each other cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
