"""Families walk the road from published weights, at their tiny size: cache, noise, training, videos, scores.

DynamiCrafter walks it in test_table_of_the_paper.py.
"""

import shutil
from pathlib import Path

import pytest
import torch
from published import told_of, write_published

from cil import families
from cil.families import NAMES
from pipelines.artifact import read_manifest
from pipelines.cache import build_cache
from pipelines.config import Config, load
from pipelines.finetune import finetune
from pipelines.generate import generate
from pipelines.initial_noise import make_initial_noise
from pipelines.make_shapes import make_shapes
from pipelines.score import score

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_cpu")]

SETTINGS = (
    *("family.preset=tiny", "family.frames=4", "family.height=32", "family.width=48"),
    *("shapes.videos=40", "shapes.damaged=0", "shapes.frames=8", "cache.test=0.3", "cache.videos_per_part=20"),
    *("cache.views_per_video=1", "score.leakage=2"),
    *("finetune.workers=1", "finetune.row.samples=16", "finetune.row.batch=4", "finetune.row.warmup=0"),
    *("finetune.log_every=16", "finetune.checkpoint_every=16", "finetune.row.drop.both=0.2", "finetune.row.lr=1e-4"),
    *("finetune.row.conditioning.kind=timenoise", "finetune.rows={tuned: {}}"),
    *("generate.clips=4", "generate.reference=8", "generate.clips_per_part=4", "generate.steps=2"),
    *("score.feature_steps=2", "generate.rows.tuned={weights: tuned, guidance: 2, start: analytic}"),
    *("generate.rows.raw={weights: tuned, ema: false}", "generate.rows.before={weights: published}"),
)
OWN = {  # what else is chosen, each for one family
    "videocrafter1": ("family.latents=sample",),
    "svd": ("family.precision=bfloat16",),
    "i2vgenxl": ("family.clip_features=true",),
}
ELSEWHERE = {"toy", "dynamicrafter"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    make_shapes(load(None, [f"out={out}", *SETTINGS, "generate.rows={}"]))
    return out / "shapes"


def walk(name: str, shapes: Path, weights: Path, out: Path) -> Config:
    M = 100 if name == "svd" else 940
    videos = (f"catalog.csv={shapes}/videos.csv", f"catalog.videos={shapes}/videos")
    named = (f"family.name={name}", f"family.weights={weights}", f"generate.rows.tuned.M={M}")
    config = load(None, [f"out={out}", *SETTINGS, *videos, *named, *OWN[name]])
    for station in (build_cache, make_initial_noise, finetune, generate, score):
        station(config)
    return config


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_a_family_walks_the_road_from_published_weights(name, shapes, tmp_path, capfd):
    weights = write_published(name, tmp_path / "published")
    config = walk(name, shapes, weights, tmp_path / "out")
    assert " left" in capfd.readouterr().out  # progress

    # Trained from the published weights, and both kinds are written as they are published.
    family = families.load(name, 4, 32, 48, weights=str(weights))
    before = family.restore(weights)
    raw, ema = (family.restore(Path(config.out, "weights/tuned", kind)) for kind in ("raw", "ema"))
    assert before.keys() == raw.keys() == ema.keys()
    moved = [float((raw[key] - before[key]).abs().max()) for key in before]
    assert 0 < max(moved) < 5e-3  # four steps of at most 1e-4 or so, and some weight decay
    assert any(not torch.equal(raw[key], ema[key]) for key in raw)

    # Four rows of videos, and they differ.
    rows = {
        row: {f.name: f.read_bytes() for f in Path(config.out, "videos", row).glob("*.mp4")} for row in config.arms()
    }
    assert all(len(videos) == 4 for videos in rows.values())
    assert len({str(sorted(videos.items())) for videos in rows.values()}) == 3
    assert read_manifest(str(tmp_path / "out/scores/tuned"), "scores").counts["videos"] == 4

    # No artifact knows where the weights were: elsewhere they are the same, and nothing is made again.
    assert told_of(weights, config) == []
    elsewhere = shutil.move(weights, tmp_path / f"elsewhere{weights.suffix}")
    walk(name, shapes, elsewhere, tmp_path / "out")
    assert " left" not in capfd.readouterr().out
