"""All benchmarks of this folder, or those that are named, each in its own process: `python -m benchmarks [NAME ...]`.

Their rows go into benchmarks/results.md and the README's table; those of benchmarks that were not run stay.
"""

import argparse
import json
import os
import pkgutil
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import benchmarks
from benchmarks import scale

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
APART = {"__main__", "endpoint", "random_cache", "parity", "scale"}  # parity compares figures, not speed
SOFTWARE = ("torch", "ray", "deepspeed", "av", "decord")


def run() -> int:
    every = sorted({module.name for module in pkgutil.iter_modules([str(FOLDER)])} - APART)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}; none: all")
    parser.add_argument("--quick", action="store_true", help="less of everything; the tables stay as they are")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.names} - {*every}):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(every)}")
    quick = ["--quick"] if arguments.quick else []
    rows: list[dict[str, object]] = []
    failed = []
    for name in arguments.names or every:
        print(f"benchmarks.{name} ...", file=sys.stderr)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *quick]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent, check=False)
        if done.returncode:
            failed.append(name)
        rows += [json.loads(line) | {"command": f"`python -m benchmarks.{name}`"} for line in done.stdout.splitlines()]
    if rows:
        print(benchmarks.table(rows))
    if failed:
        print(f"benchmarks: {', '.join(failed)} failed; see above. The tables stay as they were", file=sys.stderr)
    elif not quick:
        table = benchmarks.table(merged(rows, (FOLDER / "results.md").read_text()))
        (FOLDER / "results.md").write_text(_page(table))
        README.write_text(TABLE.sub(lambda _: table + "\n", README.read_text()))
        scale.write()  # which computes with them
    return len(failed) > 0


TABLE = re.compile(r"^\| name .*\n(?:\|.*\n)+", re.MULTILINE)


def merged(rows: list[dict[str, object]], page: str) -> list[dict[str, object]]:
    """With those that the page's table has of other benchmarks."""
    head, _, *lines = [_cells(line) for line in TABLE.findall(page)[0].splitlines()]
    kept: list[dict[str, object]] = [dict(zip(head, line, strict=True)) for line in lines]
    run = {row["command"] for row in rows}
    return sorted([*rows, *(row for row in kept if row["command"] not in run)], key=lambda row: str(row["command"]))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _page(table: str) -> str:
    meaning = (benchmarks.__doc__ or "").split("\n\n")[1]
    software = ", ".join(f"{name} {version(name)}" for name in SOFTWARE)
    return f"""# Benchmarks

Made by `make bench`. {meaning}

{table}

- Machine: {_machine()}
- Versions: Python {platform.python_version()}, {software}
"""


def _machine() -> str:
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    sys.exit(run())
