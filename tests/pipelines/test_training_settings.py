import json
import math
from types import SimpleNamespace

import pytest
from tiny import PUBLISHED

from cil import CDM, CleanCondition, ConstantNoise, TimeNoise, diagnose
from cil.families import load
from pipelines import zero
from pipelines.cache import build_cache
from pipelines.config import ConditioningConfig, RowConfig
from pipelines.config import load as configured
from pipelines.errors import UserError
from pipelines.finetune import choose_profile, describe_noise, finetune, refuse_impossible
from pipelines.models import family_of
from pipelines.rows import conditioning_noise, learning_rate
from pipelines.weights import plan_weights

TOY = load("toy")


def test_the_learning_rate_rises_over_the_warm_up_and_falls_as_a_cosine():
    row = RowConfig(samples=1000, batch=10, warmup=100, lr=2.0)
    assert learning_rate(row, 0) == pytest.approx(0.2)
    assert learning_rate(row, 90) == pytest.approx(2.0)
    assert learning_rate(row, 550) == pytest.approx(1 + math.cos(math.pi / 2))
    assert 0 < learning_rate(row, 990) < 0.002


def test_after_the_warm_up_it_falls_as_a_line_or_does_not():
    linear, constant = (
        RowConfig(samples=1000, batch=10, warmup=100, lr=2.0, schedule=schedule) for schedule in ("linear", "constant")
    )
    assert learning_rate(linear, 0) == learning_rate(constant, 0) == pytest.approx(0.2)
    assert learning_rate(linear, 100) == learning_rate(constant, 100) == pytest.approx(2.0)
    assert learning_rate(linear, 325) == pytest.approx(1.5)
    assert learning_rate(linear, 990) == pytest.approx(2 / 90)
    assert learning_rate(constant, 990) == 2.0


def test_one_word_chooses_the_conditioning_noise():
    assert conditioning_noise(ConditioningConfig(kind="none"), TOY) == CleanCondition()
    assert conditioning_noise(ConditioningConfig(kind="timenoise", beta_m=2, a=3), TOY) == TimeNoise(2, 3)
    assert conditioning_noise(ConditioningConfig(kind="constant", level=0.7), TOY) == ConstantNoise(0.7)
    assert conditioning_noise(ConditioningConfig(kind="cdm", level=0.7), TOY) == CDM(0.7)


@pytest.mark.parametrize(("name", "beta_m"), [("toy", 1), ("dynamicrafter", 25), ("videocrafter1", 100), ("svd", 15)])
def test_timenoise_is_the_familys_where_no_other_is_asked_for(name, beta_m):
    family = load(name)
    assert conditioning_noise(ConditioningConfig(kind="timenoise"), family) == TimeNoise(beta_m, 5)
    assert conditioning_noise(ConditioningConfig(kind="timenoise", a=2), family) == TimeNoise(beta_m, 2)


def test_the_constant_control_has_the_mean_level_of_the_timenoise_it_controls():
    control = conditioning_noise(ConditioningConfig(kind="constant", beta_m=2, a=3), TOY)
    assert control == ConstantNoise(TimeNoise(2, 3).mean_level())
    drawn = conditioning_noise(ConditioningConfig(kind="cdm", beta_m=2, a=3), TOY)
    assert drawn == CDM(2 * TimeNoise(2, 3).mean_level())  # uniform from 0


def test_what_timenoise_is_over_the_training_times_is_said_and_warned_of_where_it_is_constant():
    flat = describe_noise(ConditioningConfig(kind="timenoise", a=100), TOY)
    moving = describe_noise(ConditioningConfig(kind="timenoise"), TOY)
    assert "WARNING: it cannot be told from `constant`" in flat
    # 2 (1/2)^5 - 1 at the median of t, and Var(2 t^5) = 4 (1/11 - 1/36) of Var + 1.
    assert "mu(t) -1 / -0.938 / 0.54" in moving
    assert "t explains 20.2% of the level" in moving or "t explains 20.1% of the level" in moving
    assert "WARNING" not in moving
    assert describe_noise(ConditioningConfig(), TOY) == ""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_profile_is_chosen_for_every_family_and_its_timenoise_is_said(name, capsys):
    config = configured(None, ["family.preset=tiny", f"family.name={name}", "finetune.row.conditioning.kind=timenoise"])
    family, rows = family_of(config), config.training_rows()
    assert zero.stage_of(choose_profile(config, family, rows, gpu=False)) in {0, 1, 2, 3}
    assert "finetune: DeepSpeed profile zero-" in capsys.readouterr().out
    told = describe_noise(rows["base"].settings.conditioning, family)
    t = family.process.unit_time(family.process.training_times())
    assert told == f"TimeNoise with {diagnose(family.timenoise, t)}"


