import math

import pytest

from cil import CleanCondition, ConstantNoise, TimeNoise
from pipelines.config import ConditioningConfig, RowConfig
from pipelines.finetune import conditioning_noise, describe_levels, learning_rate


def test_the_learning_rate_rises_over_the_warm_up_and_falls_as_a_cosine():
    row = RowConfig(samples=1000, batch=10, warmup=100, lr=2.0)
    assert learning_rate(row, 0) == pytest.approx(0.2)
    assert learning_rate(row, 90) == pytest.approx(2.0)
    assert learning_rate(row, 550) == pytest.approx(1 + math.cos(math.pi / 2))
    assert 0 < learning_rate(row, 990) < 0.002


def test_one_word_chooses_the_conditioning_noise():
    assert conditioning_noise(ConditioningConfig(kind="none")) == CleanCondition()
    assert conditioning_noise(ConditioningConfig(kind="timenoise", beta_m=2, a=3)) == TimeNoise(2, 3)
    assert conditioning_noise(ConditioningConfig(kind="constant", level=0.7)) == ConstantNoise(0.7)


def test_the_constant_control_has_the_mean_level_of_the_timenoise_it_controls():
    control = conditioning_noise(ConditioningConfig(kind="constant", beta_m=2, a=3))
    assert control == ConstantNoise(TimeNoise(2, 3).mean_level())


def test_timenoise_that_cannot_be_told_from_constant_is_warned_of():
    kinds = ({"kind": "timenoise", "a": 100}, {"kind": "timenoise"}, {"kind": "none"})
    flat, moving, naive = (RowConfig(conditioning=kind) for kind in kinds)
    assert "WARNING: with a=100.0 it hardly depends on t" in describe_levels(flat)
    assert "median beta_s at t = .1, .5, .9: 0.27, 0.28, 0.55" in describe_levels(moving)
    assert "WARNING" not in describe_levels(moving)
    assert describe_levels(naive) == ""
