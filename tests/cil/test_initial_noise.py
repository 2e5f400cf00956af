"""Analytic-Init: the normal that sampling from M starts from, equation (5) of the paper, and its files."""

import contextlib
import io
import os
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from cil import EDM, VP, Draws, Flow, InitialNoise, Moments

STARTS = [(VP(), 1), (VP(), 500), (VP(), 940), (VP(), 1000), (VP(zero_snr=True), 940), (VP(zero_snr=True), 1000)]
STARTS += [(VP(rescale=0.7), 940), (VP(zero_snr=True, rescale=0.3), 600), (VP(betas="squared_cosine"), 900)]
STARTS += [(EDM(), 0.5), (EDM(), 20), (EDM(), 700), (Flow(), 0.9), (Flow(), 1)]
NAMES = [f"{type(process).__name__} {M}" for process, M in STARTS]
SCHEDULE_M = ["1000", "960", "940", "900", "860", "820"]
quick = settings(deadline=None, max_examples=60, derandomize=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def some_noise(variance: float = 0.4, **facts: str) -> InitialNoise:
    return InitialNoise(randn(2, 3, 4, 5), variance, count=10, facts=facts)


def with_diagonal(seed: int = 0) -> InitialNoise:
    spread = torch.exp(randn(2, 3, 4, 5, seed=seed + 1))
    parts = [Moments.of(spread * randn(7, 2, 3, 4, 5, seed=seed + 2 + i) + randn(2, 3, 4, 5)) for i in range(4)]
    return InitialNoise.from_moments(*parts)


def saved(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def deviation(process, M: float) -> Tensor:
    """Of the noise alone."""
    return process.sigma(process.start(M))


# -- the reference's figures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures(golden):
    return golden["analytic_init"]


@pytest.fixture(scope="module")
def of_svd(reference_input) -> InitialNoise:
    """Of the reference's samples, read as T C H W."""
    shared = 0.5 * reference_input("analytic_mean", 4, 4, 8, 8).double()
    samples = [0.6 * reference_input(f"analytic_sample_{i}", 4, 4, 8, 8).double() + shared for i in range(64)]
    return InitialNoise.from_moments(*(Moments.of(torch.stack(samples[i : i + 10])) for i in range(0, 64, 10)))


@pytest.fixture(scope="module")
def of_vp(of_svd) -> InitialNoise:
    """The same numbers read as C T H W, as a file of DynamiCrafter holds them."""
    file = saved({"Expectation_X0": of_svd.mean[None], "Tr_Cov_d": torch.tensor(of_svd.variance, dtype=torch.float64)})
    return InitialNoise.from_bytes(file)


@pytest.fixture(scope="module")
def eps(reference_input) -> Tensor:
    return reference_input("analytic_eps", 1, 4, 4, 8, 8)[0].double()


def assert_latents(x: Tensor, want: dict, scale: float) -> None:
    """The reference computes in float32: three roundings of values up to 3.3 * scale, 2e-7 each."""
    off = 1e-6 * scale
    np.testing.assert_allclose(x.flatten()[:4], want["first4"], rtol=0, atol=off)
    assert float(x.mean()) == pytest.approx(want["mean"], abs=off)
    assert float(x.std()) == pytest.approx(want["std"], abs=off)
    assert float(x.abs().max()) == pytest.approx(want["absmax"], abs=off)


def assert_start(process, M: str, noise: InitialNoise, want: dict, reference_compat: bool) -> tuple[Tensor, Tensor]:
    mean, std = noise.at(process, process.start(int(M)), reference_compat=reference_compat)
    # The reference's schedule is float32.
    np.testing.assert_allclose(mean, want["mu_p_scale"] * noise.mean, rtol=1e-6, atol=0)
    assert float(std) == pytest.approx(want["sigma_p"], rel=1e-6)
    return mean, std


def test_mean_and_variance_of_the_reference_samples_equal_the_reference(of_svd, of_vp, figures):
    assert len(figures["E_X0"]) == 1024
    # 9 digits of E[X0] and 12 of tr(Cov)/d are in the file. Dividing by N - 1 would be 1.6 % off.
    np.testing.assert_allclose(of_svd.mean.flatten(), figures["E_X0"], rtol=5e-9)
    np.testing.assert_allclose(of_vp.mean.transpose(0, 1).flatten(), figures["E_X0"], rtol=5e-9)
    assert of_svd.variance == pytest.approx(figures["trCov_d"], rel=1e-11)
    assert of_svd.count == 64


@pytest.mark.parametrize("M", SCHEDULE_M)
@pytest.mark.parametrize(
    ("process", "blocks"),
    [
        (VP(zero_snr=True, rescale=0.7), ("vp_dynamicrafter", "rescale_zero_snr")),
        (VP(rescale=0.7), ("vp_dynamicrafter", "without_rescale")),
        (VP(rescale=0.7), ("vp_videocrafter1",)),
    ],
    ids=["zero SNR", "no zero SNR", "VideoCrafter1"],
)
def test_the_published_start_of_lvdm_models_equals_the_reference(process, blocks, M, of_vp, figures, eps):
    rows = figures
    for block in blocks:
        rows = rows[block]
    assert list(rows) == SCHEDULE_M
    want, t = rows[M], process.start(int(M))
    assert int(t) == want.get("index", int(M) - 1)
    assert float(process.alpha(t)) == pytest.approx(want["alpha_M=sqrt(abar)"], rel=1e-6)
    assert float(process.sigma(t)) == pytest.approx(want["sigma_M=sqrt(1-abar)"], rel=1e-6)
    mean, std = assert_start(process, M, of_vp, want, reference_compat=True)
    assert_start(replace(process, rescale=1.0), M, of_vp, want, reference_compat=False)
    if "reference_x_T" in want:
        assert want["reference_x_T"]["shape"] == [1, 4, 4, 8, 8]
        x = mean + std * eps.transpose(0, 1)
        assert_latents(x.transpose(0, 1), want["reference_x_T"], 1)


@pytest.mark.parametrize("M", SCHEDULE_M)
@pytest.mark.parametrize("family", ["dynamicrafter", "videocrafter1"])
def test_the_start_with_the_dynamic_rescale_equals_the_right_figures(family, M, of_vp, figures):
    rows = figures["vp_videocrafter1"] if family == "videocrafter1" else figures["vp_dynamicrafter"]["rescale_zero_snr"]
    process, want = VP(zero_snr=family == "dynamicrafter", rescale=0.7), rows[M]["with_dynamic_rescale"]
    assert float(process.x0_scale(process.start(int(M)))) == pytest.approx(want["scale_arr[M-1]"], rel=1e-6)
    assert_start(process, M, of_vp, want, reference_compat=False)


@pytest.mark.parametrize("sigma_max", ["700", "100", "50", "20"])
def test_the_start_of_svd_is_the_papers_and_on_request_the_published_one(sigma_max, of_svd, figures, eps):
    assert len(figures["edm_svd"]) == 4
    process, want = EDM(), figures["edm_svd"][sigma_max]
    t = process.start(float(sigma_max))
    mean, std = of_svd.at(process, t)
    # 9 digits in the file; the reference's own are float32.
    assert float(std) == pytest.approx(want["std_paper=sqrt(sigma_max^2+trCov_d)"], rel=5e-9)
    # The reference's init_noise_sigma has a 1 already (defect 13).
    of_reference = (std**2 + 1).sqrt()
    assert float((t**2 + 1).sqrt()) == pytest.approx(want["init_noise_sigma=sqrt(sigma_max^2+1)"], rel=1e-6)
    assert float(of_reference) == pytest.approx(want["std_reference=sqrt(init_noise_sigma^2+trCov_d)"], rel=1e-6)
    assert_latents(mean + of_reference * eps, want["latents_arguments_in_right_order"], float(sigma_max))
    # And its pipeline takes the mean for the variance and the variance for the mean (defect 3).
    mean, std = of_svd.at(process, t, reference_compat=True)
    assert_latents(mean + std * eps, want["latents_as_the_pipeline_really_calls_it_swapped"], float(sigma_max))


@pytest.mark.parametrize("M", SCHEDULE_M)
def test_M_cuts_the_schedule_and_does_not_squeeze_it(M, figures):
    """animate-anything sets the number of training steps to M (defect 9)."""
    assert list(figures["animate_anything_M"]) == SCHEDULE_M
    want, process, squeezed = figures["animate_anything_M"][M], VP(), VP(steps=int(M))
    t = process.start(int(M))
    # 7 digits in the file.
    ours = float(process.alpha(t))
    assert ours == pytest.approx(want["sqrt_abar_of_the_1000_step_schedule[M-1]"], rel=1e-6)
    assert float(squeezed.alpha(t)) == pytest.approx(want["sqrt_abar_used[M-1]"], rel=1e-6)
    assert (ours > 1.1 * float(squeezed.alpha(t))) == (M != "1000")
    times = process.times(50, int(M))
    assert int(t) == int(times[0]) == want["first_timestep"]
    # At M = 820 the reference makes 51 steps, down to step -1 made 0 (defect 2).
    assert len(times) == 50
    if want["n"] == 50:
        assert int(times[-1]) == want["last_timestep"]


def test_with_zero_snr_the_start_at_the_end_is_the_standard_normal():
    for process in (VP(zero_snr=True), VP(zero_snr=True, rescale=0.7)):
        t, draws = process.start(1000), [Draws([(0, i) for i in range(3)]) for _ in range(2)]
        for compat in (False, True):
            mean, std = some_noise().at(process, t, reference_compat=compat)
            assert torch.equal(mean, torch.zeros_like(mean))
            assert std == 1
        assert torch.equal(some_noise().sample(process, t, 3, draws[0]), draws[1].normal(2, 3, 4, 5))


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "M"), STARTS, ids=NAMES)
def test_mean_and_deviation_are_equation_5(process, M):
    noise, t = some_noise(), process.start(M)
    alpha, sigma = float(process.alpha(t) * process.x0_scale(t)), float(process.sigma(t))
    mean, std = noise.at(process, t)
    torch.testing.assert_close(mean, alpha * noise.mean, rtol=1e-14, atol=0)
    assert std.shape == ()
    assert float(std) ** 2 == pytest.approx(alpha**2 * 0.4 + sigma**2, rel=1e-14)