def test_weights_know_which_watermark_their_loss_left_out_and_no_other(tmp_path):
    def identity(*overrides: str) -> str:
        config = configured(None, [f"out={tmp_path}", *overrides])
        row, cache = config.training_rows()["base"], SimpleNamespace(fingerprint="of a cache")
        return plan_weights(config, TOY, "base", row, cache, {}).fingerprint

    one, other = "cache.watermark=[[0, 0, 0.5, 1]]", "cache.watermark=[[0, 0, 1, 0.5]]"
    leaving_out = "finetune.row.unmarked=true"
    assert identity(one) == identity(other)
    assert len({identity(one), identity(one, leaving_out), identity(other, leaving_out)}) == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["finetune.deepspeed=zero-9"], "finetune.deepspeed=zero-9: auto, one of zero-0, zero-1, .*zero-3-offload"),
        (["finetune.deepspeed=own.json"], "finetune.deepspeed=own.json: auto, one of zero-0"),
        (["finetune.recompute=true"], "finetune.recompute: the networks of the family toy cannot recompute"),
        (
            ["finetune.deepspeed=zero-0", "finetune.row.precision=bfloat16"],
            "finetune.deepspeed=zero-0: ZeRO 0 trains float32 alone, not finetune.rows.base.precision=bfloat16",
        ),
    ],
)
def test_a_training_that_cannot_be_is_refused_in_one_line(overrides, said):
    config = configured(None, ["family.preset=tiny", *overrides])
    with pytest.raises(UserError, match=said) as error:
        refuse_impossible(config, family_of(config), config.training_rows())
    assert "\n" not in str(error.value)


def test_float16_is_refused_where_there_is_no_gpu():
    config = configured(None, ["family.preset=tiny", "finetune.row.precision=float16"])
    said = r"^finetune\.rows\.base\.precision=float16: needs a GPU; bfloat16 works on CPUs too$"
    with pytest.raises(UserError, match=said):
        choose_profile(config, family_of(config), config.training_rows(), gpu=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"zero_optimization": {"stage": 1}, "fp16": {}, "train_batch_size": 4}',
            "sets fp16, train_batch_size, which",
        ),
        ("[]", "holds no DeepSpeed configuration"),
        ("{", "cannot be read"),
    ],
)
def test_a_profile_of_the_users_says_nothing_that_the_row_says(tmp_path, text, said):
    file = tmp_path / "own.json"
    file.write_text(text)
    config = configured(None, ["family.preset=tiny", f"finetune.deepspeed={file}"])
    with pytest.raises(UserError, match=rf"finetune.deepspeed={file}: .*{said}"):
        choose_profile(config, family_of(config), config.training_rows(), gpu=False)
    file.write_text(json.dumps(own := {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7}}))
    assert choose_profile(config, family_of(config), config.training_rows(), gpu=False) == own


LOOKS = ("finetune.validate_every=80", "finetune.checkpoint_every=80")


def test_a_row_is_not_trained_before_the_one_it_begins_from(settings, built):
    rows = "finetune.rows={base: {}, after: {weights: base}}"
    with pytest.raises(UserError, match=r"^finetune\.only: after begins from base, whose weights are not finished: tr"):
        finetune(settings(built, rows, "finetune.only=[after]"))
    with pytest.raises(UserError, match=r"^finetune\.only: 'naive' is no row; there are base, after$"):
        settings(built, rows, "finetune.only=[after, naive]")


def test_validation_without_clips_for_it_is_refused(settings, here, tmp_path):
    config = settings(tmp_path, "cache.validation=0", "catalog.limit=6", *LOOKS)
    build_cache(config)
    with pytest.raises(UserError, match=r"finetune\.validate_every: no clip in .* is for validation \(cache\.valid"):
        finetune(config)
    assert not (tmp_path / "weights").exists()
