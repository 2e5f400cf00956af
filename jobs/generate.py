"""Sample videos from images, or from the first frames of held-out clips: a set for each row, weights x M x start.

    python -m jobs.generate out=outputs/try generate.clips=16
    python -m jobs.generate out=outputs/photos generate.images=photos generate.fps=8 \\
        family.name=svd family.preset=512 family.weights=/models/svd \\
        'generate.rows={svd: {weights: published, sweep: {M: [100, 700], motion: [20, 127]}}}'

Each set is videos/ROW: the mp4 files, index.jsonl that says what made each, and rejects.jsonl of images that could not
be read. Images of one's own need no cache. Run again: makes the videos that are missing, or does nothing.
docs/evaluation.md has more.
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.generate import generate

    for manifest in generate(config).values():
        print(manifest.uri)


if __name__ == "__main__":
    command("generate", __doc__, ("family", "finetune", "initial_noise", "generate"), run)
