"""The variance-preserving process: its table, its closed forms, and the way back from what a network answers."""

import numpy as np
import pytest
import torch

from cil import VP

FAMILIES = {"videocrafter1": VP(), "dynamicrafter": VP(zero_snr=True)}
PREDICTIONS = ("eps", "v", "x0")


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0, eps [B, T, C, H, W] in float64, and t [B] from the first index to the last but one."""
    random = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 1, 137, 500, 939, 998])
    x0, eps = torch.randn(2, len(t), 3, 4, 5, 6, generator=random, dtype=torch.float64)
    return x0, eps, t


@pytest.mark.parametrize("family", FAMILIES)
def test_alphas_bar_equal_the_reference_schedule(family, golden):
    want = golden["schedules"][family]["alphas_cumprod_float64"]
    ours = FAMILIES[family].alphas_bar[[int(t) for t in want]].numpy()
    # 15 digits are in the file; where zero_snr subtracts nearly equal roots (t = 998), float64 may lose two of them.
    np.testing.assert_allclose(ours, list(want.values()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_alphas_bar_equal_the_buffers_that_the_reference_saves(family, golden):
    want = golden["schedules"][family]["alphas_cumprod_float32"]
    ours = FAMILIES[family].alphas_bar[[int(t) for t in want]].numpy()
    np.testing.assert_allclose(ours, list(want.values()), rtol=2**-23, atol=0)  # float32 entries


@pytest.mark.parametrize("family", FAMILIES)
def test_betas_equal_the_reference(family, golden):
    process = FAMILIES[family]
    alphas_bar = torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_bar])
    betas = 1 - alphas_bar[1:] / alphas_bar[:-1]
    want = golden["schedules"][family]["betas_float32"]
    got = betas[[int(t) for t in want]].numpy()
    np.testing.assert_allclose(got, list(want.values()), rtol=2**-23, atol=0)  # float32 entries


def test_betas_are_squares_of_evenly_spaced_roots(golden):
    alphas_bar = torch.cat([torch.ones(1, dtype=torch.float64), VP().alphas_bar])
    betas = 1 - alphas_bar[1:] / alphas_bar[:-1]
    want = golden["schedules"]["videocrafter1"]["betas_before_rescale_float64"]
    # 1 - ratio: an absolute rounding of 2e-16 against betas of 1e-3.
    np.testing.assert_allclose(betas[[int(t) for t in want]].numpy(), list(want.values()), rtol=1e-12, atol=0)
    torch.testing.assert_close(betas.sqrt().diff(2), torch.zeros(998, dtype=torch.float64), rtol=0, atol=1e-13)


def test_zero_snr_ends_at_no_signal_and_begins_where_the_plain_schedule_begins():
    plain, zero = VP(), VP(zero_snr=True)
    assert zero.alphas_bar[-1] == 0
    assert zero.alphas_bar[0].item() == pytest.approx(plain.alphas_bar[0].item(), rel=1e-15)
    assert plain.alphas_bar[-1] > 0.004
    # A shift and a stretch of sqrt(alpha_bar), nothing else: the roots lie on one line.
    x, y = plain.alphas_bar.sqrt(), zero.alphas_bar.sqrt()
    slopes = (y - y[-1])[:-1] / (x - x[-1])[:-1]
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", [VP(), VP(zero_snr=True), VP(steps=7, beta_start=0.1, beta_end=0.3)])
def test_variance_is_preserved_and_noise_only_grows(process):
    t = torch.arange(process.steps)
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(process.steps, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (sigma.diff() > 0).all()
    assert (alpha.diff() < 0).all()


def test_three_steps_equal_the_product_by_hand():
    process = VP(steps=3, beta_start=0.04, beta_end=0.36)  # roots 0.2, 0.4, 0.6
    want = torch.tensor([0.96, 0.96 * 0.84, 0.96 * 0.84 * 0.64], dtype=torch.float64)
    torch.testing.assert_close(process.alphas_bar, want, rtol=1e-15, atol=0)


def test_noisy_latents_and_targets_equal_the_reference(golden, reference_input):
    """At t = 999 and 137 of a batch of two; the reference first scales x0 by 1 -> 0.7 over the first 400 steps."""
    shape = (2, 4, 4, 8, 12)
    x0, eps = reference_input("loss_x0", *shape), reference_input("loss_noise", *shape)
    for family, process in FAMILIES.items():
        want = golden["schedules"][family]["training_target"]
        t = torch.tensor(want["t"])
        rescaled = x0 * torch.tensor([0.7, 1 - 0.3 * 137 / 399]).reshape(2, 1, 1, 1, 1)
        x_t = process.add_noise(rescaled, eps, t)
        # float32: values up to 4 in both, each a sum of two products.
        np.testing.assert_allclose(x_t[0].flatten()[:4], want["x_noisy_first4"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(x_t[1].flatten()[:16], want["x_noisy_sample1_first16"], rtol=0, atol=1e-6)
        if family == "dynamicrafter":
            v = process.target("v", rescaled, eps, t)
            np.testing.assert_allclose(v[0].flatten()[:4], want["v_first4"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(v[1].flatten()[:16], want["v_sample1_first16"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_perfect_answer_gives_x0_and_eps_back(prediction, zero_snr, sample):
    process = VP(zero_snr=zero_snr)
    x0, eps, t = sample
    x_t = process.add_noise(x0, eps, t)
    got_x0, got_eps = process.split(prediction, process.target(prediction, x0, eps, t), x_t, t)
    # float64 rounding, divided by alpha (4e-4 at t = 998 with zero_snr) or by sigma (0.03 at t = 0).
    smallest = {"eps": process.alpha(t).min(), "x0": process.sigma(t).min(), "v": torch.tensor(1.0)}[prediction]
    torch.testing.assert_close(got_x0, x0, rtol=0, atol=2e-15 / float(smallest))
    torch.testing.assert_close(got_eps, eps, rtol=0, atol=2e-15 / float(smallest))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_answer_means_an_x0_and_eps_that_make_x_t(prediction, sample):
    x_t, answer, t = sample
    x0, eps = VP().split(prediction, answer, x_t, t)
    torch.testing.assert_close(VP().add_noise(x0, eps, t), x_t, rtol=0, atol=1e-13)
    torch.testing.assert_close(VP().target(prediction, x0, eps, t), answer, rtol=0, atol=1e-12)


def test_v_is_the_derivative_of_x_t_along_the_circle_of_alpha_and_sigma(sample):
    x0, eps, t = sample
    process, step = VP(), 1e-6
    angle = torch.atan2(process.sigma(t), process.alpha(t)).reshape(-1, 1, 1, 1, 1)
    ahead, behind = (a.cos() * x0 + a.sin() * eps for a in (angle + step, angle - step))
    # Central difference: error of order step^2, and rounding of 1e-16 / step.
    torch.testing.assert_close(process.target("v", x0, eps, t), (ahead - behind) / (2 * step), rtol=0, atol=1e-8)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_v_and_x0_are_defined_where_nothing_of_the_signal_is_left(prediction, sample):
    process = VP(zero_snr=True)
    x0, eps, _ = sample
    t = torch.full((len(x0),), 999)
    x_t = process.add_noise(x0, eps, t)
    assert torch.equal(x_t, eps)
    got_x0, got_eps = process.split(prediction, process.target(prediction, x0, eps, t), x_t, t)
    assert torch.equal(got_x0, x0)
    assert torch.equal(got_eps, eps)


def test_eps_is_refused_where_nothing_of_the_signal_is_left(sample):
    x_t, answer, _ = sample
    t = torch.tensor([0, 1, 137, 500, 939, 999])
    with pytest.raises(ValueError, match="use v or x0"):
        VP(zero_snr=True).split("eps", answer, x_t, t)


def test_noise_keeps_the_type_of_the_latents(sample):
    x0, eps, t = sample
    for dtype in (torch.float32, torch.float64):
        assert VP().add_noise(x0.to(dtype), eps.to(dtype), t).dtype == dtype


@pytest.mark.parametrize("M", [0, -1, 1001, 940.5])
def test_a_start_outside_the_schedule_is_refused(M):
    with pytest.raises(ValueError, match=rf"M={M}.*1\.\.1000"):
        VP().start(M)


def test_sampling_from_M_starts_at_the_index_before_it():
    assert [int(VP().start(M)) for M in (1, 940, 1000)] == [0, 939, 999]


def test_unit_time_is_the_share_of_the_schedule():
    assert VP(steps=500).unit_time(torch.tensor([0, 250, 499])).tolist() == pytest.approx([0, 0.5, 0.998])


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"beta_start": 0.0},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"beta_end": 1.0},
        {"beta_end": float("nan")},
    ],
)
def test_an_impossible_schedule_is_refused(bad):
    with pytest.raises(ValueError, match="|".join(bad)):
        VP(**bad)
