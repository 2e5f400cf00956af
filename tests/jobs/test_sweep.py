"""A study of sweeps: each member is trained, and sampled, as a row of its own."""

from pathlib import Path

import pytest

from pipelines import storage
from pipelines.cache import build_cache
from pipelines.config import load
from pipelines.finetune import finetune
from pipelines.generate import generate
from pipelines.make_shapes import make_shapes
from pipelines.tracking import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_cpu")]

SETTINGS = (
    *("family.preset=tiny", "family.frames=4", "shapes.videos=24", "shapes.damaged=0", "shapes.frames=8"),
    *("cache.test=0.3", "cache.videos_per_part=24", "finetune.workers=1", "finetune.row.samples=16"),
    *("finetune.row.batch=4", "finetune.row.warmup=0", "finetune.log_every=16", "finetune.checkpoint_every=16"),
    *("generate.clips=2", "generate.reference=2", "generate.clips_per_part=2", "generate.steps=2"),
)


@pytest.mark.timeout(300)
def test_members_of_sweeps_are_rows_with_weights_runs_and_videos_and_another_value_is_added(tmp_path):
    def study(rates: str):
        trained = f"finetune.rows={{cured: {{conditioning: {{kind: timenoise}}, sweep: {{conditioning.a: {rates}}}}}}}"
        return load(None, [f"out={tmp_path}", *SETTINGS, trained, "generate.rows.early={weights: cured, M: 700}"])

    config = study("[1]")
    for station in (make_shapes, build_cache, finetune):
        station(config)
    first = tmp_path / "weights/cured_a=1/ema/toy.safetensors"
    made = first.stat().st_mtime_ns

    config = study("[1, 5]")
    finetune(config)
    assert first.stat().st_mtime_ns == made
    assert first.read_bytes() != (tmp_path / "weights/cured_a=5/ema/toy.safetensors").read_bytes()
    found = {run.info.run_name: run.data.params["row.conditioning.a"] for run in runs(config, "train")}
    assert found == {"cured_a=1": "1.0", "cured_a=5": "5.0"}

    sets = generate(config)
    assert sets.keys() == {"real", "reference", "early_a=1", "early_a=5"}
    told = {line["row"]["weights"] for line in storage.read_rows(f"{sets['early_a=5'].uri}/index.jsonl")}
    assert told == {"cured_a=5"}
    assert len(list(Path(sets["early_a=1"].uri).glob("*.mp4"))) == 2
