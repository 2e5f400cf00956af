"""The three processes: tables and closed forms, the way back from a network's answer, and the times of sampling."""

import math
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cil import EDM, VP, Draws, Flow, InitialNoise, Process, TimeNoise
from cil.objectives import edm_weight
from cil.processes import Prediction, Spacing

FAMILIES = {"videocrafter1": VP(rescale=0.7), "dynamicrafter": VP(zero_snr=True, rescale=0.7)}
PREDICTIONS = get_args(Prediction)
SPACINGS = get_args(Spacing)
FLOAT32 = 2**-23  # one unit in the last place of a float32 entry, relative
FEW = settings(max_examples=60, deadline=None)

# Times from one end of each process to the other; 0 of EDM and of Flow, where there is no noise, are not sampled from.
SIGMAS = [0.002, 0.05, 1.0, 20.0, 700.0]
SHARES = [1e-3, 0.2, 0.5, 0.999, 1.0]
INDICES = [0, 1, 137, 500, 998, 999]
CASES = {
    "VP": (VP(), INDICES),
    "VP zero_snr": (VP(zero_snr=True), INDICES),
    "VP rescale": (VP(rescale=0.7), INDICES),
    "VP zero_snr rescale": (VP(zero_snr=True, rescale=0.3), INDICES),
    "VP squared_cosine": (VP(betas="squared_cosine", zero_snr=True), INDICES),
    "EDM": (EDM(), SIGMAS),
    "Flow": (Flow(), SHARES),
}
PROCESSES = {"VP": VP(), "EDM": EDM(), "EDM sigma": EDM(time_map="sigma"), "Flow": Flow()}


def case(name: str) -> tuple[Process, Tensor]:
    process, times = CASES[name]
    return process, torch.tensor(times, dtype=torch.int64 if isinstance(process, VP) else torch.float64)


