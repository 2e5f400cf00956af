"""From MLflow runs to the paper's table with intervals, in the terminal and as a page with plots and clips.

    python -m jobs.compare out=outputs/try                                  # the rows of this configuration
    python -m jobs.compare out=outputs/all tracking.uri=http://mlflow:5000 compare.experiment=webvid \\
        compare.filter='params.`row.M` = "940.0"'                           # runs by themselves, whoever made them
    python -m jobs.compare out=outputs/two tracking.uri=http://mlflow:5000 compare.runs=[0123abcd,4567ef01]
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.compare import compare

    compare(config)


if __name__ == "__main__":
    command("compare", __doc__, ("finetune", "generate", "score", "compare", "tracking"), run)
