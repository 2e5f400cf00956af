"""Fine-tune with TimeNoise (or without) from a latent cache: Ray Train drives DeepSpeed ZeRO. No weights: pre-train.

    python -m jobs.finetune out=outputs/try finetune.row.samples=1600
    python -m jobs.finetune --config jobs/configs/paper.yaml          # all rows of a study, one worker group

Run again: goes on from the last checkpoint, or does nothing.
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.finetune import finetune

    for manifest in finetune(config).values():
        print(manifest.uri)


if __name__ == "__main__":
    command("finetune", __doc__, ("family", "finetune", "tracking"), run)
