"""A study as the jobs before jobs.compare leave it, in a second: runs in a SQLite store, videos, scores, manifests."""

import json

import numpy as np

from pipelines import storage
from pipelines.artifact import Artifact
from pipelines.config import Config, load
from pipelines.generate import REAL
from pipelines.score import evaluation
from pipelines.tracking import Run
from pipelines.video import encode

SEEDS = [11, 12, 13]
ROWS = {
    "base": {"weights": "base"},
    "naive": {"weights": "naive"},
    "early-start-850": {"weights": "naive", "M": 850},
    "early-start-700": {"weights": "naive", "M": 700},
    "analytic-init-850": {"weights": "naive", "M": 850, "start": "analytic"},
    "analytic-init-700": {"weights": "naive", "M": 700, "start": "analytic"},
    "timenoise-half": {"weights": "timenoise-half"},
    "timenoise": {"weights": "timenoise"},
}
MOTION = {REAL: 0.19, "base": 0.03, "naive": 0.12, "early-start-850": 0.124, "early-start-700": 0.128}
MOTION |= {"analytic-init-850": 0.12, "analytic-init-700": 0.114, "timenoise-half": 0.14, "timenoise": 0.153}
FRECHET = {"base": 3.07, "naive": 1.4, "early-start-850": 1.3, "early-start-700": 1.1, "analytic-init-850": 1.25}
FRECHET |= {"analytic-init-700": 1.12, "timenoise-half": 1.3, "timenoise": 1.22, REAL: 0.05}
SHOWN = 4  # videos; further clips have scores only
CLAIMS = [
    ("TimeNoise moves more than naive fine-tuning", "timenoise", "naive", "motion", "higher"),
    ("TimeNoise is nearer to real clips than naive fine-tuning", "timenoise", "naive", "frechet", "lower"),
    ("Analytic-Init moves more than starting at T", "analytic-init-700", "naive", "motion", "higher"),
    ("The base model is nearer to real clips", "base", "naive", "frechet", "lower"),
    ("TimeNoise keeps the image better", "timenoise", "naive", "first_frame_error", "lower"),
]


def config_of(out, *overrides: str, seeds: tuple[int, ...] = tuple(SEEDS)) -> Config:
    noise = {"kind": "timenoise", "a": 5}
    rows = {"base": {"weights": None, "seeds": [0]}, "naive": {}}
    rows["timenoise-half"] = {"conditioning": noise | {"beta_m": 0.5}}
    rows["timenoise"] = {"conditioning": noise | {"beta_m": 1.0}}
    words = ("says", "row", "against", "metric", "expected")
    told = {
        "finetune.row": {"weights": "base", "seeds": list(seeds)},
        "finetune.rows": rows,
        "generate.rows": ROWS,
        "compare.claims": [dict(zip(words, claim, strict=True)) for claim in CLAIMS],
        "compare.clips": 3,
        "tracking.experiment": "a small study",
    }
    return load(None, [f"out={out}", *(f"{key}={json.dumps(value)}" for key, value in told.items()), *overrides])


def make(config: Config, clips: int = 24, size: int = 48) -> dict[str, str]:
    """Ids of the evaluate runs, by row."""
    for name, row in config.training_rows().items():
        run = Run(config, name, "train", f"weights-of-{name}")
        noise = row.settings.conditioning.filled(_TimeNoise).model_dump()
        run.parameters(
            {"parent": "weights-of-base" if row.settings.weights else "random", "row": {"conditioning": noise}}
        )
        run.metrics({f"loss_t{t * 100:03d}": 0.3 / (1 + t) + 0.01 * row.seed % 0.02 for t in range(10)}, 640)
        run.finish()
    rows = {REAL: (REAL, 0, None)} | {n: (r.arm, r.seed, r) for n, r in config.evaluation_rows().items()}
    return {name: _evaluate(config, name, *row, clips, size) for name, row in rows.items()}


class _TimeNoise:
    beta_m, a = 1.0, 5.0


def _evaluate(config: Config, name: str, arm: str, seed: int, row, clips: int, size: int) -> str:
    random = np.random.default_rng([seed, *arm.encode()])
    shared = np.random.default_rng(seed).normal(size=2)  # what a seed does to all rows
    videos = Artifact(
        storage.join(config.out, "videos", name),
        "videos",
        {"row": name, "weights": f"weights-of-{row and row.weights}-ema"},
    )
    videos.begin("{}")
    scored, index = [], []
    for number in range(clips):
        motion = MOTION[arm] * np.exp(0.3 * np.random.default_rng(number).normal() + 0.02 * random.normal())
        clip, file = f"{100 + number}:0", f"{100 + number}_0.mp4"
        if number < SHOWN:
            storage.write(videos.path(file), encode(_disc(number, 20 * motion, size), 8))
            index.append({"file": file, "clip_id": clip, "caption": f"a disc that moves to the right, number {number}"})
        scored.append({"clip_id": clip, "motion": motion + 0.01 * shared[0], "features": [0.0] * 4})
        scored[-1]["first_frame_error"] = 0.0 if arm == REAL else 0.02 + 0.002 * random.normal()
    storage.write_rows(videos.path("index.jsonl"), index)
    videos.finish({"videos": clips})
    scores = Artifact(
        storage.join(config.out, "scores", name), "scores", {"videos": videos.fingerprint, "real": "real-set"}
    )
    scores.begin(config.model_dump_json(indent=1))
    storage.write_rows(scores.path("scores.jsonl"), scored)
    made = scores.finish({"videos": clips})

    run = Run(config, name, "evaluate", evaluation(config, made))
    if row is not None:
        trained = config.training_rows()[row.weights]
        sampling = row.settings.model_dump(include={"M", "start", "guidance"})
        noise = trained.settings.conditioning.filled(_TimeNoise).model_dump()
        run.parameters(sampling | {"steps": 12, "conditioning": noise, "row": sampling})
        run.parameters({"train": {"seed": seed, "lr": trained.settings.lr, "conditioning": noise}})
        run.parameters({"weights": f"weights-of-{row.weights}-ema"})
        run.tags({"weights": row.weights})
    run.tags({"row": name, "videos": videos.uri, "scores": scores.uri})
    motion = float(np.mean([line["motion"] for line in scored]))
    values = {"motion": motion, "motion_error": abs(motion - MOTION[REAL]), "videos": clips}
    values["first_frame_error"] = float(np.mean([line["first_frame_error"] for line in scored]))
    values["frechet"] = FRECHET[arm] + 0.05 * shared[1] + 0.01 * random.normal()
    run.metrics(values | {"frechet_low": values["frechet"] - 0.1, "frechet_high": values["frechet"] + 0.12})
    leaking = {"t": [0.1, 0.5, 0.9], "truth": [0.19] * 3 if seed % 2 else 0.19, "motion": [0.19, 0.15, motion / 2]}
    run.file("leakage.json", json.dumps(leaking).encode())
    run.finish()
    return run.id


def _disc(number: int, speed: float, size: int, frames: int = 12) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    texture = np.random.default_rng(number).integers(30, 90, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
    made = []
    for frame in range(frames):
        inside = (x - 10 - speed * frame) ** 2 + (y - size / 2) ** 2 < 60
        made.append(np.where(inside[..., None], [230, 170, 60 + 20 * number], texture))
    return np.array(made, dtype=np.uint8)