def latents(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x0, eps [count, T, C, H, W] in float64."""
    random = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, count, 2, 3, 4, 5, generator=random, dtype=torch.float64)
    return x0, eps


def betas_of(process: VP) -> Tensor:
    alphas_bar = torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_bar])
    return 1 - alphas_bar[1:] / alphas_bar[:-1]


# -- the tables of VP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_alphas_bar_equal_the_reference_schedule(family, golden):
    want = golden["schedules"][family]["alphas_cumprod_float64"]
    ours = FAMILIES[family].alphas_bar[[int(t) for t in want]].numpy()
    # 15 digits are in the file; where zero_snr subtracts nearly equal roots (t = 998), float64 may lose two of them.
    np.testing.assert_allclose(ours, list(want.values()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_buffer_equals_what_the_reference_saves(family, golden):
    process, want = FAMILIES[family], golden["schedules"][family]["buffers_float32"]
    t = torch.arange(1000)
    ours = {
        "betas": betas_of(process),
        "alphas_cumprod": process.alphas_bar,
        "alphas_cumprod_prev": torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_bar[:-1]]),
        "sqrt_alphas_cumprod": process.alpha(t),
        "sqrt_one_minus_alphas_cumprod": process.sigma(t),
    }
    assert ours.keys() == want.keys()
    for name, values in want.items():
        assert len(values) == 32
        got = ours[name][[int(t) for t in values]].numpy()
        np.testing.assert_allclose(got, list(values.values()), rtol=FLOAT32, atol=0, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_betas_before_the_rescale_equal_the_reference(family, golden):
    want = golden["schedules"][family]["betas_before_rescale_float64"]
    got = betas_of(VP())[[int(t) for t in want]].numpy()
    # 1 - ratio: an absolute rounding of 2e-16 against betas of 1e-3.
    np.testing.assert_allclose(got, list(want.values()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dynamic_rescale_equals_the_reference(family, golden):
    process, want = FAMILIES[family], golden["schedules"][family]["scale_arr"]
    assert len(process.scale_arr) == want["length"]
    indices = [int(t) for t in want["values"]]
    got = process.scale_arr[indices].numpy()
    np.testing.assert_allclose(got, list(want["values"].values()), rtol=FLOAT32, atol=0)
    within = torch.tensor([t for t in indices if t < process.steps])
    assert torch.equal(process.x0_scale(within), process.scale_arr[within])


@pytest.mark.parametrize("family", FAMILIES)
def test_noisy_latents_and_targets_equal_the_reference(family, golden, reference_input):
    """At t = 999 and 137 of a batch of two."""
    process, want = FAMILIES[family], golden["schedules"][family]["training_target"]
    x0, eps = (reference_input(name, 2, 4, 4, 8, 12) for name in ("loss_x0", "loss_noise"))
    t = torch.tensor(want["t"])
    tensors = {"x_noisy": process.add_noise(x0, eps, t)}
    if family == "dynamicrafter":
        tensors["v"] = process.target("v", x0, eps, t)
        assert float(tensors["v"].square().mean()) == pytest.approx(want["mse_of_zero_prediction"], rel=1e-6)
    else:
        assert torch.equal(process.target("eps", x0, eps, t), eps)
    for name, ours in tensors.items():
        assert list(ours.shape) == want[name]["shape"]
        # float32: values up to 4, each a sum of two products. The mean is of 3072 of them.
        assert float(ours.mean()) == pytest.approx(want[name]["mean"], abs=1e-7)
        assert float(ours.std()) == pytest.approx(want[name]["std"], rel=1e-6)
        assert float(ours.abs().max()) == pytest.approx(want[name]["absmax"], rel=1e-6)
        np.testing.assert_allclose(ours[0].flatten()[:4], want[name]["first4"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours[1].flatten()[:16], want[f"{name}_sample1_first16"], rtol=0, atol=1e-6)


def test_betas_are_squares_of_evenly_spaced_roots():
    roots = betas_of(VP()).sqrt()
    torch.testing.assert_close(roots.diff(n=2), torch.zeros(998, dtype=torch.float64), rtol=0, atol=1e-13)  # see above


def test_three_steps_equal_the_product_by_hand():
    process = VP(steps=3, beta_start=0.04, beta_end=0.36)  # roots 0.2, 0.4, 0.6
    want = torch.tensor([0.96, 0.96 * 0.84, 0.96 * 0.84 * 0.64], dtype=torch.float64)
    torch.testing.assert_close(process.alphas_bar, want, rtol=1e-15, atol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_squared_cosine_equals_its_formula(steps, zero_snr):
    def curve(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - curve((i + 1) / steps) / curve(i / steps), 0.999) for i in range(steps)]
    want = np.cumprod(1 - np.array(betas))
    if zero_snr:
        root = np.sqrt(want)
        want = (root[0] / (root[0] - root[-1]) * (root - root[-1])) ** 2
        assert want[-1] == 0
    else:
        assert betas[-1] == 0.999
    ours = VP(steps, betas="squared_cosine", zero_snr=zero_snr).alphas_bar.numpy()
    # 1000 factors, each rounded to 1e-16; near the end zero_snr subtracts roots that differ in the third digit.
    np.testing.assert_allclose(ours, want, rtol=1e-12, atol=0)


def test_zero_snr_ends_at_no_signal_and_begins_where_the_plain_schedule_begins():
    plain, zero = VP(), VP(zero_snr=True)
    assert zero.alphas_bar[-1] == 0
    assert zero.alphas_bar[0].item() == pytest.approx(plain.alphas_bar[0].item(), rel=1e-15)
    assert plain.alphas_bar[-1] > 0.004
    # A shift and a stretch of sqrt(alpha_bar), nothing else: the roots lie on one line.
    x, y = plain.alphas_bar.sqrt(), zero.alphas_bar.sqrt()
    slopes = (y - y[-1])[:-1] / (x - x[-1])[:-1]
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "process",
    [VP(), VP(zero_snr=True), VP(steps=7, beta_start=0.1, beta_end=0.3), VP(betas="squared_cosine"), VP(rescale=0.3)],
)
def test_variance_is_preserved_and_noise_only_grows(process):
    t = torch.arange(process.steps)
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(process.steps, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (sigma.diff() > 0).all()
    assert (alpha.diff() < 0).all()


@pytest.mark.parametrize(("turning_step", "rescale"), [(400, 0.7), (1, 0.5), (2, 0.3), (1400, 0.7), (400, 1.0)])
def test_the_dynamic_rescale_falls_from_1_by_the_turning_step_and_stays(turning_step, rescale):
    process = VP(rescale=rescale, turning_step=turning_step)
    scale = process.x0_scale(torch.arange(1000))
    assert scale[0] == 1
    assert (scale.diff() <= 0).all()
    assert (scale[turning_step:] == rescale).all()
    if turning_step <= 1000 and turning_step > 1:
        assert scale[turning_step - 1].item() == pytest.approx(rescale, rel=1e-15)
        assert (scale[: turning_step - 1] > rescale).all() or rescale == 1


def test_a_process_with_a_dynamic_rescale_noises_latents_that_are_scaled_first():
    x0, eps = latents(3)
    t = torch.tensor([0, 200, 999])
    factors = torch.tensor([1, 1 - 0.3 * 200 / 399, 0.7], dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    got = VP(rescale=0.7).add_noise(x0, eps, t)
    torch.testing.assert_close(got, VP().add_noise(factors * x0, eps, t), rtol=0, atol=1e-14)  # float64, values up to 4


# -- a shifted noise schedule ----------------------------------------------------------------------------------------


def log_snr(process: Process, t: Tensor) -> Tensor:
    return 2 * (process.alpha(t).log() - process.sigma(t).log())


@pytest.mark.parametrize("by", [0.3, 2.0, 7.5])
@pytest.mark.parametrize("name", CASES)
def test_a_shift_lowers_the_log_snr_by_2_ln_s_at_every_training_time(name, by):
    process = CASES[name][0]
    plain, shifted = (log_snr(one, one.training_times(1000)) for one in (process, process.shifted(by)))
    there = plain.isfinite()
    assert there.sum() >= 999
    torch.testing.assert_close(shifted[there], plain[there] - 2 * math.log(by), rtol=0, atol=1e-8)
    # Without any signal there is none after it.
    assert torch.equal(shifted[~there], plain[~there])


def test_shifted_tables_are_the_closed_forms():
    plain, s = VP(zero_snr=True).alphas_bar, 2.5
    shifted = VP(zero_snr=True, rescale=0.7).shifted(s)
    wanted = 1 / (1 + s**2 * (1 / plain[:-1] - 1))
    torch.testing.assert_close(shifted.alphas_bar[:-1], wanted, rtol=1e-13, atol=0)
    assert shifted.alphas_bar[-1] == 0
    index = torch.arange(1000)
    torch.testing.assert_close(shifted.alpha(index) ** 2, shifted.alphas_bar, rtol=1e-13, atol=0)
    torch.testing.assert_close(shifted.sigma(index) ** 2, 1 - shifted.alphas_bar, rtol=1e-13, atol=1e-16)
    assert shifted.scale_arr[-1] == 0.7
    assert EDM(P_mean=0.7).shifted(s) == EDM(P_mean=0.7 + math.log(s))
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    torch.testing.assert_close(Flow().shifted(s).training_times(100), s * u / (1 + (s - 1) * u), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_shift_by_one_is_none_and_two_are_their_product(name):
    process, t = CASES[name][0], CASES[name][0].training_times(50)
    same, twice = process.shifted(1.0), process.shifted(2.0).shifted(1.5)
    assert same == process
    assert torch.equal(same.alpha(t), process.alpha(t))
    torch.testing.assert_close(twice.training_times(50), process.shifted(3.0).training_times(50))
    assert torch.allclose(twice.sigma(t), process.shifted(3.0).sigma(t), rtol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_draws_of_a_shifted_process_have_its_training_distribution(name):
    shifted = CASES[name][0].shifted(2.0)
    drawn = shifted.draw_times(Draws([(k,) for k in range(4000)])).double().sort().values
    wanted = shifted.training_times(4000).double()
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
    shares = torch.searchsorted(wanted, drawn, right=True) / 4000
    even = (torch.arange(4000) + 1) / 4000
    assert float((shares - even).abs().max()) < 1.95 / 4000**0.5 + 1e-3


def test_sampling_of_a_shifted_process_starts_at_M_and_is_as_shifted_as_training():
    """EDM's M and sigmas are the noise itself: a shift leaves them."""
    assert torch.equal(EDM().shifted(3.0).times(5, 100.0), EDM().times(5, 100.0))
    assert torch.equal(VP().shifted(3.0).times(5, 940), VP().times(5, 940))
    whole, part = Flow().shifted(3.0).times(4), Flow().shifted(3.0).times(4, 0.9)
    torch.testing.assert_close(log_snr(Flow(), whole)[1:], log_snr(Flow(), Flow().times(4))[1:] - 2 * math.log(3))
    assert (whole[0], part[0]) == (1.0, 0.9)
    even = part / (3 - 2 * part)  # the shift undone
    torch.testing.assert_close(even, even[0] * torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("by", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("process", [VP(), EDM(), Flow()])
def test_a_shift_that_is_none_is_refused(process, by):
    with pytest.raises(ValueError, match=rf"shift={by}: above 0"):
        process.shifted(by)


# -- EDM and flow --------------------------------------------------------------------------------------------------


def test_svds_preconditioning_equals_the_reference(golden):
    want = golden["schedules"]["svd_edm"]["preconditioning"]
    sigma = torch.tensor(want["sigma"], dtype=torch.float64)
    zero, one = torch.zeros(len(sigma), 1, dtype=torch.float64), torch.ones(len(sigma), 1, dtype=torch.float64)
    x, time = EDM().network_input(one, sigma)
    ours = {
        "c_skip": EDM().split("v", zero, one, sigma)[0],
        "c_out": EDM().split("v", one, zero, sigma)[0],
        "c_in": x,
        "c_noise": time,
    }
    for name, values in ours.items():
        # float32 entries. The reference took sigma and what comes of it in float32: three roundings.
        np.testing.assert_allclose(values.flatten(), want[name], rtol=3 * FLOAT32, atol=0, err_msg=name)


def test_the_networks_time_is_one_number_a_sample_and_its_latents_keep_their_shape(golden):
    want = golden["schedules"]["svd_edm"]["preconditioning"]["c_noise_shape_for_sigma_of_shape_[2,1,1,1,1]"]
    x, time = EDM().network_input(torch.ones(2, 3, 4, 5, 6), torch.tensor([1.0, 2.0]))
    assert list(time.shape) == want
    assert x.shape == (2, 3, 4, 5, 6)
    assert x.dtype == time.dtype == torch.float32


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_weight_on_vs_error_is_the_references_weight_on_x0s_error(sigma_data, golden):
    figures = golden["schedules"]["svd_edm"]["preconditioning"]
    sigma = torch.tensor(figures["sigma"], dtype=torch.float64)
    # The error of x0 is that of v times sigma / sqrt(sigma^2 + 1).
    ours = edm_weight(sigma, sigma_data) * (sigma**2 + 1) / sigma**2
    want = figures["loss_weight"][f"sigma_data={sigma_data}"]
    np.testing.assert_allclose(ours.numpy(), want, rtol=5e-9, atol=0)  # 9 digits are in the file


@pytest.mark.parametrize("M", [700, 100, 50, 20])
def test_sigmas_network_times_and_the_first_deviation_equal_the_references_scheduler(M, golden):
    want = golden["schedules"]["svd_edm"]["schedulers"][str(M)]
    process = EDM(sigma_max=700)
    times = process.times(want["num_inference_steps"], M)
    assert want["sigmas"][-1] == 0  # where our sampler ends without being told
    # float32 entries, of what was rounded to float32 once before.
    np.testing.assert_allclose(times.numpy(), want["sigmas"][:-1], rtol=2 * FLOAT32, atol=0)
    network_times = process.network_input(torch.zeros(len(times), 1), times)[1]
    # The same error of sigma, which a quarter of ln makes absolute, and a rounding of its own.
    np.testing.assert_allclose(network_times, want["timesteps"], rtol=FLOAT32, atol=FLOAT32 / 2)
    std = InitialNoise.standard((1, 1, 1, 1)).at(process, times[0])[1]
    assert float(std) == pytest.approx(want["init_noise_sigma"], rel=FLOAT32)


@pytest.mark.parametrize("M", [0.01, 20, 700])
@pytest.mark.parametrize("steps", [2, 25])
def test_seventh_roots_of_sigmas_are_evenly_spaced(M, steps):
    roots = EDM().times(steps, M) ** (1 / 7)
    want = torch.linspace(M ** (1 / 7), 0.002 ** (1 / 7), steps, dtype=torch.float64)
    torch.testing.assert_close(roots, want, rtol=1e-14, atol=0)  # powers in float64


def test_flow_is_a_straight_line_from_latents_to_noise():
    x0, eps = latents(3)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    x_t = Flow().add_noise(x0, eps, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[2], eps[2])
    torch.testing.assert_close(x_t[1], x0[1] + 0.25 * (eps[1] - x0[1]), rtol=0, atol=1e-15)
    assert torch.equal(Flow().target("flow", x0, eps, t), eps - x0)  # its derivative by t, at every t


# -- predictions ---------------------------------------------------------------------------------------------------


def amplification(process: Process, prediction: str, t: Tensor) -> Tensor:
    """What `split` divides the rounding of x_t by, [B]."""
    alpha, sigma, scale = process.alpha(t), process.sigma(t), process.x0_scale(t)
    divisor = {"eps": alpha * scale, "x0": sigma}.get(prediction, scale * torch.ones_like(alpha))
    return (1 + (alpha + sigma) / divisor) if prediction in ("eps", "x0") else 1 + 1 / divisor


def assert_roundtrip(process: Process, prediction: str, x0: Tensor, eps: Tensor, t: Tensor) -> None:
    x_t = process.add_noise(x0, eps, t)
    answer = process.target(prediction, x0, eps, t)
    got_x0, got_eps = process.split(prediction, answer, x_t, t)
    bound = 4e-15 * amplification(process, prediction, t)  # ten roundings of values up to 4
    for got, want in ((got_x0, x0), (got_eps, eps)):
        errors = (got - want).abs().flatten(1).amax(1)
        assert (errors <= bound).all(), f"{errors.tolist()} above {bound.tolist()}"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CASES)
def test_a_perfect_answer_gives_x0_and_eps_back(name, prediction):
    process, t = case(name)
    if prediction == "eps":
        t = t[process.alpha(t) > 0]
    x0, eps = latents(len(t))
    assert_roundtrip(process, prediction, x0, eps, t)


@st.composite
def processes(draw) -> Process:
    kind = draw(st.sampled_from([VP, EDM, Flow]))
    if kind is VP:
        steps = draw(st.integers(2, 1200))
        return VP(
            steps,
            draw(st.sampled_from(["scaled_linear", "squared_cosine"])),
            draw(st.floats(1e-5, 1e-3)),
            draw(st.floats(1e-3, 0.02)),
            draw(st.booleans()),
            draw(st.floats(0.2, 1.0)),
            draw(st.integers(1, 2000)),
        )
    if kind is EDM:
        return EDM(
            draw(st.floats(1e-4, 0.1)),
            draw(st.floats(10, 1000)),
            time_map=draw(st.sampled_from(["log_sigma", "sigma"])),
        )
    return Flow()


def some_times(process: Process, shares: list[float]) -> Tensor:
    """The times that lie these shares of the way from the process's beginning to its end."""
    share = torch.tensor(shares, dtype=torch.float64)
    if isinstance(process, VP):
        return (share * (process.steps - 1)).round().long()
    if isinstance(process, EDM):
        return process.sigma_min * (process.sigma_max / process.sigma_min) ** share
    return share.clamp_min(1e-3)


@FEW
@given(processes(), st.sampled_from(PREDICTIONS), st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 99))
def test_whatever_the_process_and_time_a_perfect_answer_gives_x0_and_eps_back(process, prediction, shares, seed):
    t = some_times(process, shares)
    if prediction == "eps":
        t = t[process.alpha(t) > 0]
    x0, eps = latents(len(t), seed)
    if len(t):
        assert_roundtrip(process, prediction, x0, eps, t)


@FEW
@given(processes(), st.sampled_from(PREDICTIONS), st.floats(0, 1), st.integers(0, 99))
def test_any_answer_means_an_x0_and_eps_that_make_x_t(process, prediction, share, seed):
    t = some_times(process, [share])
    if prediction == "eps" and process.alpha(t) == 0:
        return
    x_t, answer = latents(1, seed)
    x0, eps = process.split(prediction, answer, x_t, t)
    size = float((process.alpha(t) * process.x0_scale(t)) * x0.abs().max() + process.sigma(t) * eps.abs().max())
    # Ten roundings of the two terms of x_t, which may be far larger than it.
    torch.testing.assert_close(process.add_noise(x0, eps, t), x_t, rtol=0, atol=2e-15 * max(size, 1))
    size = max(float(x0.abs().max()), float(eps.abs().max()), 1)
    torch.testing.assert_close(process.target(prediction, x0, eps, t), answer, rtol=0, atol=4e-15 * size)


@pytest.mark.parametrize("name", CASES)
def test_v_is_x_t_turned_by_90_degrees_and_brought_to_length_1(name):
    """In the plane of scaled x_0 and eps, taken here as two orthogonal unit vectors."""
    process, t = case(name)
    unit = torch.eye(2, dtype=torch.float64).expand(len(t), 2, 2)
    x0, eps = unit[:, 0] / process.x0_scale(t)[:, None], unit[:, 1]
    x_t, v = process.add_noise(x0, eps, t), process.target("v", x0, eps, t)
    lengths = x_t.norm(dim=1)
    torch.testing.assert_close(v.norm(dim=1), torch.ones_like(lengths), rtol=1e-14, atol=0)
    torch.testing.assert_close((x_t * v).sum(1) / lengths, torch.zeros_like(lengths), rtol=0, atol=1e-15)
    turned = torch.stack([-x_t[:, 1], x_t[:, 0]], dim=1) / lengths[:, None]
    torch.testing.assert_close(v, turned, rtol=0, atol=1e-15)


def test_v_of_a_vp_process_is_the_derivative_of_x_t_along_the_circle_of_alpha_and_sigma():
    process, t = case("VP")
    x0, eps = latents(len(t))
    step = 1e-6
    angle = torch.atan2(process.sigma(t), process.alpha(t)).reshape(-1, 1, 1, 1, 1)
    ahead, behind = (a.cos() * x0 + a.sin() * eps for a in (angle + step, angle - step))
    # Central difference: error of order step^2, and rounding of 1e-16 / step.
    torch.testing.assert_close(process.target("v", x0, eps, t), (ahead - behind) / (2 * step), rtol=0, atol=1e-8)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
@pytest.mark.parametrize(("process", "end"), [(VP(zero_snr=True), 999), (Flow(), 1.0)])
def test_v_x0_and_flow_are_defined_where_nothing_of_the_signal_is_left(process, end, prediction):
    x0, eps = latents(2)
    t = torch.tensor([end, end])
    x_t = process.add_noise(x0, eps, t)
    assert torch.equal(x_t, eps)
    got_x0, got_eps = process.split(prediction, process.target(prediction, x0, eps, t), x_t, t)
    torch.testing.assert_close(got_x0, x0, rtol=0, atol=2e-15)  # flow: eps - (eps - x0), values up to 4
    assert torch.equal(got_eps, eps)


@pytest.mark.parametrize(("process", "times"), [(VP(zero_snr=True), [0, 999]), (Flow(), [0.5, 1.0])])
def test_eps_is_refused_where_nothing_of_the_signal_is_left(process, times):
    x_t, answer = latents(2)
    with pytest.raises(ValueError, match="use v or x0"):
        process.split("eps", answer, x_t, torch.tensor(times))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_made_of_latents_has_their_type(name, dtype):
    process, t = case(name)
    x0, eps = (x.to(dtype) for x in latents(len(t)))
    made = [process.add_noise(x0, eps, t), process.target("v", x0, eps, t), *process.split("v", x0, eps, t)]
    assert [x.dtype for x in made] == [dtype] * 4


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_an_unknown_prediction_is_refused_with_those_there_are(process):
    x0, eps = latents(1)
    t = process.times(1)
    for call in (lambda: process.target("noise", x0, eps, t), lambda: process.split("noise", x0, eps, t)):
        with pytest.raises(ValueError, match=r"prediction='noise'.*eps, v, x0, flow"):
            call()


# -- times of training ---------------------------------------------------------------------------------------------


@FEW
@given(processes(), st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_unit_time_rises_with_time_and_stays_in_the_unit_interval(process, shares):
    u = process.unit_time(some_times(process, sorted(shares)))
    assert (u >= 0).all()
    assert (u <= 1).all()
    assert (u.diff() >= 0).all()


def test_unit_time_of_vp_and_flow_is_the_share_of_the_way():
    assert VP(steps=500).unit_time(torch.tensor([0, 250, 499])).tolist() == pytest.approx([0, 0.5, 0.998])
    assert Flow().unit_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 0.25, 1]


def test_unit_time_of_edm_is_even_in_ln_sigma():
    sigma = torch.logspace(math.log10(0.002), math.log10(700), 9, dtype=torch.float64)
    u = EDM().unit_time(sigma)
    assert u.tolist() == pytest.approx([i / 8 for i in range(9)], abs=1e-6)  # float32
    assert EDM().unit_time(torch.tensor([0.0, 1e-9, 900.0])).tolist() == [0, 0, 1]


def test_the_references_unit_time_of_edm_is_sigmas_share_of_the_largest_and_never_above_1():
    process = EDM(time_map="sigma")
    u = process.unit_time(torch.tensor([0.0, 70.0, 350.0, 700.0, 900.0, 1e6]))
    assert u.tolist() == pytest.approx([0, 0.1, 0.5, 1, 1, 1], rel=1e-7)  # float32
    # Without the clamp mu would be 2 (9/7)^5 - 1 = 6.03, and nearly every level beta_m.
    assert TimeNoise(15).center(process.unit_time(torch.tensor([900.0]))).item() == 1


@pytest.mark.parametrize("process", [VP(), VP(steps=7), EDM(), EDM(P_mean=-1.2, P_std=1.2), Flow()])
def test_times_are_drawn_with_the_quantiles_of_training_times(process):
    n, points = 10_000, 1000
    drawn = process.draw_times(Draws([(3, i) for i in range(n)]))
    assert drawn.shape == (n,)
    quantiles = process.training_times(points)
    assert quantiles.shape == (points,)
    assert (quantiles.diff() >= 0).all()
    drawn = drawn.double().sort().values
    # The i-th value, drawn and expected, must lie between each other's neighbours a Kolmogorov distance away: 1.95 /
    # sqrt(n) is exceeded once in a thousand. Half a step more, for quantiles are the middles of steps.
    slack = 1.95 / n**0.5 + 0.5 / points
    shares = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    below = torch.searchsorted(drawn, quantiles.double()) / n
    up_to = torch.searchsorted(drawn, quantiles.double(), right=True) / n
    assert (below - shares).max() <= slack
    assert (shares - up_to).max() <= slack


def test_ln_sigma_is_drawn_with_edms_mean_and_deviation():
    process, n = EDM(P_mean=-1.2, P_std=1.2), 10_000
    log_sigma = process.draw_times(Draws([(4, i) for i in range(n)])).double().log()
    # Four standard errors.
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=4 * 1.2 / n**0.5)
    assert float(log_sigma.std()) == pytest.approx(1.2, rel=4 / (2 * n) ** 0.5)


