"""Hostile words in captions, ids and names of runs, wherever they are shown: a page, a plot, a terminal, Markdown."""

import re
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes

from pipelines import page
from pipelines.errors import UserError, shown
from pipelines.plots import _figure, _legend
from pipelines.side_by_side import SideBySide
from pipelines.study import Arm, Study
from pipelines.table import markdown

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</pre></table><iframe src=//evil>",
    "$(touch ran)`touch ran`; rm -rf / #",
    "$title ${verdicts} $$",
    "\x1b]0;owned\x07\x1b[2J\x9b31m",
    "a\nb\r\u202ecod\u2066",
    "%s %(x)d {0} {x}",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_a_page_says_it_and_does_nothing_of_it(word):
    clips = SideBySide(0, {word: [None]}, [word], [word])
    parts = [page._head(word), page._missing([word]), page._list([word]), page._clips(clips)]
    for part in parts:
        assert not re.search(r"<(script|img|iframe)", part)
        seen = re.sub(r"<[^>]*>", "", part)  # what is left is text, which has no < of its own
        assert "<" not in seen
    assert "<video" not in page._clips(clips)


@pytest.mark.parametrize("word", [*HOSTILE, r"$\\frac{$", "$a$"])
def test_a_plot_has_it_as_a_label(word):
    def draw(axes: Axes) -> None:
        axes.plot([0, 1], label=shown(word))
        _legend(axes)

    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(_figure("said", draw)).iter()}
    assert not tags & {"script", "img", "iframe", "foreignObject", "a"}


@pytest.mark.parametrize("word", HOSTILE)
def test_a_terminal_shows_it_in_one_line_and_does_nothing_of_it(word):
    for said in (shown(word), str(UserError(f"{word}: there is nothing"))):
        assert said.isprintable()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a|b", r"a\|b"),
        ("<script>", r"\<script>"),
        ("[click](javascript:alert(1))", r"[click\](javascript:alert(1))"),
        ("`touch ran`", r"\`touch ran\`"),
        ("naive (seeds=[0, 1])", "naive (seeds=[0, 1])"),
    ],
)
def test_a_row_of_a_markdown_table_has_no_markup_of_its_name(name, written):
    assert f"| {written} " in markdown(Study("study", {name: Arm(name)}, []), [], [])
