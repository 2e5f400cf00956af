"""Score sets of videos, the study's and others: per video, and per set into MLflow (docs/evaluation.md has the list).

python -m jobs.score out=outputs/try
python -m jobs.score out=outputs/try score.videos='{ours: /data/ours}' score.reference=/data/webvid    # no study needed
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.score import score

    for manifest in score(config).values():
        print(manifest.uri)


if __name__ == "__main__":
    command("score", __doc__, ("family", "finetune", "generate", "score", "tracking"), run)
