"""Write a checkpoint as weights in the family's published layout, averaged and raw.

    python -m jobs.export --config jobs/configs/paper.yaml export.row=timenoise-101 export.checkpoint=960

jobs.finetune does this with the last one by itself.
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.export import export

    print(export(config).uri)


if __name__ == "__main__":
    command("export", __doc__, ("family", "finetune", "export"), run)