@pytest.mark.parametrize(("process", "M"), STARTS, ids=NAMES)
def test_a_diagonal_covariance_has_a_deviation_for_each_element(process, M):
    noise, t = with_diagonal(), process.start(M)
    alpha, sigma = process.alpha(t) * process.x0_scale(t), process.sigma(t)
    mean, std = noise.at(process, t, "diagonal")
    assert torch.equal(mean, noise.at(process, t)[0])
    torch.testing.assert_close(std, (alpha**2 * noise.diagonal + sigma**2).sqrt(), rtol=1e-14, atol=0)
    # Both have the same total variance.
    assert float((std**2).mean()) == pytest.approx(float(noise.at(process, t)[1]) ** 2, rel=1e-12)


def test_a_diagonal_covariance_that_is_not_known_is_refused():
    for ask in (some_noise().at, lambda *args: some_noise().sample(args[0], args[1], 1, covariance=args[2])):
        with pytest.raises(ValueError, match="covariance='diagonal': this initial noise has none"):
            ask(VP(), VP().start(940), "diagonal")


@pytest.mark.parametrize(
    "process", [VP(), VP(rescale=0.7), VP(zero_snr=True, rescale=0.5)], ids=["plain", "rescaled", "both"]
)
def test_the_start_has_the_moments_of_noised_data(process):
    """The mean and the average variance of add_noise(x0, eps, M - 1), counted in samples."""
    n, t = 20_000, process.start(500)
    spread = torch.tensor([0.2, 1.0, 2.0]).reshape(1, 3, 1, 1)
    x0 = torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1) + spread * randn(n, 1, 3, 1, 1, seed=3).float()
    x_M = process.add_noise(x0, randn(n, 1, 3, 1, 1, seed=4).float(), t.expand(n))
    noise = InitialNoise.from_moments(Moments.of(x0))
    (mean, std), (_, each) = noise.at(process, t), noise.at(process, t, "diagonal")
    # Five standard errors.
    assert ((x_M.mean(0) - mean).abs() < 5 * x_M.std(0) / n**0.5).all()
    assert float(x_M.var(0).mean()) == pytest.approx(float(std) ** 2, rel=5 * (2 / n) ** 0.5)
    torch.testing.assert_close(x_M.double().var(0), each**2, rtol=5 * (2 / n) ** 0.5, atol=0)


