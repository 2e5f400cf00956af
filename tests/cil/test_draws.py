"""Random numbers of which each sample has its own stream."""

import pytest
import torch

from cil import Draws
from cil.draws import normal_like, stream_seed, uniform_like

KEYS = [(3, i) for i in range(5)]


def all_kinds(draws: Draws) -> list[torch.Tensor]:
    return [draws.integers(1000), draws.normal(2, 3), draws.uniform(), draws.normal(4)]


def test_a_samples_numbers_are_the_same_alone_and_in_any_batch():
    together = all_kinds(Draws(KEYS))
    turned = all_kinds(Draws(KEYS[::-1]))
    for i, key in enumerate(KEYS):
        for whole, back, alone in zip(together, turned, all_kinds(Draws([key])), strict=True):
            assert torch.equal(whole[i], alone[0])
            assert torch.equal(back[len(KEYS) - 1 - i], alone[0])


def test_numbers_come_from_the_key_and_not_from_torchs_global_state():
    torch.manual_seed(1)
    first = Draws(KEYS).normal(8)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(Draws(KEYS).normal(8), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_stream_goes_on_rather_than_starting_again():
    draws = Draws(KEYS)
    assert not torch.equal(draws.normal(8), draws.normal(8))


def test_neighbouring_seeds_and_positions_share_nothing():
    keys = [(seed, position) for seed in range(20) for position in range(50)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    eps = Draws(keys).normal(200).double()
    correlation = torch.corrcoef(eps)[~torch.eye(len(keys), dtype=torch.bool)]
    # 5e5 pairs of 200 numbers each: a correlation has a deviation of 1 / sqrt(200), and 6.5 of them are 1 in 2e4 runs.
    assert correlation.abs().max() < 6.5 / 200**0.5
    assert float(correlation.std()) == pytest.approx(1 / 200**0.5, rel=0.05)


def test_seeds_use_all_64_bits():
    seeds = [stream_seed(0, i) for i in range(2000)]
    ones = torch.tensor([[seed >> bit & 1 for bit in range(64)] for seed in seeds]).double().mean(0)
    assert ((ones - 0.5).abs() < 5 * 0.5 / 2000**0.5).all()


def test_integers_are_uniform_and_below_the_bound():
    drawn = Draws([(0, i) for i in range(5000)]).integers(10)
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert ((counts - 500).abs() < 5 * (5000 * 0.1 * 0.9) ** 0.5).all()


def test_uniform_and_normal_numbers_have_their_moments():
    draws = Draws([(0, i) for i in range(100)])
    uniform, normal = draws.uniform(1000), draws.normal(1000)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # 1e5 numbers, five standard errors.
    assert float(uniform.mean()) == pytest.approx(0.5, abs=5 * (1 / 12) ** 0.5 / 1e5**0.5)
    assert float(normal.mean()) == pytest.approx(0, abs=5 / 1e5**0.5)
    assert float(normal.var()) == pytest.approx(1, abs=5 * (2 / 1e5) ** 0.5)


def test_every_draw_has_the_batch_first():
    draws = Draws(KEYS)
    assert len(draws) == 5
    shapes = [tuple(x.shape) for x in (draws.normal(2, 3), draws.uniform(), draws.integers(7))]
    assert shapes == [(5, 2, 3), (5,), (5,)]


def test_normals_take_shape_and_type_from_their_model_and_numbers_from_their_source():
    like = torch.zeros(5, 2, 3, dtype=torch.float64)
    from_draws = normal_like(like, Draws(KEYS))
    assert torch.equal(from_draws, Draws(KEYS).normal(2, 3).double())
    from_generator = [normal_like(like, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*from_generator)
    assert from_generator[0].shape == like.shape
    assert from_generator[0].dtype == torch.float64


def test_keys_of_different_length_name_different_streams():
    keys = [(7,), (7, 0), (0, 7), (0, 1), (2**32,), (1, 0), (1,)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)


def test_streams_that_are_not_one_for_each_sample_are_refused():
    with pytest.raises(ValueError, match="3 streams of draws for a batch of 1"):
        normal_like(torch.zeros(1, 2), Draws([(k,) for k in range(3)]))


@pytest.mark.parametrize("like", [uniform_like, normal_like])
def test_numbers_like_a_batch_come_from_one_generator_or_from_a_stream_for_each_sample(like):
    x = torch.zeros(5, 2, 3, dtype=torch.float64)
    drawn = getattr(Draws(KEYS), like.__name__.removesuffix("_like"))(2, 3)
    assert torch.equal(like(x, Draws(KEYS)), drawn.double())
    state = torch.random.get_rng_state()
    first, second = (like(x, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, second)
    assert first.shape == x.shape
    assert first.dtype == torch.float64
    assert len(first.unique()) == x.numel()


def test_numbers_like_a_batch_are_uniform_between_0_and_1():
    for random in (torch.Generator().manual_seed(4), Draws([(4, i) for i in range(100)])):
        drawn = uniform_like(torch.zeros(100, 1000), random)
        assert 0 <= drawn.min() <= drawn.max() < 1
        # 1e5 numbers, five standard errors; the squared deviation of a uniform has a variance of 1 / 180.
        assert float(drawn.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / 1e5) ** 0.5)
        assert float(drawn.var()) == pytest.approx(1 / 12, abs=5 * (1 / 180 / 1e5) ** 0.5)


def test_uniform_streams_that_are_not_one_for_each_sample_are_refused():
    with pytest.raises(ValueError, match="3 streams of draws for a batch of 5"):
        uniform_like(torch.zeros(5), Draws(KEYS[:3]))


def test_a_scalar_for_each_sample_does_not_shift_what_comes_after_in_another_sample():
    both, alone = Draws(KEYS[:2]), Draws(KEYS[1:2])
    for _ in range(3):
        assert torch.equal(both.uniform()[1:], alone.uniform())
        assert torch.equal(both.normal(2)[1:], alone.normal(2))
        assert torch.equal(both.integers(9)[1:], alone.integers(9))
