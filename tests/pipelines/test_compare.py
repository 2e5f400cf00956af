from types import SimpleNamespace

import pytest
from scipy.stats import ttest_rel

from pipelines.compare import markdown, put_to_the_test
from pipelines.config import ClaimConfig
from pipelines.study import Arm, Estimate


def arm(name: str, *values: float) -> Arm:
    return Arm(name, {s: SimpleNamespace(data=SimpleNamespace(metrics={"motion": v})) for s, v in enumerate(values)})


def claim(expected: str = "higher", against: str = "naive") -> ClaimConfig:
    return ClaimConfig(says="it moves more", row="cure", against=against, metric="motion", expected=expected)


def verdict(ours, theirs, **kind):
    arms = {"cure": arm("cure", *ours), "naive": arm("naive", *theirs), "real": arm("real", *theirs[:1])}
    return put_to_the_test(claim(**kind), arms)


def test_the_interval_is_the_t_interval_of_the_mean():
    estimate = Estimate.of([1.0, 2.0, 4.0])
    assert estimate.mean == pytest.approx(7 / 3)
    assert estimate.half == pytest.approx(4.302653 * 1.527525 / 3**0.5, rel=1e-5)
    assert Estimate.of([1.0]).half is None


def test_seeds_are_paired_so_what_they_share_does_not_hide_the_difference():
    ours, theirs = [1.10, 5.11, 9.09], [1.0, 5.0, 9.0]
    v = verdict(ours, theirs)
    assert v.word == "holds"
    assert v.figures == "motion score +0.100 ± 0.025, 3 of 3 seeds"
    assert ttest_rel(ours, theirs).pvalue < 0.05  # the same test, by somebody else


def test_a_difference_that_could_be_chance_is_not_shown():
    assert verdict([1.1, 0.9, 1.2], [1.0, 1.0, 1.0]).word == "not shown"


def test_the_opposite_is_said_as_plainly():
    assert verdict([1.10, 5.11, 9.09], [1.0, 5.0, 9.0], expected="lower").word == "the opposite holds"


def test_one_seed_tests_nothing():
    assert verdict([2.0], [1.0]).word == "not tested (1 common seeds)"


def test_real_clips_stand_against_every_seed():
    v = verdict([2.0, 2.1, 1.9], [1.0, 7.0, 7.0], against="real")
    assert v.differences == pytest.approx([1.0, 1.1, 0.9])


def test_a_claim_about_a_row_that_is_not_there_is_shown_as_untested():
    assert put_to_the_test(claim(), {"cure": arm("cure", 1.0)}).word == "not tested (0 common seeds)"


def test_the_table_has_a_line_a_row_and_shows_a_hole_as_a_hole():
    arms = {"real": arm("real", 1.0), "cure": arm("cure", 1.0, 2.0)}
    table = markdown(arms, [])
    assert "| cure | 2     | 1.500 ± 6.353 | -" in table
    assert "| real | 1     | 1.000         | -" in table