@pytest.mark.parametrize("process", [VP(), VP(zero_snr=True), VP(rescale=0.7)], ids=["plain", "zero SNR", "rescaled"])
def test_the_start_without_analytic_init_is_the_standard_normal_at_every_M(process):
    noise = InitialNoise.standard((1, 2, 2, 2))
    starts = [noise.at(process, process.start(M)) for M in range(1, 1001, 3)]
    assert all(float(std) == pytest.approx(1, abs=1e-15) for _, std in starts)
    assert all(torch.equal(mean, torch.zeros(1, 2, 2, 2, dtype=torch.float64)) for mean, _ in starts)
    drawn = noise.sample(process, process.start(300), 2, Draws([(0,), (1,)]))
    torch.testing.assert_close(drawn, Draws([(0,), (1,)]).normal(1, 2, 2, 2), rtol=1e-7, atol=0)


@pytest.mark.parametrize("sigma_max", [700.0, 20.0])
def test_the_start_without_analytic_init_of_edm_is_that_of_the_svd_pipeline(sigma_max, figures):
    mean, std = InitialNoise.standard((1, 2, 2, 2)).at(EDM(), EDM().start(sigma_max))
    want = figures["edm_svd"][str(int(sigma_max))]["init_noise_sigma=sqrt(sigma_max^2+1)"]
    assert float(std) == pytest.approx(want, rel=1e-6)  # float32
    assert not mean.any()


# -- Kullback-Leibler --------------------------------------------------------------------------------------------------


def normal(mean: Tensor, std: Tensor) -> Independent:
    return Independent(Normal(mean, std.expand_as(mean)), 4)


@pytest.mark.parametrize(("process", "M"), STARTS, ids=NAMES)
def test_the_divergence_is_that_of_two_normals(process, M):
    noise, t = with_diagonal(), process.start(M)
    marginal, d = normal(*noise.at(process, t, "diagonal")), noise.mean.numel()
    standard = normal(torch.zeros_like(noise.mean), (process.alpha(t) ** 2 + process.sigma(t) ** 2).sqrt())
    for covariance, start in (("isotropic", normal(*noise.at(process, t))), ("standard", standard)):
        want = float(kl_divergence(marginal, start)) / d
        # A sum of terms around (r - 1 - ln r), each rounded to 1e-16.
        assert noise.divergence(process, t, covariance) == pytest.approx(want, rel=1e-9, abs=1e-14)
    assert noise.divergence(process, t, "diagonal") == 0


