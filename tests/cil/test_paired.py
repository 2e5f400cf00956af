"""Two rows compared clip by clip, against scipy."""

import numpy as np
import pytest
import scipy.stats

from cil.metrics.paired import EXACT, Paired, paired


def rows(n: int, shift: float, seed: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """Scores whose spread among clips is far larger than that of their differences; of these not normal."""
    random = np.random.default_rng(seed)
    common, own = 10 * random.random(n), random.exponential(1.0, n) - 1 + shift
    return ({f"clip{i}": float(x) for i, x in enumerate(values)} for values in (common + own, common))


def differences(ours: dict[str, float], theirs: dict[str, float]) -> np.ndarray:
    return np.array([ours[clip] - theirs[clip] for clip in ours])


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_scipys_of_the_paired_t_test(confidence):
    ours, theirs = rows(40, 0.3)
    found = paired(ours, theirs, confidence)
    want = scipy.stats.ttest_rel([*ours.values()], [*theirs.values()])
    assert found.mean == pytest.approx(float(differences(ours, theirs).mean()), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(want.confidence_interval(confidence)), rel=1e-12)
    assert (found.pairs, found.holes) == (40, ())


@pytest.mark.parametrize("n", [2, 5, 9, EXACT])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_of_few_pairs_the_p_value_is_scipys_over_all_flips(n, shift):
    ours, theirs = rows(n, shift)
    want = scipy.stats.permutation_test(
        (differences(ours, theirs),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert paired(ours, theirs).p == pytest.approx(want.pvalue, abs=1e-12)
    assert paired(theirs, ours).p == paired(ours, theirs).p


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_of_many_pairs_the_p_value_is_near_scipys_and_near_that_of_wilcoxon(shift):
    ours, theirs = rows(EXACT + 60, shift)
    d = differences(ours, theirs)
    found = paired(ours, theirs)
    want = scipy.stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=5_000, random_state=1
    ).pvalue
    # Two counts out of 10,000 and 5,000.
    assert found.p == pytest.approx(want, abs=4 * (want * (1 - want) * (1e-4 + 2e-4)) ** 0.5)
    assert paired(ours, theirs) == found
    assert paired(ours, theirs, seed=1).p != found.p
    assert paired(ours, theirs, flips=99).p * 100 == pytest.approx(round(paired(ours, theirs, flips=99).p * 100))


def test_the_p_value_of_rows_that_do_not_differ_is_uniform():
    found = [paired(*rows_alike(20, seed), flips=300).p for seed in range(200)]
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01


def rows_alike(n: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    random = np.random.default_rng(seed)
    return ({str(i): float(x) for i, x in enumerate(random.exponential(1.0, n))} for _ in range(2))


def test_sums_that_differ_by_rounding_alone_are_counted_as_equal():
    """0.1 + 0.2 is not 0.3."""
    zero = dict.fromkeys("abcd", 0.0)
    assert paired({"a": 0.1, "b": 0.2, "c": -0.3, "d": 0.0}, zero).p == 1
    # As far out are the sums of all, of all but d, and those the other way round.
    assert paired({"a": 0.1, "b": 0.2, "c": 0.4, "d": -1e-17}, zero).p == 4 / 2**4
    assert paired(zero, zero) == Paired(4, 0.0, 0.0, 0.0, 1.0, ())


def test_a_difference_that_no_flip_reaches_has_the_smallest_p_value():
    ours = {str(i): 1 + 0.01 * i for i in range(100)}
    assert paired(ours, dict.fromkeys(ours, 0.0), flips=999).p == 1 / 1000


def test_clips_that_one_row_lacks_are_left_out_and_told():
    ours, theirs = rows(30, 0.5)
    whole = paired(ours, theirs)
    holes = dict(ours, gone=1.0, nan=float("nan"), none=None, twice=None), dict(theirs, nan=2.0, none=2.0, inf=np.inf)
    found = paired(*holes)
    assert found.holes == ("gone", "inf", "nan", "none", "twice")
    assert (found.pairs, found.mean, found.p) == (30, whole.mean, whole.p)
    reordered = {clip: theirs[clip] for clip in reversed(theirs)}
    assert paired(ours, reordered) == whole


def test_sets_without_overlap_are_refused():
    with pytest.raises(ValueError, match="0 clips with a score in both rows, of 1 and 2: at least 2"):
        paired({"a": 1.0}, {"b": 1.0, "c": 2.0})
    with pytest.raises(ValueError, match="1 clips with a score in both rows"):
        paired({"a": 1.0, "b": None}, {"a": 1.0, "b": 2.0})


def test_as_many_videos_as_the_paper_has_are_compared_in_parts():
    ours, theirs = rows(10_000, 0.02)
    found = paired(ours, theirs, flips=1000)
    want = scipy.stats.ttest_rel([*ours.values()], [*theirs.values()]).pvalue
    assert found.p == pytest.approx(want, abs=4 * (want * (1 - want) / 1000) ** 0.5 + 1e-3)
