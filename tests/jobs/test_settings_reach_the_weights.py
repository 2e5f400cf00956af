"""Every training setting reaches the weights: rows of one study that differ in one of them, and members of a sweep."""

from pathlib import Path

import pytest
from in_process import instead_of_ray

from pipelines import storage
from pipelines.errors import UserError
from pipelines.finetune import finetune
from pipelines.generate import generate
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


@pytest.mark.timeout(600)  # more than two dozen trainings
def test_rows_that_differ_in_one_setting_and_members_of_a_sweep_have_other_weights(
    road, smallest, tmp_path, monkeypatch
):
    """And what is asked for is trained alone, and left as it is when others, of the same sweep too, are trained."""
    (tmp_path / "cache").symlink_to(Path(road.out, "cache"))

    def study(a: str, *more: str):
        rows = ["plain: {}", *(f"{name}: {{{own}}}" for name, own in DIFFERENT.items())]
        rows += [f"cured: {{conditioning: {{kind: timenoise}}, sweep: {{conditioning.a: {a}}}}}"]
        every = (
            "finetune.workers=1",
            "finetune.row.warmup=16",
            "finetune.row.seeds=[1]",
            "finetune.row.samples=32",
            "compare.claims=[]",
        )
        begin = f"finetune.row.weights={road.out}/weights/base"
        videos = ("generate.clips=2", "generate.reference=2", "generate.steps=2")
        early = "generate.rows={early: {weights: cured, M: 700}}"
        return smallest(tmp_path, f"finetune.rows={{{', '.join(rows)}}}", *every, begin, *videos, early, *more)

    def written() -> dict[str, Path]:
        return {path.parts[-3]: path for path in (tmp_path / "weights").glob("*/ema/toy.safetensors")}

    alone = {"plain", "cured_a=1"}
    assert finetune(study("[1]", "finetune.only=[plain, cured]")).keys() == alone
    made = {name: path.stat().st_mtime_ns for name, path in written().items()}
    assert {path.name for path in (tmp_path / "weights").iterdir()} == made.keys() == alone

    config = study("[1, 4]")
    finetune(config)
    assert {name: written()[name].stat().st_mtime_ns for name in alone} == made
    weights = {name: path.read_bytes() for name, path in written().items()}
    assert weights.keys() == {*alone, "cured_a=4", *DIFFERENT}
    assert len(set(weights.values())) == len(weights)
    found = {run.info.run_name: run.data.params for run in runs(config, "train")}
    assert found.keys() == weights.keys()
    assert [found[f"cured_a={a}"]["row.conditioning.a"] for a in (1, 4)] == ["1.0", "4.0"]

    # Each member is sampled, as a row of its own.
    instead_of_ray(monkeypatch)
    sets = generate(config)
    assert sets.keys() == {"real", "reference", "early_a=1", "early_a=4"}
    for a in (1, 4):
        (told,) = {line["row"]["weights"] for line in storage.read_rows(f"{sets[f'early_a={a}'].uri}/index.jsonl")}
        assert told == f"cured_a={a}"
        assert len(list(Path(sets[f"early_a={a}"].uri).glob("*.mp4"))) == 2


def test_a_loss_that_is_not_finite_stops_the_training_and_says_what_to_change(road, smallest, tmp_path):
    (tmp_path / "cache").symlink_to(Path(road.out, "cache"))
    wild = "finetune.rows={wild: {weights: null, seeds: [0], samples: 960, lr: 1.0e+18}}"
    config = smallest(tmp_path, wild, "finetune.workers=1", "generate.rows={}", "compare.claims=[]")
    said = r"training of wild stopped: .*row wild: (the loss|a gradient) is not finite .*no checkpoint.*lower lr=1e\+18"
    with pytest.raises(UserError, match=said):
        finetune(config)
    assert not (tmp_path / "weights/wild/manifest.json").exists()