@given(
    start=st.sampled_from(STARTS),
    seed=st.integers(0, 20),
    shift=st.floats(-1, 1),
    factor=st.floats(0.2, 5),
)
@quick
def test_no_other_isotropic_normal_is_nearer_to_the_marginal(start, seed, shift, factor):
    process, t, noise = start[0], start[0].start(start[1]), with_diagonal(seed)
    marginal, (mean, std) = normal(*noise.at(process, t, "diagonal")), noise.at(process, t)
    ours, d = noise.divergence(process, t, "isotropic"), mean.numel()
    others = {
        "shifted": normal(mean + shift * std, std),
        "turned": normal(mean + shift * std * randn(*mean.shape, seed=seed), std),
        "scaled": normal(mean, factor * std),
        "both": normal((1 + shift) * mean, factor * std),
    }
    for name, other in others.items():
        assert float(kl_divergence(marginal, other)) / d >= ours - 1e-12, name
    if abs(shift) > 0.01:
        assert float(kl_divergence(marginal, others["shifted"])) / d > ours
    if abs(factor - 1) > 0.01:
        assert float(kl_divergence(marginal, others["scaled"])) / d > ours
    assert 0 <= ours <= noise.divergence(process, t, "standard") + 1e-12


def test_analytic_init_is_the_nearer_the_more_signal_is_left():
    noise, process = with_diagonal(), VP()
    gains = [
        noise.divergence(process, process.start(M), "standard")
        - noise.divergence(process, process.start(M), "isotropic")
        for M in (1000, 900, 700, 400)
    ]
    assert gains == sorted(gains)
    assert gains[0] > 0


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["isotropic", "diagonal"])
def test_samples_have_the_mean_and_deviation_they_were_asked_for(covariance):
    noise, n, t = with_diagonal(), 20_000, VP().start(200)
    mean, std = noise.at(VP(), t, covariance)
    x = noise.sample(VP(), t, n, seeded(1), covariance).double()
    assert x.shape == (n, 2, 3, 4, 5)
    # Five standard errors, for each of 120 elements.
    assert ((x.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((x.std(0) / std - 1).abs() < 5 / (2 * n) ** 0.5).all()


def test_each_sample_has_noise_of_its_own():
    """The reference uses one x_T for all samples of a prompt (defect 31)."""
    noise, t = InitialNoise.standard((4, 4, 8, 8)), VP().start(940)
    for random in (seeded(1), Draws([(0, i) for i in range(6)])):
        eps = noise.sample(VP(), t, 6, random).flatten(1)
        apart = torch.corrcoef(eps)[~torch.eye(6, dtype=torch.bool)]
        assert apart.abs().max() < 5 / eps.shape[1] ** 0.5  # five standard errors


def test_a_sample_is_a_function_of_its_key_and_float32():
    keys, t = [(0, i) for i in range(3)], VP().start(940)
    together = some_noise().sample(VP(), t, 3, Draws(keys))
    alone = some_noise().sample(VP(), t, 1, Draws(keys[2:]))
    assert torch.equal(alone[0], together[2])
    assert together.dtype == torch.float32
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("process", [VP(zero_snr=True, rescale=0.7), EDM()], ids=["VP", "EDM"])
def test_samples_of_published_starts_are_made_of_the_same_noise(process):
    noise, t = some_noise(), process.start(500)
    mean, std = noise.at(process, t, reference_compat=True)
    x = noise.sample(process, t, 2, Draws([(0,), (1,)]), reference_compat=True)
    eps = Draws([(0,), (1,)]).normal(2, 3, 4, 5)
    torch.testing.assert_close(x, mean.float() + std.float() * eps, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(x, noise.sample(process, t, 2, Draws([(0,), (1,)])))


def test_sampling_from_a_generator_leaves_torchs_own_alone():
    state, t = torch.random.get_rng_state(), VP().start(940)
    first = some_noise().sample(VP(), t, 2, seeded(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(some_noise().sample(VP(), t, 2, seeded(1)), first)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "M"), [(VP(), 0), (VP(), 1001), (EDM(), 701), (EDM(), 0), (Flow(), 0)])
def test_a_start_outside_the_process_is_refused(process, M):
    with pytest.raises(ValueError, match=f"M={M}"):
        some_noise().sample(process, process.start(M), 1)


def test_M_where_a_time_belongs_is_refused_and_the_way_to_a_time_is_told():
    with pytest.raises(ValueError, match=r"t=940: a time of the process; of M it is process.start\(M\)"):
        some_noise().at(VP(), 940)


def test_an_unknown_covariance_and_an_empty_batch_are_refused():
    with pytest.raises(ValueError, match="covariance='full': one of isotropic, diagonal"):
        some_noise().at(VP(), VP().start(940), "full")
    with pytest.raises(ValueError, match="batch=0"):
        some_noise().sample(VP(), VP().start(940), 0)


@pytest.mark.parametrize("variance", [-1e-9, float("nan"), float("inf")])
def test_an_impossible_variance_is_refused(variance):
    with pytest.raises(ValueError, match=f"variance={variance}"):
        some_noise(variance)


def test_an_impossible_mean_or_diagonal_is_refused():
    mean = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"mean of shape \[3, 4, 5\]: E\[X0\] is \[T, C, H, W\]"):
        InitialNoise(mean[0], 0.4)
    with pytest.raises(ValueError, match=r"diagonal of \[3, 2, 4, 5\] beside a mean of \[2, 3, 4, 5\]"):
        InitialNoise(mean, 0.4, mean.transpose(0, 1))
    mean[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        InitialNoise(mean, 0.4)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_an_impossible_diagonal_is_refused(bad):
    diagonal = torch.full((2, 3, 4, 5), 0.4)
    diagonal[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match="diagonal"):
        InitialNoise(torch.zeros(2, 3, 4, 5), 0.4, diagonal)


def test_no_samples_make_no_initial_noise():
    with pytest.raises(ValueError, match="count=0"):
        InitialNoise.from_moments(Moments.zeros((2, 3, 4, 4)))
    with pytest.raises(ValueError, match="count=0"):
        InitialNoise.from_moments(*[Moments.zeros((2, 3, 4, 4))] * 3)


def test_noise_of_another_family_or_scaling_factor_is_refused_by_both_names():
    noise = some_noise(family="svd", scaling_factor="0.18215")
    noise.check((2, 3, 4, 5), family="svd", scaling_factor=0.18215)
    with pytest.raises(ValueError, match="family svd, not dynamicrafter"):
        noise.check((2, 3, 4, 5), family="dynamicrafter")
    with pytest.raises(ValueError, match=r"scaling_factor 0\.18215, not 0\.13025"):
        noise.check((2, 3, 4, 5), family="svd", scaling_factor=0.13025)
    with pytest.raises(ValueError, match="family svd, not toy, frames 2, not 8"):
        noise.check((8, 3, 4, 5), family="toy")


def test_what_a_file_does_not_say_is_not_checked():
    InitialNoise.from_bytes(some_noise(family="svd").to_published("svd")).check((2, 3, 4, 5), family="dynamicrafter")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((16, 3, 4, 5), "frames 2, not 16$"),
        ((2, 4, 4, 5), "channels 3, not 4$"),
        ((2, 3, 40, 5), "latent height 4, not 40$"),
        ((2, 3, 4, 64), "latent width 5, not 64$"),
        ((3, 2, 4, 5), "frames 2, not 3, channels 3, not 2$"),
        ((2, 3, 5, 4), "latent height 4, not 5, latent width 5, not 4$"),
    ],
)
def test_noise_of_another_shape_is_refused_by_the_axis_that_differs(shape, said):
    with pytest.raises(ValueError, match=said):
        some_noise().check(shape)


# -- standard errors ---------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 6), min_size=2, max_size=7).filter(lambda sizes: sum(map(bool, sizes)) > 1))
@quick
def test_standard_errors_equal_leaving_out_each_group_by_hand(sizes):
    groups = [Moments.of(100 + randn(n, 1, 2, 3, 2, seed=i)) for i, n in enumerate(sizes)]
    full = [i for i, n in enumerate(sizes) if n]
    without = [InitialNoise.from_moments(Moments.merged(groups[j] for j in full if j != i)) for i in full]
    means = torch.stack([noise.mean for noise in without])
    variances = torch.tensor([noise.variance for noise in without], dtype=torch.float64)
    share = (len(full) - 1) / len(full) * len(full)  # of a population variance
    found = InitialNoise.from_moments(*groups)
    # Means of 100 are rounded to 1e-14, beside errors around 0.1.
    assert found.mean_error == pytest.approx(float(share * means.var(0, correction=0).mean()) ** 0.5, rel=1e-10)
    want = float(share * variances.var(correction=0)) ** 0.5
    assert found.variance_error == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_one_group_tells_the_error_of_independent_samples_and_none_of_the_variance():
    x = randn(50, 1, 2, 3, 2)
    alone, each = InitialNoise.from_moments(Moments.of(x)), InitialNoise.from_moments(*map(Moments.of, x.split(1)))
    assert alone.mean_error == pytest.approx((alone.variance / 49) ** 0.5, rel=1e-15)
    assert alone.variance_error is None
    # A group for each sample: the jackknife of a mean is s / sqrt(n), of the variance that divides by n - 1.
    assert each.mean_error == pytest.approx((alone.variance / 49) ** 0.5, rel=1e-12)
    torch.testing.assert_close(each.mean, alone.mean, rtol=1e-14, atol=1e-15)
    empty = InitialNoise.from_moments(Moments.of(x), Moments.zeros((1, 2, 3, 2)))
    assert (empty.mean_error, empty.variance_error) == (alone.mean_error, None)


def test_one_sample_tells_no_error():
    assert InitialNoise.from_moments(Moments.of(randn(1, 1, 2, 3, 2))).mean_error is None


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="parts: at least one"):
        InitialNoise.from_moments()


