"""All benchmarks of this folder, each in its own process, into benchmarks/results.md: `python -m benchmarks`."""

import argparse
import json
import os
import pkgutil
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import benchmarks

FOLDER = Path(__file__).parent
APART = {"__main__", "endpoint", "random_cache", "parity"}  # parity compares figures, not speed
SOFTWARE = ("torch", "ray", "deepspeed", "av", "decord")


def run() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything; results.md stays as it is")
    quick = ["--quick"] if parser.parse_args().quick else []
    rows: list[dict[str, object]] = []
    failed = []
    modules = (module.name for module in pkgutil.iter_modules([str(FOLDER)]))
    for name in sorted(set(modules) - APART):
        print(f"benchmarks.{name} ...", file=sys.stderr)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *quick]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent, check=False)
        if done.returncode:
            failed.append(name)
        for line in done.stdout.splitlines():
            rows.append(json.loads(line) | {"command": f"`python -m benchmarks.{name}`"})
    if not quick and not failed:
        (FOLDER / "results.md").write_text(_page(rows))
    if rows:
        print(benchmarks.table(rows))
    if failed:
        print(f"benchmarks: {', '.join(failed)} failed; see above. results.md stays as it was", file=sys.stderr)
    return len(failed) > 0


def _page(rows: list[dict[str, object]]) -> str:
    meaning = (benchmarks.__doc__ or "").split("\n\n")[1]
    software = ", ".join(f"{name} {version(name)}" for name in SOFTWARE)
    return f"""# Benchmarks

Made by `make bench`. {meaning}

{benchmarks.table(rows)}

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