@pytest.mark.parametrize("process", [VP(), EDM(), Flow()])
def test_a_samples_time_is_a_function_of_its_own_key(process):
    keys = [(0, i) for i in range(5)]
    together = process.draw_times(Draws(keys))
    assert len(set(together.tolist())) == 5
    for i, key in enumerate(keys):
        assert torch.equal(process.draw_times(Draws([key])), together[i : i + 1])
    assert torch.equal(process.draw_times(Draws(keys[::-1])), together.flip(0))


def test_svds_training_hardly_ever_sees_a_large_sigma_by_the_references_figures_and_often_by_ours():
    def share_above(process: EDM, sigma: float) -> float:
        return float((process.training_times(100_000) > sigma).double().mean())

    assert share_above(EDM(P_mean=-1.2, P_std=1.2), 20) == pytest.approx(0.0002, abs=5e-5)  # defect 14, one digit
    assert share_above(EDM(), 20) > 0.05


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "M", "bounds"),
    [
        *[(VP(), M, r"an integer in 1\.\.1000") for M in (0, -1, 1001, 940.5)],
        (VP(), math.nan, r"an integer in 1\.\.1000"),
        (VP(), math.inf, r"an integer in 1\.\.1000"),
        (VP(steps=500), 501, r"1\.\.500"),
        *[(EDM(), M, r"0\.002\.\.700") for M in (0, 0.001, 701, -5, math.nan, math.inf)],
        *[(Flow(), M, "above 0, at most 1") for M in (0, -0.1, 1.01, 940, math.nan)],
    ],
)
def test_an_M_outside_the_process_is_refused_with_its_range(process, M, bounds):
    for call in (lambda: process.start(M), lambda: process.times(1, M)):
        with pytest.raises(ValueError, match=rf"M={M}\b.*{bounds}"):
            call()


