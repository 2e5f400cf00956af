"""The comparison's table: rows x metrics, the best of each, and which rows cannot be told from it. For people as
Markdown, for programs as CSV.

A row is compared with the best one seed by seed (paired t-test), or where fewer than two seeds are common video by
video (`cil.metrics.paired`). Which row is the best is read from the same figures, so Holm's correction counts the pairs
of all rows.
"""

import csv
import io
import itertools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cil.metrics.paired import paired
from pipelines.errors import shown
from pipelines.study import (
    CONFIDENCE,
    METRICS,
    Arm,
    Estimate,
    Metric,
    Study,
    Verdict,
    differing,
    holm,
    one_of_each,
    t_test,
)

ARROWS = {"higher": "↑", "lower": "↓", "real": "→", None: ""}
DETAILS = {"videos", "rejects", "is_sd", "hidden", "motion_lack"}  # of a run, for those who look into it
SIGNS = {"best": "", "tied": " ≈", "untested": " ?", "": ""}


@dataclass(frozen=True)
class Cell:
    estimate: Estimate | None
    mark: Literal["best", "tied", "untested", ""] = ""
    p: float | None = None  # against the best, corrected

    def __str__(self) -> str:
        return "-" if self.estimate is None else f"{self.estimate}{SIGNS[self.mark]}"


@dataclass(frozen=True)
class Column:
    name: str
    metric: Metric
    cells: dict[str, Cell]  # by row
    tests: set[str]
    unlike: str = ""  # in what rows differ that are not ranked for it

    @property
    def label(self) -> str:
        unit = f", {self.metric.unit}" if self.metric.unit else ""
        return f"{self.metric.label}{unit} {ARROWS[self.metric.better]}".rstrip()


def tabulate(study: Study) -> list[Column]:
    """Known metrics first; of those that nobody here knows neither direction nor best is told."""
    there = {name for arm in study.arms.values() for run in arm.runs.values() for name in run.data.metrics}
    ends = {f"{name}_{end}" for name in there for end in ("low", "high", "sd")}
    others = sorted(name for name in there - ends - METRICS.keys() - DETAILS if "/" not in name)
    names = [name for name in METRICS if name in there] + others
    return [_column(name, METRICS.get(name, Metric(name, None)), study) for name in names]


