"""jobs/configs: the paper's fine-tuning of each family, as the reference configures it and as we advise it."""

import re
from pathlib import Path

import pytest

from cil import Drops, recipe
from jobs import finetune as job
from pipelines.config import Config, load
from pipelines.models import family_of

FOLDER = Path(job.__file__).with_name("configs")
FAMILIES = ("svd", "dynamicrafter", "videocrafter1", "i2vgenxl")
KINDS = {"naive": "none", "timenoise": "timenoise", "constant": "constant", "cdm": "cdm"}

# "Recipes as the reference configures them" of tests/cil/golden/README.md, and the paper's total batch and steps, which
# are the same for all. I2VGen-XL, which is not in it, has DynamiCrafter's training.
SHARED = {"batch": 64, "samples": 64 * 20_000, "warmup": 0, "schedule": "constant", "weight_decay": 1e-2}
TRAINING = {
    "svd": {"lr": 3e-5, "clip_norm": 1.0, "ema": 0.9999},
    "dynamicrafter": {"lr": 1e-5, "clip_norm": 0.5, "ema": 0.0},
    "videocrafter1": {"lr": 1e-5, "clip_norm": 0.5, "ema": 0.0},
    "i2vgenxl": {"lr": 1e-5, "clip_norm": 0.5, "ema": 0.0},
}
BATCH_PER_GPU = {"svd": 1, "dynamicrafter": 2, "videocrafter1": 1, "i2vgenxl": 1}
CLIPS = {  # source frames from one to the next or frames a second, mirrored, the conditional image
    "svd": {"stride": 1, "fps": 3, "flip": 0.5, "condition": "first"},
    "dynamicrafter": {"stride": (1, 6), "fps": None, "flip": 0.0, "condition": "random"},
    "videocrafter1": {"stride": (1, 6), "fps": None, "flip": 0.0, "condition": "first"},
    "i2vgenxl": {"stride": 1, "fps": 3, "flip": 0.0, "condition": "first"},
}
SAMPLING = {  # steps, guidance, M of Analytic-Init
    "svd": (25, (1 + 3) / 2, 100),
    "dynamicrafter": (50, 7.5, 940),
    "videocrafter1": (50, 12, 940),
    "i2vgenxl": (50, 9, 940),
}


def configured(name: str, *overrides: str) -> Config:
    return load(FOLDER / f"{name}.yaml", overrides)


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


def test_the_training_is_the_references(name):
    config = configured(name)
    for trained in config.training_rows().values():
        row = trained.settings
        assert {key: getattr(row, key) for key in SHARED | TRAINING[name]} == SHARED | TRAINING[name]
        assert row.weights is None  # family.weights
        # All of the network, with the projector, which the reference forgets of VideoCrafter1.
        assert row.train == "full"
        assert row.precision == "bfloat16"
    assert config.finetune.micro_batch == BATCH_PER_GPU[name]
    assert config.cache.model_dump(include=set(CLIPS[name])) == CLIPS[name]


def test_the_process_the_noise_and_the_drops_are_the_corrected_recipes(name):
    config, advised = configured(name), recipe(name)
    family = family_of(config)
    assert (family.frames, family.height, family.width) == (16, 320, 512)
    assert (family.process, family.prediction) == (advised.process, advised.prediction)
    for trained in config.training_rows().values():
        noise = trained.settings.conditioning.filled(family.timenoise)
        assert (noise.beta_m, noise.a, noise.level) == (advised.noise.beta_m, advised.noise.a, None)
        assert Drops(**trained.settings.drop.model_dump()) == advised.drops


def test_rows_differ_in_one_word(name):
    rows = configured(name).training_rows()
    assert {arm: row.settings.conditioning.kind for arm, row in rows.items()} == KINDS
    told = [row.settings.model_dump() for row in rows.values()]
    for row in told:
        row["conditioning"].pop("kind")
    assert all(row == told[0] for row in told)


def test_every_row_is_sampled_with_guidance_from_the_end_and_the_first_two_with_analytic_init(name):
    config = configured(name)
    steps, guidance, M = SAMPLING[name]
    assert config.generate.steps == steps
    arms = config.arms()
    assert arms.keys() == {*KINDS, "naive+analytic-init", "timenoise+analytic-init"}
    for arm, row in arms.items():
        analytic = arm.endswith("+analytic-init")
        assert (row.weights, row.guidance) == (arm.removesuffix("+analytic-init"), guidance)
        assert (row.M, row.start) == ((M, "analytic") if analytic else (None, "gaussian"))


def test_what_is_to_be_filled_in_is_a_configuration_when_it_is(name, tmp_path):
    text = (FOLDER / f"{name}.yaml").read_text()
    filled = re.sub(r"^( *)# ((?:weights|tokenizer|catalog|before): )", r"\1\2", text, flags=re.MULTILINE)
    (tmp_path / "filled.yaml").write_text(filled)
    config = load(tmp_path / "filled.yaml")
    assert config.family.weights
    assert bool(config.family.tokenizer) == (name in ("dynamicrafter", "videocrafter1"))
    assert config.catalog.csv
    assert config.arms()["before"].weights == "published"