def test_sampling_from_M_starts_at_the_index_before_it_or_at_M_itself():
    assert [int(VP().start(M)) for M in (1, 940, 1000)] == [0, 939, 999]
    assert [float(EDM().start(M)) for M in (0.002, 100, 700)] == [0.002, 100, 700]
    assert [float(Flow().start(M)) for M in (0.1, 1)] == [0.1, 1]


@pytest.mark.parametrize(
    ("process", "steps", "M"),
    [*[(VP(), steps, 10) for steps in (11, 0, -1)], (VP(), 2, 1), (VP(), 1001, None)]
    + [(process, steps, None) for process in (EDM(), Flow()) for steps in (0, -1)]
    + [(EDM(), 2, 0.002)],
)
def test_no_steps_or_more_than_there_are_are_refused(process, steps, M):
    with pytest.raises(ValueError, match=rf"steps={steps}\b"):
        process.times(steps, M)


def test_edm_takes_one_step_from_its_smallest_sigma():
    assert EDM().times(1, 0.002).tolist() == [0.002]


def test_an_unknown_spacing_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"spacing='quad'.*trailing, leading, uniform, linspace"):
        VP().times(5, 940, spacing="quad")


@pytest.mark.parametrize("t", [[-1], [0, -1], [1000], [3, 5000]])
def test_indices_outside_the_table_are_refused_rather_than_read_from_its_end(t):
    process, t = VP(), torch.tensor(t)
    x0, eps = latents(len(t))
    calls = (
        *(lambda f=f: f(t) for f in (process.alpha, process.sigma, process.x0_scale)),
        lambda: process.add_noise(x0, eps, t),
        lambda: process.target("v", x0, eps, t),
        lambda: process.split("v", x0, eps, t),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"t=\[.*0\.\.999"):
            call()