def test_noise_can_be_sent_to_another_process():
    before = some_noise(family="svd")
    after = pickle.loads(pickle.dumps(before))
    assert torch.equal(after.mean, before.mean)
    assert after.facts == before.facts


def test_the_standard_start_is_refused_a_file_in_any_layout():
    for layout in (None, "lvdm", "svd"):
        with pytest.raises(ValueError, match="the standard start needs no file"):
            InitialNoise.standard((1, 2, 2, 2)).save("nowhere", layout)


def test_a_published_parameter_is_read_without_its_gradient():
    file = io.BytesIO()
    torch.save({"Expectation_x_0": torch.nn.Parameter(torch.zeros(1, 2, 2, 2)), "trCov_d": 1.0}, file)
    noise = InitialNoise.from_bytes(file.getvalue())
    assert not noise.sample(VP(), VP().start(900), 1).requires_grad


@pytest.mark.parametrize("likeness", [0.0, 0.9], ids=["independent clips", "clips of a video alike"])
def test_standard_errors_are_the_spread_over_repeated_collections(likeness):
    videos, clips, runs = 40, 3, 150
    ours, means = [], []
    for run in range(runs):
        video = randn(videos, 1, 1, 2, 4, 4, seed=2 * run).expand(-1, clips, -1, -1, -1, -1)
        clip = randn(videos, clips, 1, 2, 4, 4, seed=2 * run + 1)
        x = likeness**0.5 * video + (1 - likeness) ** 0.5 * clip
        noise = InitialNoise.from_moments(*map(Moments.of, x))
        ours.append((noise.mean_error, noise.variance_error, noise.variance))
        means.append(noise.mean)
    mean_errors, variance_errors, variances = torch.tensor(ours, dtype=torch.float64).T
    true_mean = float(torch.stack(means).var(0).mean()) ** 0.5
    # The true spread is known from 150 runs to 1 / sqrt(300) = 6 % (of the mean, of 32 elements, to 1 %).
    assert float(mean_errors.square().mean()) ** 0.5 == pytest.approx(true_mean, rel=0.06)
    assert float(variance_errors.square().mean()) ** 0.5 == pytest.approx(float(variances.std()), rel=0.25)


