"""Every training setting reaches the weights: rows of one study that differ in one of them, and members of a sweep."""

from pathlib import Path
from typing import NamedTuple

import pytest
from in_process import instead_of_ray

from pipelines import storage
from pipelines.config import Config
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


class Trained(NamedTuple):
    config: Config
    alone: dict[str, int]  # when the weights were written that were asked for first, by row


def written(out: str) -> dict[str, Path]:
    """The averaged weights, by row."""
    return {path.parts[-3]: path for path in Path(out, "weights").glob("*/ema/toy.safetensors")}


@pytest.fixture(scope="module")
def trained(road, smallest, tmp_path_factory) -> Trained:
    """More than two dozen trainings; one row and one member of a sweep before the others, and by themselves."""
    out = tmp_path_factory.mktemp("trained")
    (out / "cache").symlink_to(Path(road.out, "cache"))

    def study(a: str, *more: str) -> Config:
        rows = ["plain: {}", *(f"{name}: {{{own}}}" for name, own in DIFFERENT.items())]
        rows += [f"cured: {{conditioning: {{kind: timenoise}}, sweep: {{conditioning.a: {a}}}}}"]
        every = ("finetune.workers=1", "finetune.row.warmup=16", "finetune.row.seeds=[1]", "finetune.row.samples=32")
        begin = f"finetune.row.weights={road.out}/weights/base"
        videos = ("generate.clips=2", "generate.reference=2", "generate.steps=2", "compare.claims=[]")
        early = "generate.rows={early: {weights: cured, M: 700}}"
        return smallest(out, f"finetune.rows={{{', '.join(rows)}}}", *every, begin, *videos, early, *more)

    finetune(study("[1]", "finetune.only=[plain, cured]"))
    alone = {name: path.stat().st_mtime_ns for name, path in written(str(out)).items()}
    config = study("[1, 4]")
    finetune(config)
    return Trained(config, alone)


def test_rows_that_differ_in_one_setting_have_other_weights(trained):
    weights = {name: path.read_bytes() for name, path in written(trained.config.out).items()}
    assert weights.keys() == {"plain", "cured_a=1", "cured_a=4", *DIFFERENT}
    assert len(set(weights.values())) == len(weights)
    assert {run.info.run_name for run in runs(trained.config, "train")} == weights.keys()


def test_what_is_asked_for_is_trained_alone_and_left_as_it_is_when_others_are_trained(trained):
    """Others of the same sweep too."""
    assert trained.alone.keys() == {"plain", "cured_a=1"}
    now = {name: path.stat().st_mtime_ns for name, path in written(trained.config.out).items()}
    assert trained.alone.items() <= now.items()


def test_each_member_of_a_sweep_is_sampled_as_a_row_of_its_own(trained, monkeypatch):
    found = {run.info.run_name: run.data.params["row.conditioning.a"] for run in runs(trained.config, "train")}
    assert [found["cured_a=1"], found["cured_a=4"]] == ["1.0", "4.0"]
    instead_of_ray(monkeypatch)
    sets = generate(trained.config)
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
