"""Look at the whole cluster before hours are spent on it: one line for each check, with what to do.

    python -m jobs.doctor --config study.yaml out=/shared/run1
    python -m jobs.doctor --config study.yaml out=/shared/run1 --json

Exit code 0: nothing failed, though there may be warnings; 2: something did. What is looked at: docs/submitting.md.
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.doctor import doctor

    doctor(config)


if __name__ == "__main__":
    sections = ("doctor", "family", "catalog", "finetune", "tracking")
    command("doctor", __doc__, sections, run, flags={"--json": ["doctor.as_json=true"]})
