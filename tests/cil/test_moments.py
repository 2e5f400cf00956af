"""Mean and variance per element, merged from parts."""

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil import Moments

quick = settings(deadline=None, max_examples=60, derandomize=True)


def latents(n: int, *shape: int, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, *shape, generator=random, dtype=torch.float64)


def two_passes(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance per element in exact arithmetic, rounded once at the end."""
    columns = x.flatten(1).T.tolist()
    exact = [(float(statistics.mean(c)), float(statistics.pvariance(c))) for c in columns]
    return tuple(np.array(part).reshape(x.shape[1:]) for part in zip(*exact, strict=True))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1e-2), (-3.0, 50.0)])
def test_moments_of_a_batch_equal_two_exact_passes(mean, std):
    x = latents(64, 2, 3, 2, mean=mean, std=std)
    ours, (want_mean, want_variance) = Moments.of(x), two_passes(x)
    np.testing.assert_allclose(ours.mean, want_mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(ours.variance, want_variance, rtol=1e-12, atol=0)
    assert ours.trace_cov_per_dim == pytest.approx(want_variance.mean(), rel=1e-12)
    assert ours.count == 64


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1e-2)])
def test_moments_merged_from_batches_equal_two_exact_passes(mean, std):
    x = latents(300, 2, 3, mean=mean, std=std)
    merged = Moments.zeros((2, 3))
    for batch in x.split([1, 99, 7, 64, 128, 1]):
        merged = merged.merge(Moments.of(batch))
    want_mean, want_variance = two_passes(x)
    np.testing.assert_allclose(merged.mean, want_mean, rtol=1e-12, atol=1e-15)
    # A batch's mean is rounded to eps |mean|, which its distance to the others' feels: 1e-16 * 1e4 / 1e-2 = 1e-10 in
    # the worst case; the sums of the squares of E[x^2] - E[x]^2 would lose everything (1e-16 * 1e8 / 1e-4).
    np.testing.assert_allclose(merged.variance, want_variance, rtol=1e-12 + 1e-16 * abs(mean) / std, atol=0)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
)
@quick
def test_moments_are_the_same_merged_in_any_order_and_grouping(sizes, order, offset):
    x = latents(sum(sizes) + 1, 3, 2, mean=offset)
    parts = [Moments.of(part) for part in x.split([*sizes, 1])]
    while len(parts) > 1:
        a, b = (parts.pop(order.randrange(len(parts))) for _ in range(2))
        parts.append(a.merge(b))
    whole = Moments.of(x)
    assert parts[0].count == whole.count
    torch.testing.assert_close(parts[0].mean, whole.mean, rtol=0, atol=1e-12 * (1 + offset))
    torch.testing.assert_close(parts[0].m2, whole.m2, rtol=1e-12 * (1 + offset), atol=1e-12 * (1 + offset))


@given(n=st.integers(1, 20), first=st.booleans())
@quick
def test_merging_with_nothing_changes_nothing(n, first):
    some, nothing = Moments.of(latents(n, 3)), Moments.zeros((3,))
    merged = nothing.merge(some) if first else some.merge(nothing)
    assert merged.count == n
    assert torch.equal(merged.mean, some.mean)
    assert torch.equal(merged.m2, some.m2)


def test_merging_leaves_both_parts_as_they_were():
    a, b = Moments.of(latents(4, 3)), Moments.of(latents(5, 3, seed=1))
    before = [x.clone() for x in (a.mean, a.m2, b.mean, b.m2)]
    a.merge(b)
    assert all(torch.equal(x, y) for x, y in zip(before, (a.mean, a.m2, b.mean, b.m2), strict=True))


def test_half_precision_latents_are_summed_in_float64():
    x = (1000 + latents(3000, 2)).half()
    ours, (want_mean, want_variance) = Moments.of(x), two_passes(x.double())
    np.testing.assert_allclose(ours.mean, want_mean, rtol=1e-12)
    np.testing.assert_allclose(ours.variance, want_variance, rtol=1e-12)


def test_one_sample_has_no_variance_and_no_samples_have_none_to_give():
    assert Moments.of(latents(1, 3)).trace_cov_per_dim == 0
    for nothing in (Moments.zeros((3,)), Moments.of(torch.zeros(0, 3)), Moments.zeros((3,)).merge(Moments.zeros((3,)))):
        assert nothing.count == 0
        assert nothing.mean.shape == (3,)
        with pytest.raises(ValueError, match="no samples"):
            _ = nothing.variance


@given(n=st.integers(0, 5))
@quick
def test_bytes_give_the_same_moments_back_to_the_bit(n):
    before = Moments.of(latents(n, 2, 3, mean=1e4))
    after = Moments.from_bytes(before.to_bytes())
    assert after.count == before.count
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.m2, before.m2)
    assert after.mean.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_latents_with_nan_are_refused_and_their_positions_named(bad):
    x = latents(5, 2, 3)
    x[1, 0, 2] = x[3, 1, 1] = bad
    with pytest.raises(ValueError, match=r"positions \[1, 3\]"):
        Moments.of(x)


def test_moments_of_other_shapes_are_not_merged():
    with pytest.raises(ValueError, match=r"\(2, 3\) cannot merge with \(3, 2\)"):
        Moments.of(latents(2, 2, 3)).merge(Moments.of(latents(2, 3, 2)))
    with pytest.raises(ValueError, match="cannot merge"):
        Moments.of(latents(2, 3)).merge(Moments.zeros((1,)))  # would broadcast