def test_a_time_that_is_no_index_is_refused_by_vp():
    for t in (torch.tensor([0.5]), torch.tensor(939.0)):
        with pytest.raises(ValueError, match=r"t=.*index, 0\.\.999"):
            VP().alpha(t)


@pytest.mark.parametrize("bad", [-0.1, -700.0, math.nan])
def test_a_negative_sigma_is_refused(bad):
    for call in (EDM().sigma, EDM().unit_time):
        with pytest.raises(ValueError, match=r"sigma=.*at least 0"):
            call(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("bad", [-0.1, 1.1, 939.0, math.nan])
def test_a_flow_time_outside_the_unit_interval_is_refused(bad):
    for call in (Flow().sigma, Flow().alpha):
        with pytest.raises(ValueError, match=r"t=.*0\.\.1"):
            call(torch.tensor([0.5, bad]))


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (VP, {"steps": 0}),
        (VP, {"steps": 1, "zero_snr": True}),
        (VP, {"betas": "linear"}),
        (VP, {"beta_start": 0.0}),
        (VP, {"beta_start": 0.5, "beta_end": 0.1}),
        (VP, {"beta_end": 1.0}),
        (VP, {"beta_end": math.nan}),
        (VP, {"rescale": 0.0}),
        (VP, {"rescale": 1.1}),
        (VP, {"rescale": math.nan}),
        (VP, {"turning_step": 0}),
        (EDM, {"sigma_min": 0.0}),
        (EDM, {"sigma_min": 5.0, "sigma_max": 1.0}),
        (EDM, {"sigma_max": math.inf}),
        (EDM, {"P_std": 0.0}),
        (EDM, {"P_std": math.nan}),
        (EDM, {"time_map": "linear"}),
    ],
)
def test_an_impossible_process_is_refused_by_the_name_of_what_is_wrong(kind, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        kind(**bad)


# -- times of sampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_trailing_steps_equal_the_references_but_for_its_step_minus_1(family, golden):
    want = golden["schedules"][family]["ddim_timesteps_50_steps_by_M"]
    assert sorted(map(int, want)) == [820, 860, 900, 940, 960, 1000]
    for M, spaced in want.items():
        ascending = [t for t in spaced["uniform_trailing"] if t >= 0]
        assert (M == "820") == (len(spaced["uniform_trailing"]) == 51)
        assert FAMILIES[family].times(50, int(M)).tolist() == ascending[::-1], M


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_uniform_steps_are_the_lowest_fifty_of_the_references(family, golden):
    want = golden["schedules"][family]["ddim_timesteps_50_steps_by_M"]
    surplus = {M: len(spaced["uniform"]) - 50 for M, spaced in want.items()}
    assert surplus == {"1000": 0, "960": 1, "940": 3, "900": 0, "860": 1, "820": 2}
    for M, spaced in want.items():
        assert FAMILIES[family].times(50, int(M), "uniform").tolist() == spaced["uniform"][:50][::-1], M


def test_the_steps_of_the_references_sampler_that_ignores_M_are_ours_without_an_M(golden):
    want = golden["schedules"]["videocrafter1"]["sampler_as_called_by_reference"]["timesteps"]
    assert VP().times(50, spacing="uniform").tolist() == want[::-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_five_steps_equal_those_of_the_references_trajectory(family, golden):
    want = golden[f"{family}_ddim_trajectory"]["timesteps_in_order"]
    spacing = {"dynamicrafter": (940, "trailing"), "videocrafter1": (None, "uniform")}
    assert VP().times(5, *spacing[family]).tolist() == want


@pytest.mark.parametrize("M", [820, 870, 920, 970])
@pytest.mark.parametrize("steps", [25, 50, 100])
def test_the_M_at_which_floating_point_gives_a_step_too_many_are_right(M, steps):
    indices = VP().times(steps, M)
    assert len(indices) == steps
    assert indices[-1] == round(M / steps) - 1


def assert_times(process: VP, steps: int, M: int, spacing: Spacing) -> None:
    """Whole numbers throughout: nothing here can be rounded as the code under test rounds."""
    times = process.times(steps, M, spacing)
    indices = times.tolist()
    told = f"steps={steps}, M={M}, {spacing}: {indices}"
    assert times.dtype == torch.int64, told
    assert len(indices) == steps, told
    assert all(a > b for a, b in pairwise(indices)), told
    assert indices[-1] >= 0, told
    assert indices[0] <= M - 1, told
    if spacing in ("trailing", "linspace"):
        assert indices[0] == M - 1, told
    if spacing == "trailing":  # within half an index of M (steps - i) / steps - 1
        assert all(abs(2 * ((t + 1) * steps - M * (steps - i))) <= steps for i, t in enumerate(indices)), told
    elif spacing == "linspace" and steps > 1:
        assert indices[-1] == 0, told
        assert all(abs(2 * ((M - 1 - t) * (steps - 1) - (M - 1) * i)) <= steps - 1 for i, t in enumerate(indices)), told
    elif spacing == "leading":  # diffusers: (arange(steps) * (M // steps))[::-1]
        assert indices == (np.arange(steps) * (M // steps))[::-1].tolist(), told
    elif spacing == "uniform":  # LVDM: (range(0, M, M // steps) + 1), cut to the number of steps, where that is below M
        lvdm = [t + 1 for t in range(0, M, M // steps)][:steps]
        assert indices[::-1] == (lvdm if lvdm[-1] < M else [t - 1 for t in lvdm]), told


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_M_has_its_fifty_steps(spacing):
    for M in range(1, 1001):
        assert_times(VP(), min(50, M), M, spacing)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_number_of_steps_from_any_M_has_that_many_distinct_falling_indices(data):
    process = VP(steps=data.draw(st.integers(1, 1000)))
    M = data.draw(st.integers(1, process.steps))
    assert_times(process, data.draw(st.integers(1, M)), M, data.draw(st.sampled_from(SPACINGS)))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_without_an_M_the_steps_are_those_from_the_end(spacing):
    process = VP(steps=300)
    assert torch.equal(process.times(7, spacing=spacing), process.times(7, 300, spacing))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_an_M_takes_its_steps_from_the_trained_schedule_and_spreads_no_betas_anew(spacing):
    process = VP()
    for M in (1000, 900, 820):
        times = process.times(50, M, spacing)
        # README of the figures, defect 9: step 899 has sqrt(abar) 0.1196, not 0.0893 as with betas spread over 900.
        torch.testing.assert_close(process.alpha(times), VP().alphas_bar[times].sqrt(), rtol=0, atol=0)
    assert process.alpha(process.times(50, 900)[0]).item() == pytest.approx(0.1196, abs=5e-5)
    assert VP(steps=900).alpha(torch.tensor(899)).item() == pytest.approx(0.0893, abs=5e-5)


@FEW
@given(st.integers(1, 200), st.floats(0.01, 700))
def test_edms_times_fall_from_exactly_M_to_sigma_min(steps, M):
    times = EDM().times(steps, M)
    assert len(times) == steps
    assert times[0].item() == M
    assert (times.diff() < 0).all()
    assert (times > 0).all()
    if steps > 1:
        assert times[-1].item() == pytest.approx(0.002, rel=1e-13)  # the seventh power of a seventh root


@FEW
@given(st.integers(1, 200), st.floats(0.01, 1))
def test_flows_times_fall_evenly_from_exactly_M_and_end_a_step_above_0(steps, M):
    times = Flow().times(steps, M)
    assert len(times) == steps
    assert times[0].item() == M
    assert (times > 0).all()
    gaps = torch.cat([times, torch.zeros(1, dtype=torch.float64)]).diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, -M / steps), rtol=0, atol=4e-16)  # roundings of shares


def test_without_an_M_edm_and_flow_begin_at_their_ends():
    assert EDM(sigma_max=80).times(5)[0] == 80
    assert Flow().times(5)[0] == 1


@pytest.mark.parametrize("process", [VP(), EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_shapes_that_do_not_go_together_are_refused(process):
    x, t = torch.zeros(3, 2, 4), process.training_times(3)
    with pytest.raises(ValueError, match=r"eps of shape \[1, 2, 4\]: \[3, 2, 4\]"):
        process.add_noise(x, x[:1], t)
    with pytest.raises(ValueError, match=r"answer of shape \[3, 2, 1\]"):
        process.split("v", x[:, :, :1], x, t)
    with pytest.raises(ValueError, match=r"one number a sample: \[2\] for a batch"):
        process.add_noise(x, x, t[:2])
    assert process.add_noise(x, x, t[0]).shape == x.shape  # one time for all


@pytest.mark.parametrize("process", [EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_an_index_is_refused_where_t_is_a_number(process):
    with pytest.raises(ValueError, match="not an index"):
        process.sigma(VP().start(940))


def test_times_outside_a_process_have_no_unit_time():
    for process, t in ((VP(), torch.tensor([2000])), (Flow(), torch.tensor([1.5])), (Flow(), torch.tensor([math.nan]))):
        with pytest.raises(ValueError, match=r"t="):
            process.unit_time(t)


@pytest.mark.parametrize(
    "bad", [{"P_mean": math.nan}, {"P_mean": math.inf}, {"P_std": 0.0}, {"P_std": math.inf}, {"P_std": -1.0}]
)
def test_a_distribution_of_sigma_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EDM(**bad)
