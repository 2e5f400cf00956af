"""What is done to the conditional image: nothing, the same noise at every t, or TimeNoise."""

import math

import numpy as np
import pytest
import torch

from cil import CleanCondition, ConstantNoise, Draws, TimeNoise

CELLS = [(0.0, 5, 15), (0.25, 1, 100), (0.5, 5, 100), (0.75, 0.1, 25), (0.75, 5, 100), (1.0, 5, 100), (1.0, 1, 700)]
KINDS = [CleanCondition(), ConstantNoise(3.0), TimeNoise(20.0)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("t", "a", "beta_m"), CELLS)
def test_quantiles_of_the_level_equal_the_reference(t, a, beta_m, golden):
    figures, n = golden["timenoise"], 500_000
    (row,) = (r for r in figures["rows"] if (r["t"], r["a"], r["beta_m"]) == (t, a, beta_m))
    levels = TimeNoise(beta_m, a).level(torch.full((n,), t), seeded()).double()
    p, z = (torch.tensor(figures[k], dtype=torch.float64) for k in ("probabilities", "z"))
    ours = torch.logit(levels.quantile(p) / beta_m)
    reference = torch.logit(torch.tensor(row["empirical"], dtype=torch.float64) / beta_m)
    # Standard error of an empirical quantile of n(0, 1): sqrt(p (1 - p) / n) / density(z). Five of them, of both.
    unit = (p * (1 - p)).sqrt() / (torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    assert ((ours - (2 * t**a - 1) - z).abs() < 5 * unit * (1 / n) ** 0.5).all()
    assert ((ours - reference).abs() < 5 * unit * (1 / n + 1 / figures["draws"]) ** 0.5).all()


def test_the_center_equals_the_reference_and_spans_minus_one_to_one(golden):
    for a, centers in golden["timenoise"]["mu"].items():
        u = torch.tensor([float(t) for t in centers], dtype=torch.float64)
        ours = TimeNoise(1.0, float(a)).center(u)
        np.testing.assert_allclose(ours, list(centers.values()), rtol=0, atol=1e-11)  # 12 digits in the file
        assert ours.min() == -1  # mu_max is the paper's 1, not 4
        assert ours.max() == 1


def test_time_beyond_the_unit_interval_is_clamped():
    noise, inside = TimeNoise(20.0, 5.0), torch.tensor([0.0, 1.0])
    assert torch.equal(noise.center(torch.tensor([-0.5, 1.5])), noise.center(inside))
    root = TimeNoise(20.0, 0.5).center(torch.tensor([-0.5, 1.5]))  # a root of a negative time would be NaN
    assert torch.equal(root, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("a", [0.5, 1.0, 5.0])
def test_the_level_rises_with_time(a):
    noise, u = TimeNoise(20.0, a), torch.linspace(0, 1, 11)
    levels = torch.stack([noise.level(u[i : i + 1], seeded()) for i in range(11)])  # the same normal at each t
    assert (levels.diff(dim=0) >= 0).all()
    assert levels[-1] > levels[0]


@pytest.mark.parametrize("beta_m", [0.0, 1.0, 100.0])
def test_the_level_stays_between_0_and_beta_m(beta_m):
    levels = TimeNoise(beta_m, 1.0).level(torch.rand(200_000, generator=seeded()), seeded(1))
    assert (levels >= 0).all()
    assert (levels <= beta_m).all()
    assert levels.shape == (200_000,)


@pytest.mark.parametrize(("beta_m", "a"), [(20.0, 5.0), (100.0, 1.0), (1.0, 0.1)])
def test_the_mean_level_equals_monte_carlo(beta_m, a):
    noise, n = TimeNoise(beta_m, a), 1_000_000
    levels = noise.level(torch.rand(n, generator=seeded(1)), seeded(2))
    # Five standard errors.
    assert noise.mean_level() == pytest.approx(float(levels.double().mean()), abs=5 * float(levels.std()) / n**0.5)


@pytest.mark.parametrize("a", [1.0, 5.0])
def test_the_mean_level_equals_gaussian_quadrature(a):
    n, weight_n = np.polynomial.hermite_e.hermegauss(80)
    u, weight_u = np.polynomial.legendre.leggauss(200)
    center = 2 * ((u + 1) / 2) ** a - 1
    sigmoid = 1 / (1 + np.exp(-(center[:, None] + n)))
    want = (weight_u / 2) @ sigmoid @ (weight_n / weight_n.sum())
    # The midpoint rule over 200 points is off by h^2 f' / 24 ~ 1e-6 times the slope at the end, 2 a / 4.
    assert TimeNoise(1.0, a).mean_level() == pytest.approx(want, rel=1e-5)


def test_noise_is_drawn_for_each_element_not_once_a_sample():
    y = torch.zeros(3, 4, 32, 32)
    for kind in (ConstantNoise(3.0), TimeNoise(20.0)):
        noisy, level = kind(y, torch.tensor([0.1, 0.5, 0.9]), seeded())
        eps = noisy / level.reshape(-1, 1, 1, 1)
        # 4096 normals a sample: mean 0 and deviation 1 within five standard errors.
        assert (eps.flatten(1).mean(1).abs() < 5 / 4096**0.5).all()
        assert ((eps.flatten(1).std(1) - 1).abs() < 5 / (2 * 4096) ** 0.5).all()
        # Neighbours and channels share nothing.
        for axis in (1, 2, 3):
            assert abs(float((eps * eps.roll(1, axis)).mean())) < 5 / eps.numel() ** 0.5


def test_the_noise_added_has_the_level_that_is_reported():
    y = torch.randn(64, 4, 16, 16, generator=seeded(5))
    noisy, level = TimeNoise(20.0)(y, torch.linspace(0, 1, 64), seeded())
    spread = (noisy - y).flatten(1).std(1)
    # 1024 elements: the deviation is known to 1 / sqrt(2 * 1024) = 2.2 %; five of them.
    torch.testing.assert_close(spread, level, rtol=0.11, atol=0)
    assert level.max() > 2 * level.min()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)
def test_a_sample_is_noised_alike_whatever_batch_it_is_in(kind):
    keys, u = [(7, i) for i in range(4)], torch.tensor([0.1, 0.4, 0.7, 1.0])
    y = torch.randn(4, 4, 8, 8, generator=seeded())
    together, levels = kind(y, u, Draws(keys))
    for i in (3, 0, 2):
        alone, level = kind(y[i : i + 1], u[i : i + 1], Draws(keys[i : i + 1]))
        assert torch.equal(alone[0], together[i])
        assert torch.equal(level[0], levels[i])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)
