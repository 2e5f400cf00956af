"""The whole road on embedded defaults: shapes, latent cache, initial noise, training, generation, scores, comparison.

    python -m jobs.paper                                  # jobs/configs/paper.yaml
    python -m jobs.paper out=outputs/other seed=7
    python -m jobs.paper --full                           # two base models, fifteen seeds, fresh data

Run again: goes on where it was interrupted.
"""

import time
from pathlib import Path

from pipelines.command import command
from pipelines.config import Config

FULL = [
    "out=outputs/paper-full",
    "seed=1",
    "shapes.videos=3600",
    "finetune.row.samples=960",
    "finetune.rows.base.samples=5600",
    "generate.clips=128",
    "generate.reference=640",
    "score.leakage=16",
    "finetune.rows.base.seeds=[1, 2]",
    f"finetune.row.seeds={[*range(201, 216)]}",
    "tracking.experiment=paper in miniature, full",
    "compare.note=A small model and synthetic videos show whether the mechanism works, not how well it works at scale. "
    "Settings and claims were written down before these data, the two base models and these seeds were made "
    "(docs/log.md). Seeds begin from the two in turn.",
]
FILE = str(Path(__file__).with_name("configs") / "paper.yaml")
SECTIONS = ("family", "shapes", "cache", "finetune", "generate", "score", "compare", "tracking")


def run(config: Config) -> None:
    from pipelines.cache import build_cache
    from pipelines.compare import compare
    from pipelines.finetune import finetune
    from pipelines.generate import generate, refuse_impossible_rows
    from pipelines.initial_noise import make_initial_noise
    from pipelines.make_shapes import make_shapes
    from pipelines.score import score

    refuse_impossible_rows(config)  # before hours are spent on what they would start from
    took = {}
    for step in (make_shapes, build_cache, make_initial_noise, finetune, generate, score, compare):
        begin = time.monotonic()
        print(f"\n== {step.__name__}", flush=True)
        step(config)
        took[step.__name__] = time.monotonic() - begin
        print(f"{step.__name__} took {took[step.__name__]:.0f} s", flush=True)
    print("\nwall time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items()), end="")
    print(f"; in all {sum(took.values()):.0f} s")


if __name__ == "__main__":
    command("paper", __doc__, SECTIONS, run, file=FILE, flags={"--full": FULL})
