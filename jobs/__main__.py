"""`cil NAME ...` is `python -m jobs.NAME ...`; `cil submit NAME ...` has a Ray cluster do it."""

import runpy
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
USAGE = f"""usage: cil NAME [--config FILE] [key=value ...]; `cil NAME --help` says more
       cil submit NAME [--config FILE] [key=value ...]; `cil submit --help` says more
NAME: {", ".join(NAMES)}"""


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name == "submit":
        from pipelines.submit import main as submit

        submit(sys.argv[2:], NAMES)
        return
    if name not in NAMES:
        print(USAGE)
        sys.exit(0 if name in ("", "-h", "--help") else 2)
    del sys.argv[1]
    runpy.run_module(f"jobs.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
