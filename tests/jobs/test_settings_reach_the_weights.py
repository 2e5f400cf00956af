"""Every training setting reaches the weights: rows of one study that differ in one of them."""

from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.finetune import finetune
from pipelines.tracking import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_cpu")]

DIFFERENT = {
    "seed": "seeds: [5]",
    "samples": "samples: 64",
    "batch": "batch: 16",
    "lr": "lr: 0.01",
    "warmup": "warmup: 0",
    "clip_norm": "clip_norm: 0.01",
    "ema": "ema: 0",
    "precision": "precision: bfloat16",
    "weight_decay": "weight_decay: 1",
    "linear": "schedule: linear, warmup: 0",
    "constant_rate": "schedule: constant",
    "temporal": "train: temporal",
    "lora": "train: lora",
    "rank": "train: lora, rank: 2",
    "drop": "drop: {both: 0.9}",
    "where": "where: {motion: [0.2, null]}",
    "balance": "balance: motion",
    "weights": "weights: null",
    "constant": "conditioning: {kind: constant}",
    "level": "conditioning: {kind: constant, level: 3}",
    "timenoise": "conditioning: {kind: timenoise}",
    "beta_m": "conditioning: {kind: timenoise, beta_m: 3}",
    "a": "conditioning: {kind: timenoise, a: 0.5}",
}


def study(rows: list[str]) -> str:
    return "finetune.rows={" + ", ".join(rows) + "}"


@pytest.mark.timeout(600)  # two dozen trainings
def test_rows_that_differ_in_one_setting_have_other_weights(road, smallest, tmp_path):
    """And a row that is asked for is trained alone, and left as it is when the others are trained."""
    (tmp_path / "cache").symlink_to(Path(road.out, "cache"))
    shared = [
        "finetune.workers=1",
        "finetune.row.seeds=[1]",
        "finetune.row.samples=32",
        "generate.rows={}",
        "compare.claims=[]",
    ]
    shared += [f"finetune.row.weights={road.out}/weights/base"]
    rows = study(["plain: {}", *(f"{name}: {{{own}}}" for name, own in DIFFERENT.items())])
    assert finetune(smallest(tmp_path, rows, *shared, "finetune.only=[plain]")).keys() == {"plain"}
    plain = tmp_path / "weights/plain/ema/toy.safetensors"
    made = plain.stat().st_mtime_ns
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["plain"]

    config = smallest(tmp_path, rows, *shared)
    finetune(config)
    assert plain.stat().st_mtime_ns == made
    weights = {path.parts[-3]: path.read_bytes() for path in (tmp_path / "weights").glob("*/ema/toy.safetensors")}
    assert weights.keys() == {"plain", *DIFFERENT}
    assert len(set(weights.values())) == len(weights)
    assert {run.info.run_name for run in runs(config, "train")} == weights.keys()


def test_a_loss_that_is_not_finite_stops_the_training_and_says_what_to_change(road, smallest, tmp_path):
    (tmp_path / "cache").symlink_to(Path(road.out, "cache"))
    wild = "finetune.rows={wild: {weights: null, seeds: [0], samples: 960, lr: 1.0e+18}}"
    config = smallest(tmp_path, wild, "finetune.workers=1", "generate.rows={}", "compare.claims=[]")
    said = r"training of wild stopped: .*row wild: (the loss|a gradient) is not finite .*no checkpoint.*lower lr=1e\+18"
    with pytest.raises(UserError, match=said):
        finetune(config)
    assert not (tmp_path / "weights/wild/manifest.json").exists()
