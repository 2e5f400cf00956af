"""Benchmarks: `python -m benchmarks.NAME [--json] [--quick]` runs one, `python -m benchmarks` all into results.md.

A row sets ours beside a peer, measured in the same run and in turn, because machines are shared and their speed drifts.
`ratio` says how many times better ours is: ours / peer for a rate (the unit has "/s"), peer / ours for a time. It is
the median over rounds of the ratio within a round, so it differs a little from the quotient of the medians shown.
`limit` is what ours could reach at best, in the same unit; a row whose peer is the limit says how near we are.
`goal` is the least ratio that is good enough.

With --json each row is one line: name, ours, peer, limit, unit, ratio, goal, met; limit, goal and met may be null.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    name: str
    ours: float
    peer: float
    limit: float | None
    unit: str
    ratio: float
    goal: float | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"met": None if self.goal is None else self.ratio >= self.goal}


def alternately(
    *calls: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each call in each round. Each round begins with another one, and a first round is thrown away."""
    seconds: list[list[float]] = [[] for _ in calls]
    for r in range(rounds + 1):
        for i in sorted(range(len(calls)), key=lambda i: (i - r) % len(calls)):
            begin = clock()
            calls[i]()
            if r:
                seconds[i].append(clock() - begin)
    return seconds


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return float(median(n / d for n, d in zip(numerators, denominators, strict=True)))


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown, in columns that line up."""
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def main(about: str, measure: Callable[[bool], list[Row]]) -> None:
    """The command line of a benchmark: `measure(quick)` answers its rows."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--quick", action="store_true", help="less of everything: a look, not a result")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # what is measured may print; stdout is for the rows
        rows = [row.to_dict() for row in measure(arguments.quick)]
    print("\n".join(map(json.dumps, rows)) if arguments.json else table(rows))
