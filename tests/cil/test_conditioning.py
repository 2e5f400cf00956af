"""What is done to the conditional image: nothing, the same noise at every t, CDM's levels, or TimeNoise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cil import CDM, EDM, VP, CleanCondition, ConstantNoise, Draws, TimeNoise, diagnose, recipe

BLOCKS = ["vp_dynamicrafter", "edm_svd", "vp_videocrafter1_reference"]
FORMS = ["elementwise", "per_frame", "scalar"]
KINDS = [CleanCondition(), ConstantNoise(3.0), CDM(5.0), *(TimeNoise(20.0, form=form) for form in FORMS)]
NOISY = KINDS[1:]
quick = settings(deadline=None, max_examples=60, derandomize=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def name(kind) -> str:
    return f"{type(kind).__name__}-{kind.form}"


def full(value: float, n: int) -> Tensor:
    return torch.full((n,), value)


def some_images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=seeded(5))


def cells(block) -> list[tuple[TimeNoise, float, dict]]:
    found = [(TimeNoise(row["beta_m"], row["a"], mu_max=block["mu_max"]), row["t"], row) for row in block["rows"]]
    assert len(found) == 60
    return found


# -- the reference's figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_closed_form_quantiles_of_the_level_equal_the_reference(block, golden):
    z = torch.tensor(golden["timenoise"]["z"], dtype=torch.float64)
    for noise, t, row in cells(golden["timenoise"][block]):
        ours = noise.beta_m * torch.sigmoid(noise.center(torch.tensor(t, dtype=torch.float64)) + z)
        # The file has 9 digits.
        np.testing.assert_allclose(ours, row["closed_form"], rtol=5e-9, err_msg=str((noise, t)))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_density_up_to_a_quantile_of_the_reference_holds_its_probability(block, golden):
    p, (x, weight) = golden["timenoise"]["probabilities"], np.polynomial.legendre.leggauss(60)
    x, weight = torch.from_numpy(x), torch.from_numpy(weight)
    for noise, t, row in cells(golden["timenoise"][block]):
        u = torch.tensor(t, dtype=torch.float64)
        q = torch.logit(torch.tensor(row["closed_form"], dtype=torch.float64) / noise.beta_m)
        low = noise.center(u) - 9  # where a normal has 1e-19 of itself
        n = (low + q)[:, None] / 2 + (q - low)[:, None] / 2 * x
        level = noise.beta_m * torch.sigmoid(n)
        slope = level * (1 - level / noise.beta_m)  # d level / d n
        mass = ((noise.density(level, u) * slope) @ weight) * (q - low) / 2
        # 9 digits of the quantile q: 5e-9 / (1 - q / beta_m), at least 0.009 at p = 0.75, times the normal's 0.32.
        np.testing.assert_allclose(mass, p, rtol=0, atol=2e-7, err_msg=str((noise, t)))


@pytest.mark.parametrize("block", BLOCKS)
def test_quantiles_of_drawn_levels_equal_the_reference(block, golden):
    figures, n = golden["timenoise"], 500_000
    p, z = (np.array(figures[k]) for k in ("probabilities", "z"))
    ranks = (p * (n - 1)).round().astype(int)
    # Standard error of an empirical quantile of n(0, 1): sqrt(p (1 - p) / n) / density(z). Five of them, of both.
    unit = np.sqrt(p * (1 - p)) / (np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    ours_off, both_off = 5 * unit / n**0.5, 5 * unit * (1 / n + 1 / figures["draws"]) ** 0.5
    for noise, t, row in cells(figures[block]):
        drawn = noise.levels(full(t, n), seeded()).numpy()  # of the same normals in each cell
        ours, reference = (
            -np.log(noise.beta_m / np.asarray(quantiles, dtype=np.float64) - 1)
            for quantiles in (np.partition(drawn, ranks)[ranks], row["empirical"])
        )
        mu = noise.mu_max * (2 * t**noise.a - 1)
        assert (np.abs(ours - mu - z) < ours_off).all(), (noise, t, ours - mu - z)
        assert (np.abs(ours - reference) < both_off).all(), (noise, t, ours - reference)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_center_equals_the_reference_and_spans_its_range(block, golden):
    mu_max = golden["timenoise"][block]["mu_max"]
    for a, centers in golden["timenoise"][block]["mu"].items():
        u = torch.tensor([float(t) for t in centers], dtype=torch.float64)
        ours = TimeNoise(1.0, float(a), mu_max=mu_max).center(u)
        np.testing.assert_allclose(ours, list(centers.values()), rtol=0, atol=1e-11)  # 12 digits in the file
        assert (ours.min(), ours.max()) == (-mu_max, mu_max)


def test_the_center_runs_from_minus_one_to_one_unless_told_otherwise():
    assert TimeNoise(1.0).center(torch.tensor([0.0, 1.0])).tolist() == [-1, 1]


def test_the_center_on_the_references_time_map_of_edm_equals_the_reference_up_to_sigma_max(golden):
    process, examples = EDM(time_map="sigma"), golden["timenoise"]["edm_examples"]
    assert [row["sigma"] for row in examples if row["sigma"] > process.sigma_max] == [900]
    for row in examples:
        u = process.unit_time(torch.tensor(float(row["sigma"])))
        # The reference does not clamp: at sigma 900 its mu would be 6 (defect 14). Float32 times: 2 * 5 * 6e-8.
        t, mu = (row["t"], row["mu_a5"]) if row["sigma"] <= process.sigma_max else (1, 1)
        assert float(u) == pytest.approx(t, rel=1e-7)
        assert float(TimeNoise(15.0).center(u)) == pytest.approx(mu, abs=1e-6)


@pytest.mark.parametrize(("P_mean", "P_std"), [(-1.2, 1.2), (0.7, 1.6)])
def test_training_draws_exceed_a_sigma_as_often_as_the_references(P_mean, P_std, golden):
    process = EDM(P_mean=P_mean, P_std=P_std)
    n, points = 20_000, 1_000_000
    drawn, even = process.draw_times(Draws([(1, i) for i in range(n)])), process.training_times(points)
    figures = golden["timenoise"]["edm_training_sigma"][f"P_mean={P_mean},P_std={P_std}"]
    assert len(figures) == 5
    for sigma, share in figures.items():
        # Five standard errors, and one draw where less than one is expected.
        off = 5 * (share * (1 - share) / n) ** 0.5 + 1 / n
        assert float((drawn > float(sigma)).double().mean()) == pytest.approx(share, abs=off)
        # Evenly spaced quantiles are off by half a step; the file has 4 digits.
        assert float((even > float(sigma)).double().mean()) == pytest.approx(share, rel=5e-4, abs=0.5 / points)


# -- levels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta_m", "a", "mu_max"), [(20.0, 5.0, 1.0), (100.0, 1.0, 1.0), (1.0, 0.1, 4.0)])
@pytest.mark.parametrize("t", [0.0, 0.6, 1.0])
def test_the_density_integrates_to_one_and_is_that_of_drawn_levels(beta_m, a, mu_max, t):
    noise, n, bins, inner = TimeNoise(beta_m, a, mu_max), 400_000, 40, 1000
    edges = torch.linspace(0, beta_m, bins * inner + 1, dtype=torch.float64)
    u = torch.tensor(t, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    mass = (noise.density(middles, u) * beta_m / (bins * inner)).reshape(bins, inner).sum(1)
    # The midpoint rule at 40000 points; a density that is 0 with all its derivatives at both ends.
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    found = torch.histc(noise.levels(full(t, n), seeded(1)).double(), bins, 0, beta_m) / n
    assert ((found - mass).abs() < 5 * (mass * (1 - mass) / n).sqrt() + 1 / n).all()


@pytest.mark.parametrize("bad", [-0.5, 1.5, 940.0, math.nan])
def test_a_time_that_is_no_share_is_refused_rather_than_taken_for_the_end(bad):
    """Who forgets `process.unit_time` would train with the highest level at every t."""
    with pytest.raises(ValueError, match=r"u=.*in 0\.\.1, process\.unit_time"):
        TimeNoise(20.0)(torch.zeros(2, 3), torch.tensor([0.5, bad]))


@pytest.mark.parametrize("u", [torch.tensor(0.5), torch.full((1,), 0.5), torch.full((3, 1), 0.5)])
def test_times_that_are_not_one_for_each_sample_are_refused(u):
    for kind in (ConstantNoise(1.0), TimeNoise(20.0), CDM(1.0)):
        with pytest.raises(ValueError, match="a time for each of 3 samples"):
            kind(torch.zeros(3, 4), u)


@pytest.mark.parametrize("frames", [0, -1])
def test_no_frames_are_refused(frames):
    for kind in (CleanCondition(), TimeNoise(20.0)):
        with pytest.raises(ValueError, match=f"frames={frames}: at least 1"):
            kind(torch.zeros(2, 3), torch.full((2,), 0.5), frames=frames)


def test_a_diagnosis_needs_a_row_of_times():
    for u in (torch.empty(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="a row of training times"):
            diagnose(TimeNoise(20.0), u)
    assert diagnose(TimeNoise(20.0), torch.rand(300_000)).mu[0] == pytest.approx(-1, abs=1e-3)


def test_noise_whose_center_moves_by_a_fifth_of_its_spread_can_be_told_from_constant():
    flat, moving = (torch.linspace(0.5 - w, 0.5 + w, 1001) for w in (0.052, 0.0585))
    assert diagnose(TimeNoise(20.0, 1.0), flat).constant  # mu = 2 u - 1, over 90 % of 2 w: 0.187
    assert not diagnose(TimeNoise(20.0, 1.0), moving).constant  # 0.211


@pytest.mark.parametrize("a", [0.5, 1.0, 5.0])
def test_the_level_rises_with_time(a):
    noise, u = TimeNoise(20.0, a), torch.linspace(0, 1, 11)
    levels = torch.stack([noise.levels(u[i : i + 1], seeded()) for i in range(11)])  # the same normal at each t
    assert (levels.diff(dim=0) >= 0).all()
    assert levels[-1] > levels[0]


@given(
    beta_m=st.sampled_from([0.0, 1e-3, 1.0, 700.0]),
    a=st.floats(0.05, 20),
    mu_max=st.floats(0.1, 8),
    seed=st.integers(0, 1000),
)
@quick
def test_the_level_stays_between_0_and_beta_m(beta_m, a, mu_max, seed):
    levels = TimeNoise(beta_m, a, mu_max).levels(torch.rand(2000, generator=seeded(seed)), seeded(seed + 1))
    assert (levels >= 0).all()
    assert (levels <= beta_m).all()
    assert levels.shape == (2000,)


@pytest.mark.parametrize(("beta_m", "a"), [(20.0, 5.0), (100.0, 1.0), (1.0, 0.1)])
def test_the_mean_level_equals_monte_carlo(beta_m, a):
    noise, n = TimeNoise(beta_m, a), 1_000_000
    levels = noise.levels(torch.rand(n, generator=seeded(1)), seeded(2))
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


def test_the_mean_level_of_a_training_run_is_that_of_its_own_times():
    noise, process = TimeNoise(15.0), EDM(P_mean=-1.2, P_std=1.2, time_map="sigma")
    u = process.unit_time(process.training_times())
    n = 1_000_000
    levels = noise.levels(process.unit_time(torch.exp(-1.2 + 1.2 * torch.randn(n, generator=seeded(3)))), seeded(4))
    # Five standard errors. Over times even in [0, 1] it would be a third more.
    assert noise.mean_level(u) == pytest.approx(float(levels.double().mean()), abs=5 * float(levels.std()) / n**0.5)
    assert noise.mean_level() > 1.1 * noise.mean_level(u)


def test_levels_of_cdm_are_uniform_up_to_its_greatest_and_know_no_time():
    n = 100_000
    early, late = CDM(5.0).levels(torch.zeros(n), seeded()), CDM(5.0).levels(torch.ones(n), seeded())
    assert torch.equal(early, late)
    assert early.min() >= 0
    assert early.max() < 5
    # Kolmogorov and Smirnov: the greatest distance exceeds 2.5 / sqrt(n) once in 1.3e5 runs.
    distance = (early.double().sort().values / 5 - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert distance < 2.5 / n**0.5


def test_cdm_draws_a_level_for_each_sample_and_reports_it():
    y = torch.randn(64, 4, 16, 16, generator=seeded(5))
    noisy, level = CDM(5.0)(y, torch.full((64,), 0.5), seeded(2))
    assert len(level.unique()) == 64
    # 1024 elements: the deviation is known to 1 / sqrt(2 * 1024) = 2.2 %; five of them.
    torch.testing.assert_close((noisy - y).flatten(1).std(1), level, rtol=0.11, atol=0)


# -- the noise on the image --------------------------------------------------------------------------------------------


def test_noise_is_drawn_for_each_element_not_once_a_sample():
    y = torch.zeros(3, 4, 32, 32)
    for kind in (ConstantNoise(3.0), CDM(5.0), TimeNoise(20.0)):
        noisy, level = kind(y, torch.tensor([0.1, 0.5, 0.9]), seeded())
        eps = noisy / level.reshape(-1, 1, 1, 1)
        # 4096 normals a sample: mean 0 and deviation 1 within five standard errors.
        assert (eps.flatten(1).mean(1).abs() < 5 / 4096**0.5).all()
        assert ((eps.flatten(1).std(1) - 1).abs() < 5 / (2 * 4096) ** 0.5).all()
        # Neighbours and channels share nothing.
        for axis in (1, 2, 3):
            assert abs(float((eps * eps.roll(1, axis)).mean())) < 5 / eps.numel() ** 0.5


@pytest.mark.parametrize("kind", [TimeNoise(20.0), ConstantNoise(3.0), CDM(5.0)], ids=name)
def test_noise_drawn_once_and_repeated_is_not_averaged_away_over_frames(kind):
    y, u, frames = torch.randn(8, 4, 32, 32, generator=seeded(5)), torch.linspace(0.2, 1, 8), 16
    noisy, level = kind(y, u, seeded(), frames=frames)
    assert noisy.shape == (8, frames, 4, 32, 32)
    assert all(torch.equal(noisy[:, 0], noisy[:, i]) for i in range(frames))
    left = (noisy.double().mean(1) - y).flatten(1).std(1)
    # 4096 elements, five standard errors.
    torch.testing.assert_close(left, level.double(), rtol=5 / (2 * 4096) ** 0.5, atol=0)
    once, same = kind(y, u, seeded())
    assert torch.equal(noisy[:, 0], once)
    assert torch.equal(level, same)


@pytest.mark.parametrize("frames", [1, 4, 16])
def test_noise_drawn_for_each_frame_averages_down_by_the_root_of_their_number(frames):
    y, u = torch.randn(8, 4, 32, 32, generator=seeded(5)), torch.linspace(0.2, 1, 8)
    noisy, level = TimeNoise(100.0, form="per_frame")(y, u, seeded(), frames=frames)
    assert noisy.shape == (8, frames, 4, 32, 32)
    one, left = ((part.double() - y).flatten(1).std(1) for part in (noisy[:, -1], noisy.mean(1)))
    # 4096 elements, five standard errors.
    torch.testing.assert_close(one, level.double(), rtol=5 / (2 * 4096) ** 0.5, atol=0)
    torch.testing.assert_close(left, level.double() / frames**0.5, rtol=5 / (2 * 4096) ** 0.5, atol=0)


def test_scalar_noise_shifts_all_of_a_sample_by_one_number():
    n = 4000
    y = torch.randn(n, 3, 2, 2, generator=seeded(5))
    noisy, level = TimeNoise(15.0, form="scalar")(y, torch.full((n,), 0.9), seeded(), frames=2)
    shift = (noisy - y[:, None]).flatten(1)
    # A shift of up to 60 rounds to 4e-6 in float32.
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-5)
    eps = shift[:, 0] / level
    assert float(eps.mean()) == pytest.approx(0, abs=5 / n**0.5)  # five standard errors, here and below
    assert float(eps.std()) == pytest.approx(1, abs=5 / (2 * n) ** 0.5)


def test_the_noise_added_has_the_level_that_is_reported():
    y = torch.randn(64, 4, 16, 16, generator=seeded(5))
    noisy, level = TimeNoise(20.0)(y, torch.linspace(0, 1, 64), seeded())
    spread = (noisy - y).flatten(1).std(1)
    # 1024 elements: the deviation is known to 1 / sqrt(2 * 1024) = 2.2 %; five of them.
    torch.testing.assert_close(spread, level, rtol=0.11, atol=0)
    assert level.max() > 2 * level.min()


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("frames", [None, 3])
def test_a_sample_is_noised_alike_whatever_batch_it_is_in(kind, frames):
    if kind.form == "per_frame" and frames is None:
        frames = 1
    keys, u, y = [(7, i) for i in range(4)], torch.tensor([0.1, 0.4, 0.7, 1.0]), some_images()
    together, levels = kind(y, u, Draws(keys), frames)
    for i in (3, 0, 2):
        alone, level = kind(y[i : i + 1], u[i : i + 1], Draws(keys[i : i + 1]), frames)
        assert torch.equal(alone[0], together[i])
        assert torch.equal(level[0], levels[i])


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_the_callers_latents_are_left_as_they_were(kind):
    y, u = some_images(2), torch.tensor([0.5, 1.0])
    before = y.clone(), u.clone()
    for _ in range(3):
        kind(y, u, seeded(), frames=2)
    assert torch.equal(y, before[0])
    assert torch.equal(u, before[1])


@pytest.mark.parametrize("kind", NOISY, ids=name)
def test_noise_comes_from_the_generator_that_is_given_and_from_no_other(kind):
    y, u, random = some_images(), torch.full((4,), 0.7), seeded(3)
    state = torch.random.get_rng_state()
    first, level = kind(y, u, random, frames=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    second, again = kind(y, u, random, frames=2)
    assert not torch.equal(first, second)
    assert torch.equal(level, again) == isinstance(kind, ConstantNoise)
    torch.manual_seed(11)  # has no say
    assert torch.equal(kind(y, u, seeded(3), frames=2)[0], first)


@pytest.mark.parametrize("kind", NOISY, ids=name)
def test_without_a_generator_noise_comes_from_torchs_own(kind):
    y, u = some_images(), torch.full((4,), 0.7)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(1)
        first, _ = kind(y, u, frames=2)
        torch.manual_seed(1)
        assert torch.equal(kind(y, u, frames=2)[0], first)
        assert not torch.equal(kind(y, u, frames=2)[0], first)
    finally:
        torch.random.set_rng_state(state)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_image_and_level_are_on_the_device_of_the_latents(kind):
    noisy, level = kind(torch.empty(2, 4, 8, 8, device="meta"), torch.tensor([0.5, 1.0]), frames=3)
    assert noisy.device.type == level.device.type == "meta"
    assert noisy.shape == (2, 3, 4, 8, 8)
    assert level.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "kind", [ConstantNoise(700.0), *(TimeNoise(700.0, 0.1, form=form) for form in FORMS)], ids=name
)
def test_latents_keep_their_type_and_stay_finite_under_the_strongest_noise(kind, dtype):
    noisy, level = kind(some_images().to(dtype), torch.tensor([0.0, 0.5, 0.999, 1.0]), seeded(), frames=4)
    assert noisy.dtype == dtype
    assert level.dtype == torch.float32
    assert torch.isfinite(noisy).all()
    assert noisy.double().abs().max() > 100


def test_a_clean_condition_is_the_image_reports_no_noise_and_draws_nothing():
    y, u, random, draws = some_images(2), torch.tensor([0.5, 1.0]), seeded(), Draws([(0,), (1,)])
    states = torch.random.get_rng_state(), random.get_state()
    for source in (None, random, draws):
        noisy, level = CleanCondition()(y, u, source)
        assert torch.equal(noisy, y)
        assert torch.equal(level, torch.zeros(2))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert torch.equal(random.get_state(), states[1])
    assert torch.equal(draws.normal(3), Draws([(0,), (1,)]).normal(3))
    repeated, _ = CleanCondition()(y, u, frames=3)
    assert torch.equal(repeated, torch.stack([y] * 3, dim=1))


def test_constant_noise_does_not_know_the_time():
    y = some_images(2)
    early, level = ConstantNoise(3.0)(y, torch.zeros(2), seeded())
    late, _ = ConstantNoise(3.0)(y, torch.ones(2), seeded())
    assert torch.equal(early, late)
    assert torch.equal(level, torch.full((2,), 3.0))
    assert float((early - y).std()) == pytest.approx(3.0, rel=0.16)  # 512 elements, five standard errors
    still, _ = ConstantNoise(0.0)(y, torch.ones(2), seeded())
    assert torch.equal(still, y)


# -- diagnosis ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [TimeNoise(20.0, 5.0), TimeNoise(100.0, 1.0), TimeNoise(100.0, 5.0, mu_max=4)])
def test_the_diagnosis_has_the_quantiles_of_a_training_run(noise):
    process, n = VP(), 400_000
    found = diagnose(noise, process.unit_time(process.training_times()))
    u = process.unit_time(torch.randint(1000, (n,), generator=seeded(1)))
    for ours, drawn in ((found.mu, noise.center(u)), (found.level, noise.levels(u, seeded(2)))):
        assert len(ours) == 3
        for p, value in zip((0.05, 0.5, 0.95), ours, strict=True):
            # As a share of the draws below it: five standard errors, and the 200 quantiles that stand for a normal.
            below = float((drawn < value - 1e-6).double().mean()), float((drawn <= value + 1e-6).double().mean())
            assert below[0] - 0.005 < p < below[1] + 0.005


@pytest.mark.parametrize(("a", "variance"), [(1.0, 4 / 12), (5.0, 4 * (1 / 11 - 1 / 36))])
def test_the_share_that_time_explains_has_its_closed_form(a, variance):
    share, noise, process = variance / (variance + 1), TimeNoise(20.0, a), VP()
    even = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    # The midpoint rule at 10000 points.
    assert diagnose(noise, even).time_share == pytest.approx(share, rel=1e-6)
    # Of a step u is the lower end, not the middle: Var falls by Cov(mu, mu') / 1000, which is 0.5 % for a = 5.
    of_process = diagnose(noise, process.unit_time(process.training_times())).time_share
    assert of_process == pytest.approx(share, rel=6e-3)


def test_the_share_that_time_explains_is_that_of_drawn_levels():
    noise, n = TimeNoise(20.0, 5.0), 400_000
    u = torch.rand(n, generator=seeded(1), dtype=torch.float64)
    logit = torch.logit(noise.levels(u, seeded(2)) / 20)
    explained = torch.corrcoef(torch.stack([logit, noise.center(u)]))[0, 1] ** 2
    # A correlation of n draws is known to (1 - r^2) / sqrt(n) = 1.3e-3, its square to twice r = 0.45 of that; five.
    even = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert diagnose(noise, even).time_share == pytest.approx(float(explained), abs=6e-3)


def test_the_references_svd_recipe_is_said_to_be_constant_and_the_corrected_one_is_not():
    told = {}
    for compat in (True, False):
        of = recipe("svd", reference_compat=compat)
        told[compat] = diagnose(of.noise, of.process.unit_time(of.process.training_times()))
    assert told[True].constant
    assert told[True].time_share < 1e-6  # mu is -1 practically always: defect 14
    assert "WARNING" in str(told[True])
    assert "log_sigma" in str(told[True])
    assert not told[False].constant
    assert "WARNING" not in str(told[False])
    assert f"{told[False].time_share:.1%}" in str(told[False])


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "argument"), [(ConstantNoise, "level"), (CDM, "max_level"), (TimeNoise, "beta_m")])
def test_an_impossible_level_is_refused_by_its_name_and_value(kind, argument, bad):
    with pytest.raises(ValueError, match=f"{argument}={bad}"):
        kind(**{argument: bad})


@pytest.mark.parametrize("bad", [0.0, -5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["a", "mu_max"])
def test_a_center_that_does_not_rise_is_refused_by_its_name_and_value(argument, bad):
    with pytest.raises(ValueError, match=f"^{argument}={bad}"):
        TimeNoise(20.0, **{argument: bad})


def test_an_unknown_form_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match=r"form='frames': one of elementwise, per_frame, scalar"):
        TimeNoise(20.0, form="frames")


def test_noise_for_each_frame_cannot_be_drawn_without_their_number():
    with pytest.raises(ValueError, match="frames=None"):
        TimeNoise(20.0, form="per_frame")(some_images(), torch.full((4,), 0.5), seeded())