def test_views_of_few_videos_are_not_counted_as_many_samples():
    videos, views = 20, 10
    x = randn(videos, 1, 2, 2, 4, 4).expand(-1, views, -1, -1, -1, -1) + 0.01 * randn(videos, views, 2, 2, 4, 4, seed=1)
    groups = [Moments.of(views_of_one) for views_of_one in x]
    grouped, naive = InitialNoise.from_moments(*groups), InitialNoise.from_moments(Moments.merged(groups))
    assert grouped.variance == naive.variance
    # sqrt(views), and sqrt(20 / 19) of a jackknife.
    assert grouped.mean_error / naive.mean_error == pytest.approx((views * 20 / 19) ** 0.5, rel=0.01)


def test_it_says_how_much_of_the_mean_is_sampling_noise_when_the_samples_are_few():
    shared = 0.5 * randn(1, 2, 4, 4)
    few, many = (
        InitialNoise.from_moments(*map(Moments.of, (shared + randn(n, 1, 2, 4, 4, seed=1)).split(1))) for n in (8, 800)
    )
    assert "sampling noise: more videos" in str(few)
    assert "sampling noise" not in str(many)
    assert f"{few.mean_error**2 / float(few.mean.square().mean()):.0%} of E[X0]" in str(few)
    for noise, n in ((few, 8), (many, 800)):
        assert f"from {n} samples" in str(noise)
        assert f"± {noise.mean_error:.2g}" in str(noise)
        assert f"tr(Cov)/d {noise.variance:.4g} ± {noise.variance_error:.2g}" in str(noise)


def test_it_says_nothing_of_errors_that_a_file_does_not_tell():
    shown = str(InitialNoise.from_bytes(some_noise().to_published("svd")))
    assert "±" not in shown
    assert "samples" not in shown
    assert "tr(Cov)/d 0.4" in shown


# -- our own files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.1 + 0.2, 1e-300, 0.0])
def test_our_own_file_gives_the_same_noise_back_to_the_bit(variance, tmp_path):
    known = with_diagonal()
    for before in (some_noise(variance), replace(known, facts={"family": "svd", "scaling_factor": "0.18215"})):
        before.save(tmp_path / "noise.safetensors")
        after = InitialNoise.load(tmp_path / "noise.safetensors")
        assert torch.equal(after.mean, before.mean)
        assert after.mean.dtype == torch.float64
        assert (after.diagonal is None) == (before.diagonal is None)
        assert before.diagonal is None or torch.equal(after.diagonal, before.diagonal)
        for name in ("variance", "count", "mean_error", "variance_error"):
            assert getattr(after, name) == getattr(before, name)
        assert dict(after.facts) == dict(before.facts)


def test_our_own_file_is_known_whatever_the_length_of_its_facts():
    """A file of safetensors begins with the length of its header, which may look like the first byte of a .pt."""
    first = set()
    for length in range(300):
        data = some_noise(note="x" * length).to_bytes()
        first.add(data[:1])
        assert InitialNoise.from_bytes(data).facts["note"] == "x" * length, data[:1]
    assert {b"P", b"\x80"} <= first


def test_the_file_says_where_its_figures_are_from(tmp_path):
    path = tmp_path / "initial_noise.safetensors"
    with pytest.raises(ValueError, match="variance are names of figures"):
        replace(some_noise(), facts={"variance": "a lie"})
    replace(some_noise(), facts={"encoder": "toy-dct4"}).save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"encoder": "toy-dct4", "variance": "0.4", "count": "10"}
        assert torch.equal(file.get_tensor("mean"), some_noise().mean)


def test_facts_of_the_moments_are_in_the_file():
    noise = InitialNoise.from_moments(Moments.of(randn(3, 1, 2, 2, 2)), family="svd", source="a test")
    assert dict(InitialNoise.from_bytes(noise.to_bytes()).facts) == {"family": "svd", "source": "a test"}


