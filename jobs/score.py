"""Score the generated videos, each and in sets: motion, static share, first-frame error, Frechet distance; to MLflow.

python -m jobs.score out=outputs/try
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.score import score

    for manifest in score(config).values():
        print(manifest.uri)


if __name__ == "__main__":
    command("score", __doc__, ("finetune", "generate", "score", "tracking"), run)