def _column(name: str, metric: Metric, study: Study) -> Column:
    estimates = {arm: a.estimate(name) for arm, a in study.arms.items()}
    cells, tests = {arm: Cell(estimate) for arm, estimate in estimates.items()}, set[str]()
    losses = {arm: _losses(a, name, metric) for arm, a in study.arms.items() if not a.is_real and estimates[arm]}
    losses = {arm: each for arm, each in losses.items() if each}
    if len(losses) < 2:
        return Column(name, metric, cells, tests)
    compared = [study.arms[arm] for arm in losses]
    if metric.better == "real":
        compared += [arm for arm in study.arms.values() if arm in [each.real for each in compared]]
    if names := differing(compared, name):
        return Column(name, metric, cells, tests, _unlike(compared, name, names))
    best, *others = sorted(losses, key=lambda arm: float(np.mean(list(losses[arm].values()))))
    cells[best] = Cell(estimates[best], "best")
    found: dict[str, float] = {}
    for other in others:
        seeds = sorted(losses[best].keys() & losses[other].keys())
        if len(seeds) > 1:
            found[other] = t_test([losses[other][s] - losses[best][s] for s in seeds])
            tests.add("seeds")
        elif (p := _by_videos(study.arms[other], study.arms[best], name, metric)) is not None:
            found[other] = p
            tests.add("videos")
        else:
            cells[other] = Cell(estimates[other], "untested")
    corrected = holm(list(found.values()), len(losses) * (len(losses) - 1) // 2)
    for other, p in zip(found, corrected, strict=True):
        cells[other] = Cell(estimates[other], "" if p < 1 - CONFIDENCE else "tied", p)
    return Column(name, metric, cells, tests)


def _unlike(arms: list[Arm], metric: str, names: list[str]) -> str:
    """Which rows have what, of that in which they differ."""
    said = []
    for name in names:
        having: dict[str, list[str]] = {}
        for arm in arms:
            having.setdefault(arm.measured_by(metric)[name], []).append(arm.name)
        told = "; ".join(f"{value[:12]} in {', '.join(rows)}" for value, rows in having.items())
        said.append(f"{name} ({told})")
    return " and ".join(said)


def _losses(arm: Arm, name: str, metric: Metric) -> dict[int, float]:
    """Of each seed a figure that is the lower the better; none where nothing says what is better."""
    values = arm.values(name)
    if metric.better == "real":
        real = arm.real.estimate(name) if arm.real else None
        return {seed: abs(value - real.mean) for seed, value in values.items()} if real else {}
    sign = {"lower": 1, "higher": -1, None: 0}[metric.better]
    return {seed: sign * value for seed, value in values.items()} if sign else {}


def _by_videos(ours: Arm, theirs: Arm, name: str, metric: Metric) -> float | None:
    """It says nothing of other seeds."""
    columns = one_of_each(ours, theirs, name)
    if metric.better == "real":  # the distance of a mean from the real one, as a mean over videos
        for place, arm in enumerate((ours, theirs)):
            real = arm.real.clips(arm.real.first, name) if arm.real else {}
            off = {clip: value - real[clip] for clip, value in columns[place].items() if clip in real}
            columns[place] = {clip: value * float(np.sign(sum(off.values()))) for clip, value in off.items()}
    try:
        return paired(columns[0], columns[1]).p
    except ValueError:  # fewer than two videos in common
        return None


def holes(study: Study, columns: list[Column]) -> list[str]:
    """Which figures are missing, or are not of the same thing, in words."""
    unlike: dict[str, list[str]] = {}
    for column in columns:
        if column.unlike:
            unlike.setdefault(column.unlike, []).append(column.metric.label)
    said = [f"{', '.join(of)}: no row is the best, as rows differ in {why}." for why, of in unlike.items()]
    for arm in study.arms.values():
        if rejects := sum(arm.values("rejects").values()):
            said.append(f"{arm.name}: {rejects:.0f} videos could not be scored.")
        lacking = [c.metric.label for c in columns if not arm.values(c.name)]
        if lacking and not arm.is_real:  # the real row cannot have all
            said.append(f"{arm.name}: its runs have no {', '.join(lacking)}.")
        some: dict[str, list[str]] = {}
        for column in columns:
            there = arm.values(column.name)
            if there and (without := sorted(arm.runs.keys() - there.keys())):
                some.setdefault(", ".join(map(str, without)), []).append(column.metric.label)
        said += [
            f"{arm.name}: without seed {seeds}, whose runs lack it: {', '.join(of)}." for seeds, of in some.items()
        ]
    return said


def legend(columns: list[Column]) -> list[str]:
    """How the table is to be read."""
    cells = [cell for column in columns for cell in column.cells.values()]
    said = []
    if any(cell.estimate and cell.estimate.seeds > 1 for cell in cells):
        said.append(f"Means over seeds, ± half of a {CONFIDENCE:.0%} t-interval.")
    if any(cell.estimate and cell.estimate.seeds == 1 and cell.estimate.low is not None for cell in cells):
        said.append("[ ]: the interval that was measured with the one run.")
    directions = {column.metric.better for column in columns}
    words = {"higher": "↑ higher is better", "lower": "↓ lower is better", "real": "→ nearer to the real row is better"}
    if arrows := [word for direction, word in words.items() if direction in directions]:
        said.append(f"{'; '.join(arrows)}.")
    marks, tests = {cell.mark for cell in cells}, {test for column in columns for test in column.tests}
    if "best" in marks:
        said.append("Bold: the best, the real row aside.")
    if "tied" in marks:
        said.append("≈: cannot be told from the best.")
    if "untested" in marks:
        said.append("?: not tested against it, as fewer than two seeds and no scores of single videos are common.")
    if tests:
        by = {"seeds": "paired by seed (t-test)", "videos": "of one seed, paired video by video (sign flips)"}
        pairs = " or ".join(by[test] for test in sorted(tests))
        said.append(f"Differences {pairs}, at {1 - CONFIDENCE:.0%} with Holm's correction for all pairs of rows.")
    return said


def markdown(study: Study, columns: list[Column], verdicts: list[Verdict]) -> str:
    """For the terminal, and for wherever Markdown goes."""
    rows = [["row", "seeds", *(column.label for column in columns)]]
    for arm in study.arms.values():
        cells = [column.cells[arm.name] for column in columns]
        figures = [f"**{cell}**" if cell.mark == "best" else str(cell) for cell in cells]
        rows.append([_no_markup(arm.name), str(len(arm.runs)), *figures])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    lines += ["", " ".join(legend(columns)), ""]
    lines += [f"- {v.claim.says}: **{v.word}** ({v.figures})" for v in verdicts]
    missing = [f"- {shown(note)}" for note in [*study.notes, *holes(study, columns)]]
    return "\n".join([*lines, *(["", "Missing:", "", *missing] if missing else [])]) + "\n"


def as_csv(study: Study, columns: list[Column]) -> str:
    """Of each metric the mean, both ends of its interval, and its mark."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    four = [(c.name, f"{c.name}_low", f"{c.name}_high", f"{c.name}_mark") for c in columns]
    writer.writerow(["row", "seeds", *map(_no_formula, itertools.chain(*four))])
    for arm in study.arms.values():
        line: list[object] = [_no_formula(arm.name), len(arm.runs)]
        for column in columns:
            cell = column.cells[arm.name]
            line += [cell.estimate.mean, cell.estimate.low, cell.estimate.high] if cell.estimate else [None] * 3
            line.append(cell.mark)
        writer.writerow(line)
    return target.getvalue()


def _no_markup(name: str) -> str:
    return re.sub(r"[|<`]|\](?=\()", r"\\\g<0>", name)


def _no_formula(name: str) -> str:
    """A spreadsheet runs what begins so, and whoever logs a run names it."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