def test_a_mean_in_any_memory_order_can_be_written():
    turned = InitialNoise(some_noise().mean.transpose(0, 1), 0.4, some_noise().mean.transpose(0, 1) ** 2)
    assert torch.equal(InitialNoise.from_bytes(turned.to_bytes()).mean, turned.mean)
    for layout in ("lvdm", "svd"):
        assert torch.equal(InitialNoise.from_bytes(turned.to_published(layout)).mean, turned.mean.float().double())


# -- published files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "names", "shape"),
    [
        ("lvdm", {"Expectation_X0", "Tr_Cov_d"}, (1, 3, 2, 4, 5)),
        ("svd", {"Expectation_x_0", "trCov_d"}, (2, 3, 4, 5)),
    ],
)
def test_published_layouts_are_written_as_the_references_loaders_read_them(layout, names, shape, tmp_path):
    before, path = some_noise(0.25), tmp_path / "noise.pt"
    before.save(path, layout)
    state = torch.load(path, weights_only=True)
    mean, scalar = (state[name] for name in sorted(names, key=lambda name: "xpectation" not in name))
    assert set(state) == names
    assert tuple(mean.shape) == shape
    assert mean.dtype == torch.float32
    assert mean.is_contiguous()
    assert float(scalar) == 0.25
    after = InitialNoise.load(path)
    assert torch.equal(after.mean, before.mean.float().double())
    assert after.variance == 0.25
    assert (after.diagonal, after.count, after.mean_error, dict(after.facts)) == (None, 0, None, {})
    after.save(path, layout)
    assert torch.equal(InitialNoise.load(path).mean, after.mean)


@pytest.mark.parametrize("scalar", [0.4, torch.tensor(0.4), torch.tensor([0.4]), torch.tensor(0.4).double()], ids=repr)
@pytest.mark.parametrize(
    ("names", "made"),
    [
        (("Expectation_X0", "Tr_Cov_d"), lambda mean: mean.transpose(0, 1)[None]),
        (("Expectation_x_0", "trCov_d"), lambda mean: mean),
        (("Expectation_x_0", "trCov_d"), lambda mean: mean[None]),
    ],
    ids=["1 C T H W", "T C H W", "1 T C H W"],
)
def test_files_as_the_authors_made_them_are_read(names, made, scalar):
    mean = randn(16, 4, 5, 6).float()
    noise = InitialNoise.from_bytes(saved(dict(zip(names, (made(mean), scalar), strict=True))))
    assert torch.equal(noise.mean, mean.double())
    assert noise.mean.is_contiguous()
    assert noise.variance == pytest.approx(0.4, rel=1e-7)  # float32
    noise.check((16, 4, 5, 6))


def test_files_of_torch_before_1_6_and_of_half_precision_are_read():
    mean, file = randn(2, 3, 4, 5).half(), io.BytesIO()
    torch.save({"Expectation_x_0": mean, "trCov_d": 0.4}, file, _use_new_zipfile_serialization=False)
    noise = InitialNoise.from_bytes(file.getvalue())
    assert torch.equal(noise.mean, mean.double())
    assert noise.mean.dtype == torch.float64


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.load finds a GPU for tensors that say they are of one")
@pytest.mark.parametrize("layout", ["lvdm", "svd"])
def test_a_file_of_cuda_tensors_is_read_on_a_machine_without_a_gpu(layout):
    """The authors' loaders have no map_location and multiply by CUDA tensors: so were the means, probably."""
    file, before = io.BytesIO(), some_noise()
    with (
        zipfile.ZipFile(io.BytesIO(before.to_published(layout))) as cpu,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as cuda,
    ):
        for name in cpu.namelist():
            data = cpu.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            cuda.writestr(name, data)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    after = InitialNoise.from_bytes(file.getvalue())
    assert after.mean.device.type == "cpu"
    assert torch.equal(after.mean, before.mean.float().double())


def test_an_axis_order_that_cannot_be_is_refused_and_another_one_is_found_by_the_check():
    mean, lvdm, svd = randn(16, 4, 5, 6), ("Expectation_X0", "Tr_Cov_d"), ("Expectation_x_0", "trCov_d")
    for names, wrong, said in (
        (lvdm, mean, r"Expectation_X0 of shape \[16, 4, 5, 6\]: \[1, C, T, H, W\]"),
        (lvdm, torch.stack([mean] * 2), r"Expectation_X0 of shape \[2, 16, 4, 5, 6\]: \[1, C, T, H, W\]"),
        (svd, mean[0], r"Expectation_x_0 of shape \[4, 5, 6\]: \[T, C, H, W\]"),
        (svd, torch.stack([mean] * 2), r"Expectation_x_0 of shape \[2, 16, 4, 5, 6\]: \[T, C, H, W\]"),
    ):
        with pytest.raises(ValueError, match=said):
            InitialNoise.from_bytes(saved(dict(zip(names, (wrong, 0.4), strict=True))))
    for names, turned in ((lvdm, mean[None]), (svd, mean.transpose(0, 1))):
        noise = InitialNoise.from_bytes(saved(dict(zip(names, (turned, 0.4), strict=True))))
        with pytest.raises(ValueError, match="frames 4, not 16, channels 16, not 4"):
            noise.check((16, 4, 5, 6))


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout='pia': one of lvdm, svd"):
        some_noise().to_published("pia")


