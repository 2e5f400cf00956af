"""From a study's MLflow runs to the paper's table with intervals, in the terminal and as a page with plots and clips.

python -m jobs.compare out=outputs/try
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.compare import compare

    compare(config)


if __name__ == "__main__":
    command("compare", __doc__, ("finetune", "generate", "score", "compare", "tracking"), run)
