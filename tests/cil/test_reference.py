"""docs/reference.md, which says where we part from the authors' code and what holds us to it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (\d+) \|.*\| `(test_\w+)` \|$", (ROOT / "docs/reference.md").read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def tests_there_are() -> set[str]:
    return {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }


@pytest.mark.parametrize(("number", "test"), ROWS)
def test_a_row_names_a_test_that_exists(number, test, tests_there_are):
    assert test in tests_there_are


def test_every_row_is_read_and_none_stands_twice():
    lines = [line for line in (ROOT / "docs/reference.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(ROWS) == len(lines) == len({number for number, _ in ROWS}) >= 25
