"""Sample videos from the first frames of held-out clips, a set for each row: weights x M x start.

    python -m jobs.generate out=outputs/try generate.clips=16

Run again: makes the videos that are missing, or does nothing.
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.generate import generate

    for manifest in generate(config).values():
        print(manifest.uri)


if __name__ == "__main__":
    command("generate", __doc__, ("family", "finetune", "generate"), run)