# -- files that are none -----------------------------------------------------------------------------------------------


def refusal(data: bytes, tmp_path) -> str:
    """What a user is told: a ValueError, on one line, that begins with the path."""
    path = tmp_path / "initial_noise_512.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="initial_noise_512") as refused:
        InitialNoise.load(path)
    said = str(refused.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


class Executes:
    """Unpickled without care, makes a folder."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch before 1.6"])
def test_a_pickle_that_would_execute_code_is_refused_and_executes_nothing(kind, tmp_path):
    bomb = {"Expectation_x_0": torch.zeros(2, 3, 4, 5), "trCov_d": Executes(tmp_path / "executed")}
    file = io.BytesIO()
    if kind == "pickle":
        file.write(pickle.dumps(bomb["trCov_d"]))
    else:
        torch.save(bomb, file, _use_new_zipfile_serialization=kind == "torch")
    refusal(file.getvalue(), tmp_path)
    assert not (tmp_path / "executed").exists()
    if kind == "pickle":
        pickle.loads(file.getvalue())
    else:
        torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert (tmp_path / "executed").exists()  # where one lets it


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "begins with b''"),
        (b"<!DOCTYPE html>\n<html>Sign in</html>", "begins with b'<!DOCTYP'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "begins with b'version '"),
        (b"\x00" * 100, "neither a safetensors file of ours nor a .pt"),
        (b"Please sign in\n", "neither a safetensors file of ours nor a .pt"),
        (b"PK\x03\x04 and no more", "not a .pt file"),
        (safetensors.torch.save({"weight": torch.zeros(3)}), "lacks 'mean'"),
        (safetensors.torch.save({"mean": torch.zeros(2, 3, 4, 5)}), "lacks 'variance'"),
        (safetensors.torch.save({"mean": torch.zeros(3)}, metadata={"variance": "1"}), "mean of shape [3]"),
        (safetensors.torch.save({"mean": torch.zeros(1, 1, 1, 1)}, metadata={"variance": "nan"}), "variance=nan"),
        (saved({"state_dict": {}, "epoch": 3}), "a .pt file of state_dict, epoch; initial noise has Expectation_X0"),
        (saved({str(i): i for i in range(9)}), "a .pt file of 0, 1, 2, 3, 4; initial noise has"),
        (saved([torch.zeros(3)]), "a .pt file of list; initial noise has"),
        (saved(torch.zeros(3)), "a .pt file of Tensor; initial noise has"),
        (saved({"Expectation_X0": torch.zeros(1, 1, 1, 1, 1)}), "a .pt file of Expectation_X0; initial noise has"),
        (saved({"Expectation_x_0": torch.zeros(1, 1, 1, 1), "trCov_d": -1.0}), "variance=-1.0"),
        (saved({"Expectation_x_0": torch.full((1, 1, 1, 1), float("nan")), "trCov_d": 1.0}), "NaN or inf"),
        (saved({"Expectation_x_0": torch.zeros(2, 1, 1, 1), "trCov_d": torch.ones(2)}), "trCov_d of shape [2]: one"),
        (saved({"Expectation_x_0": torch.zeros(1, 1, 1, 1), "trCov_d": "0.4"}), "trCov_d"),
        (saved({"Expectation_x_0": None, "trCov_d": 0.4}), "Expectation_x_0"),
    ],
    ids=[
        *("empty", "HTML", "git LFS pointer", "zeros", "text that begins with P", "not quite a zip"),
        *("foreign safetensors", "no variance", "one dimension", "variance NaN"),
        *("checkpoint", "many keys", "list", "tensor", "half of it", "negative", "mean NaN", "vector", "text", "None"),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_path_and_what_was_found(data, said, tmp_path):
    assert said in refusal(data, tmp_path)


def legacy() -> bytes:
    file = io.BytesIO()
    state = {"Expectation_x_0": torch.ones(2, 3, 4, 5), "trCov_d": torch.tensor(0.4)}
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [with_diagonal().to_bytes(), some_noise().to_published("lvdm"), some_noise().to_published("svd"), legacy()],
    ids=["ours", "lvdm", "svd", "torch before 1.6"],
)
def test_a_truncated_file_is_refused(data, tmp_path):
    for kept in {*range(24), *range(24, len(data), max(len(data) // 60, 1)), len(data) - 1}:
        refusal(data[:kept], tmp_path)


@pytest.mark.parametrize("layout", ["lvdm", "svd"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_refused_or_holds_possible_figures(layout, tmp_path):
    """One byte at a time of the part that says what the file holds."""
    data = some_noise().to_published(layout)
    begin = data.index(b"data.pkl")
    for at in range(begin, begin + 450):
        damaged = data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]
        with contextlib.suppress(ValueError):
            noise = InitialNoise.from_bytes(damaged)
            assert noise.variance >= 0
            assert torch.isfinite(noise.mean).all()


def test_a_path_that_is_not_there_is_an_error_of_the_file_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        InitialNoise.load(tmp_path / "none.pt")
