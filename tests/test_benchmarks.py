"""The tables of figures: one benchmark run anew leaves the rows of the others."""

from pathlib import Path

import benchmarks
from benchmarks.__main__ import README, TABLE, merged

ROOT = Path(__file__).parents[1]


def test_rows_of_a_benchmark_are_replaced_and_those_of_others_kept():
    old = [benchmarks.Row(f"{name}: peer", 1.0, 2.0, None, "s", 2.0, 1.0).to_dict() for name in ("a", "b", "c")]
    for row, name in zip(old, "abc", strict=True):
        row["command"] = f"`python -m benchmarks.{name}`"
    page = f"above\n\n{benchmarks.table(old)}\n\n- below\n"
    new = [old[1] | {"ours": 4.0, "ratio": 0.5, "met": False}]
    after = benchmarks.table(merged(new, page))
    assert after == benchmarks.table([old[0], new[0], old[2]])


def test_the_readme_has_the_table_of_the_results():
    assert TABLE.findall(README.read_text()) == TABLE.findall((ROOT / "benchmarks/results.md").read_text())
