"""Mean and variance per element, merged from parts."""

import statistics
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil import Moments
from cil.moments import BLOCK

quick = settings(deadline=None, max_examples=60, derandomize=True)
# Mean and deviation of the data; of the last, float64 tells but some ten values apart.
PLACES = [(0.0, 1.0), (1e4, 1e-2), (1e6, 1e-3), (-3.0, 50.0), (1e6, 1e-9)]


def latents(n: int, *shape: int, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, *shape, generator=random, dtype=torch.float64)


def two_passes(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance per element in exact arithmetic, rounded once at the end."""
    columns = x.double().flatten(1).T.tolist()
    exact = [(float(statistics.mean(c)), float(statistics.pvariance(c))) for c in columns]
    return tuple(np.array(part).reshape(x.shape[1:]) for part in zip(*exact, strict=True))


def assert_exact(ours: Moments, x: torch.Tensor) -> None:
    """To 1e-12 relative, some thousand roundings of float64; a mean near 0 to 1e-15 of deviations around 1."""
    want_mean, want_variance = two_passes(x)
    assert ours.count == len(x)
    np.testing.assert_allclose(ours.mean, want_mean, rtol=1e-12, atol=1e-13 * want_variance.max() ** 0.5)
    np.testing.assert_allclose(ours.variance, want_variance, rtol=1e-12, atol=0)
    assert ours.trace_cov_per_dim == pytest.approx(want_variance.mean(), rel=1e-12)


def assert_same(ours: Moments, other: Moments) -> None:
    assert ours.count == other.count
    for name in ("mean", "rest", "m2"):
        a, b = getattr(ours, name), getattr(other, name)
        assert a.dtype == b.dtype == torch.float64
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("mean", "std"), PLACES)
def test_moments_of_a_batch_equal_two_exact_passes(mean, std):
    x = latents(64, 2, 3, 2, mean=mean, std=std)
    assert_exact(Moments.of(x), x)


@pytest.mark.parametrize(("mean", "std"), PLACES)
def test_moments_merged_from_batches_equal_two_exact_passes(mean, std):
    x = latents(300, 2, 3, mean=mean, std=std)
    streamed = Moments.zeros((2, 3))
    for batch in x.split([1, 99, 7, 64, 128, 1]):
        streamed = streamed.merge(Moments.of(batch))
    assert_exact(streamed, x)
    assert_exact(Moments.merged(Moments.of(sample) for sample in x.split(1)), x)


@pytest.mark.parametrize(("mean", "std"), PLACES)
def test_the_rest_is_what_float64_rounds_off_the_mean(mean, std):
    x = latents(257, 3, mean=mean, std=std)
    for ours in (Moments.of(x), Moments.merged(map(Moments.of, x.split(10)))):
        for column, high, low in zip(x.T.tolist(), ours.mean.tolist(), ours.rest.tolist(), strict=True):
            exact = sum(map(Fraction, column)) / len(column)
            # Sums of deviations, each rounded to 1e-16 of itself: far below the half ulp that the mean alone is off.
            assert abs(float(Fraction(high) + Fraction(low) - exact)) < 1e-15 * std + 1e-30


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    place=st.sampled_from(PLACES),
    seed=st.integers(0, 5),
)
@quick
def test_moments_are_exact_merged_in_any_order_and_grouping(sizes, order, place, seed):
    x = latents(sum(sizes) + 2, 3, 2, mean=place[0], std=place[1], seed=seed)
    parts = [Moments.of(part) for part in x.split([*sizes, 2])]
    while len(parts) > 1:
        a, b = (parts.pop(order.randrange(len(parts))) for _ in range(2))
        parts.append(a.merge(b))
    assert_exact(parts[0], x)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6))
@quick
def test_a_streamed_merge_equals_one_batch(sizes):
    x = latents(sum(sizes), 3, 2, mean=1e4, std=1e-2)
    streamed, whole = Moments.merged(map(Moments.of, x.split(sizes))), Moments.of(x)
    assert streamed.count == whole.count
    # A mean of 1e4 may round to either neighbour; its rest says which.
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=3e-16, atol=0)
    apart = (streamed.mean - whole.mean) + (streamed.rest - whole.rest)
    assert apart.abs().max() < 1e-16
    torch.testing.assert_close(streamed.m2, whole.m2, rtol=1e-12, atol=0)


@given(n=st.integers(1, 20), first=st.booleans())
@quick
def test_merging_with_nothing_changes_nothing(n, first):
    some, nothing = Moments.of(latents(n, 3, mean=1e4)), Moments.zeros((3,))
    assert_same(nothing.merge(some) if first else some.merge(nothing), some)


def test_merging_leaves_both_parts_and_the_batch_as_they_were():
    x = latents(4, 3)
    before = x.clone()
    a, b = Moments.of(x), Moments.of(latents(5, 3, seed=1))
    assert torch.equal(x, before)
    copies = [Moments.from_bytes(part.to_bytes()) for part in (a, b)]
    a.merge(b)
    Moments.merged([a, b, a])
    assert_same(a, copies[0])
    assert_same(b, copies[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_of_any_precision_are_summed_in_float64(dtype):
    x = (1000 + 3 * latents(3000, 2)).to(dtype)
    before = x.clone()
    ours = Moments.of(x)
    assert_exact(ours, x)
    assert ours.mean.dtype == ours.rest.dtype == ours.m2.dtype == torch.float64
    assert torch.equal(x, before)
    assert x.dtype == dtype


def test_latents_of_a_network_are_taken_without_their_gradient():
    assert not Moments.of(latents(4, 3).requires_grad_()).m2.requires_grad


@pytest.mark.parametrize(
    ("samples", "shape"),
    [(4, (5, 40_000)), (4, (BLOCK // 2,)), (3, (BLOCK // 3 + 1,)), (1, (2, BLOCK)), (BLOCK + 1, (2,))],
    ids=["several blocks and a part", "two whole blocks", "one more than a block", "one sample", "more than a column"],
)
def test_latents_wider_than_a_block_are_taken_block_by_block(samples, shape):
    x = latents(samples, *shape, mean=1e4, std=1e-2)
    ours = Moments.of(x)
    assert ours.mean.shape == shape
    # numpy's extended precision in two passes: 1e-19 of 1e4.
    wide = x.numpy().astype(np.longdouble)
    mean = wide.mean(0)
    np.testing.assert_allclose(ours.mean, mean.astype(float), rtol=1e-15)
    variance = ((wide - mean) ** 2).mean(0).astype(float)
    np.testing.assert_allclose(ours.variance, variance, rtol=1e-12)


def test_one_sample_has_no_variance_and_no_samples_have_none_to_give():
    assert Moments.of(latents(1, 3, mean=1e6)).trace_cov_per_dim == 0
    for nothing in (Moments.zeros((3,)), Moments.of(torch.zeros(0, 3)), Moments.zeros((3,)).merge(Moments.zeros((3,)))):
        assert nothing.count == 0
        assert nothing.mean.shape == (3,)
        with pytest.raises(ValueError, match="count=0"):
            _ = nothing.variance


@given(n=st.integers(0, 5), times=st.sampled_from([1, 2**40]))
@quick
def test_bytes_give_the_same_moments_back_to_the_bit(n, times):
    some = Moments.of(latents(n, 2, 3, mean=1e4)).merge(Moments.of(latents(2, 2, 3, mean=1e4, seed=1)))
    before = Moments(some.count * times, some.mean, some.rest, some.m2)
    assert (before.rest != 0).any()
    assert_same(Moments.from_bytes(before.to_bytes()), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_latents_with_nan_are_refused_and_their_samples_named(bad, dtype):
    x = latents(5, 2, 3).to(dtype)
    x[1, 0, 2] = x[3, 1, 1] = bad
    with pytest.raises(ValueError, match=r"at batch positions \[1, 3\] \(2 of 5 samples\)"):
        Moments.of(x)
    with pytest.raises(ValueError, match=r"latents of clip-b, clip-d \(2 of 5 samples\)"):
        Moments.of(x, [f"clip-{letter}" for letter in "abcde"])


def test_nan_in_a_late_block_is_found_too():
    x = torch.zeros(4, BLOCK)
    x[2, -1] = float("nan")
    with pytest.raises(ValueError, match=r"positions \[2\]"):
        Moments.of(x)


def test_ids_of_any_kind_name_the_samples_and_must_be_one_for_each():
    x = latents(3, 2)
    x[1, 0] = float("nan")
    for ids in ([7, 8, 9], np.array([7, 8, 9])):
        with pytest.raises(ValueError, match="of 8 "):
            Moments.of(x, ids)
    with pytest.raises(ValueError, match="2 ids for 3 samples"):
        Moments.of(latents(3, 2), ["a", "b"])


def test_what_moments_cannot_be_is_refused():
    with pytest.raises(ValueError, match="parts: at least one"):
        Moments.merged([])
    with pytest.raises(ValueError, match="count=-1"):
        Moments(-1, *torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="one shape"):
        Moments(1, torch.zeros(2), torch.zeros(2), torch.zeros(3))
    for data in (b"", b"no safetensors at all", safetensors.torch.save({"mean": torch.zeros(2)})):
        with pytest.raises(ValueError, match="not moments"):
            Moments.from_bytes(data)


def test_of_many_bad_samples_ten_are_named_and_all_are_counted():
    with pytest.raises(ValueError, match=r"of s0, s1, .*, s9 \(50 of 50 samples\)"):
        Moments.of(torch.full((50, 2), float("nan")), [f"s{i}" for i in range(50)])


def test_moments_of_other_shapes_are_not_merged():
    with pytest.raises(ValueError, match=r"\(2, 3\) cannot merge with \(3, 2\)"):
        Moments.of(latents(2, 2, 3)).merge(Moments.of(latents(2, 3, 2)))
    with pytest.raises(ValueError, match="cannot merge"):
        Moments.of(latents(2, 3)).merge(Moments.zeros((1,)))  # would broadcast
