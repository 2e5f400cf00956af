"""family.shift: a training has it or another one, videos are sampled with the same, and a cache knows nothing of it."""

from types import SimpleNamespace

import pytest
import torch

from cil.families import NAMES, load
from pipelines import generate
from pipelines.cache import encoding_of
from pipelines.config import load as configured
from pipelines.errors import UserError
from pipelines.models import family_of
from pipelines.weights import plan_weights, refuse_other_shift

CACHE = SimpleNamespace(fingerprint="of a cache")


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_is_the_process_of_every_family_and_changes_what_it_caches_in_nothing(name):
    plain, shifted = load(name), load(name, shift=2.0)
    assert shifted.process == plain.process.shifted(2.0) != plain.process
    t = plain.process.training_times(5)[:4]
    ratios = [one.process.sigma(t) / one.process.alpha(t) for one in (plain, shifted)]
    if name == "svd":  # whose t is the noise itself
        ratios[1] = shifted.process.training_times(5)[:4]
    torch.testing.assert_close(ratios[1], 2 * ratios[0])
    assert shifted.encoder_identity == plain.encoder_identity
    with pytest.raises(ValueError, match="shift=0"):
        load(name, shift=0)


def test_a_shift_is_of_weights_and_not_of_a_cache(tmp_path):
    of_weights, of_caches = [], []
    for shift in (1, 2):
        config = configured(None, [f"out={tmp_path}", "family.preset=tiny", f"family.shift={shift}"])
        family = family_of(config)
        assert family.options.shift == shift
        row = config.training_rows()["base"]
        of_weights.append(plan_weights(config, family, "base", row, CACHE, {}).fingerprint)
        of_caches.append(encoding_of(config, family))
    assert of_weights[0] != of_weights[1]
    assert of_caches[0] == of_caches[1]


def test_weights_are_not_sampled_with_another_shift_than_they_were_trained_with(tmp_path):
    def config(shift: float):
        return configured(None, [f"out={tmp_path}", "family.preset=tiny", f"family.shift={shift}"])

    told = config(2)
    made = plan_weights(told, family_of(told), "base", told.training_rows()["base"], CACHE, {})
    made.begin("{}")
    made.finish({})
    refuse_other_shift(told, "base")
    with pytest.raises(UserError, match=r"weights/base were trained with family\.shift=2\.0: set it"):
        refuse_other_shift(config(1), "base")
    refuse_other_shift(config(1), str(tmp_path))  # published weights are what they are said to be
    # Videos are others by another shift, true clips the same.
    row = told.evaluation_rows()["base"]
    videos = {
        (name, shift): generate._plan(config(shift), family_of(config(shift)), CACHE, name, row).fingerprint
        for name, row in (("base", row), ("real", None))
        for shift in (1, 2)
    }
    assert videos["base", 1] != videos["base", 2]
    assert videos["real", 1] == videos["real", 2]
