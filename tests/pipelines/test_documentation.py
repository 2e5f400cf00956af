"""docs/configuration.md and docs/troubleshooting.md say what the code does."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.reference import page

ROOT = Path(__file__).parents[2]
TROUBLES = (ROOT / "docs/troubleshooting.md").read_text()
# Each error, and of one that is not ours the file of the package that says it.
ERRORS = re.findall(r"^### `(.+)`\n\n(?:\w+: `([\w./]+)`\n)?", TROUBLES, re.M)
ANY = "\0"  # where a message has a value


def test_the_reference_of_the_configuration_is_that_of_the_code():
    made = (ROOT / "docs/configuration.md").read_text()
    assert made == page(), "python -m pipelines.reference > docs/configuration.md"


def test_every_key_has_a_meaning():
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", page(), re.M)
    assert len(rows) > 100
    assert [key for key, meaning in rows if not meaning] == []


def messages(source: str) -> Iterator[str]:
    """All texts of a program, as they are when pieces that stand side by side are joined."""
    tree = ast.parse(source)
    inner = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(value.value) if isinstance(value, ast.Constant) else ANY for value in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


@pytest.fixture(scope="module")
def said_here() -> list[str]:
    files = [file for folder in ("cil", "pipelines", "jobs") for file in (ROOT / folder).rglob("*.py")]
    return [message for file in files for message in messages(file.read_text())]


@pytest.mark.parametrize(("error", "file"), ERRORS)
def test_an_error_of_the_troubleshooting_is_said_in_these_words(error, file, said_here):
    fixed = re.compile(".*".join(map(re.escape, error.split("..."))), re.S)
    said = said_here
    if file:
        package, _, rest = file.partition("/")
        found = importlib.util.find_spec(package)
        said = messages((Path(found.origin).parent / rest).read_text())
    assert any(fixed.search(message) for message in said), f"nothing says: {error}"


def test_every_error_of_the_troubleshooting_is_read_and_has_what_to_do():
    assert len(ERRORS) == TROUBLES.count("\n### ") == len({error for error, _ in ERRORS}) >= 30
    for error, text in re.findall(r"^### (.+)\n\n(?:\w+: `.*`\n\n)?((?:.+\n?)+)", TROUBLES, re.M):
        assert len(text) > 40, error
