"""Every family walks the road, at its tiny size: cache, initial noise, training, videos, scores."""

import json
from pathlib import Path

import pytest

from cil.families import NAMES
from pipelines.cache import build_cache
from pipelines.config import Config, load
from pipelines.finetune import finetune
from pipelines.generate import generate
from pipelines.initial_noise import make_initial_noise
from pipelines.make_shapes import make_shapes
from pipelines.score import score

pytestmark = pytest.mark.slow

SETTINGS = (
    *("family.preset=tiny", "family.frames=4", "family.height=32", "family.width=48"),
    *("shapes.videos=40", "shapes.damaged=0", "shapes.frames=8", "cache.test=0.3", "cache.videos_per_part=20"),
    *("finetune.workers=1", "finetune.row.samples=16", "finetune.row.batch=4", "finetune.row.warmup=0"),
    *("finetune.log_every=16", "finetune.checkpoint_every=16", "finetune.row.drop=0.2"),
    "finetune.rows={base: {conditioning: {kind: timenoise, beta_m: 25}}}",
    *("generate.clips=4", "generate.reference=8", "generate.clips_per_part=4", "generate.steps=2"),
    *("score.feature_steps=2", "generate.rows.base.guidance=2", "generate.rows.base.start=analytic"),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    make_shapes(load(None, [f"out={out}", *SETTINGS]))
    return out / "shapes"


def walked(name: str, shapes: Path, out: Path) -> Config:
    M = 100 if name == "svd" else 940
    videos = (f"catalog.csv={shapes}/videos.csv", f"catalog.videos={shapes}/videos")
    config = load(None, [f"out={out}", *SETTINGS, *videos, f"family.name={name}", f"generate.rows.base.M={M}"])
    for station in (build_cache, make_initial_noise, finetune, generate, score):
        station(config)
    return config


@pytest.mark.parametrize("name", [name for name in NAMES if name != "toy"])
def test_a_family_walks_the_road(name, shapes, tmp_path):
    config = walked(name, shapes, tmp_path)
    weights = json.loads(Path(config.out, "weights/base/manifest.json").read_text())
    assert weights["counts"]["samples"] == 16
    assert all(Path(config.out, "weights/base", file).stat().st_size > 0 for file in weights["content"]["files"])
    assert len(list(Path(config.out, "videos/base").glob("*.mp4"))) == 4
    scores = json.loads(Path(config.out, "scores/base/manifest.json").read_text())
    assert scores["counts"]["videos"] == 4