def test_the_callers_latents_are_left_as_they_were(kind):
    y = torch.randn(2, 4, 8, 8, generator=seeded())
    before = y.clone()
    for _ in range(3):
        kind(y, torch.tensor([0.5, 1.0]), seeded())
    assert torch.equal(y, before)


def test_a_clean_condition_is_the_image_and_reports_no_noise():
    y = torch.randn(2, 4, 8, 8, generator=seeded())
    noisy, level = CleanCondition()(y, torch.tensor([0.5, 1.0]))
    assert torch.equal(noisy, y)
    assert torch.equal(level, torch.zeros(2))


def test_constant_noise_does_not_know_the_time():
    y = torch.randn(2, 4, 8, 8, generator=seeded())
    early, level = ConstantNoise(3.0)(y, torch.zeros(2), seeded())
    late, _ = ConstantNoise(3.0)(y, torch.ones(2), seeded())
    assert torch.equal(early, late)
    assert torch.equal(level, torch.full((2,), 3.0))
    assert float((early - y).std()) == pytest.approx(3.0, rel=0.16)  # 512 elements, five standard errors
    still, _ = ConstantNoise(0.0)(y, torch.ones(2), seeded())
    assert torch.equal(still, y)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_negative_level_is_refused(bad):
    with pytest.raises(ValueError, match="level="):
        ConstantNoise(bad)
    with pytest.raises(ValueError, match="beta_m="):
        TimeNoise(bad)


@pytest.mark.parametrize("bad", [0.0, -5.0, float("nan")])
def test_an_exponent_that_does_not_rise_is_refused(bad):
    with pytest.raises(ValueError, match="a="):
        TimeNoise(20.0, bad)
