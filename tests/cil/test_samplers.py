"""From x_M to x_0: the steps taken, where they end when the denoiser is perfect, and the authors' samplers."""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from cil import EDM, VP, Draws, Flow, InitialNoise, Process, frame_ramp, guided, sample
from cil.families import load
from cil.processes import Prediction, per_sample
from cil.samplers import Denoiser, Level, _landing, _level, fresh_noise

MEAN, SPREAD = 0.7, 0.5  # of the data in the tests with a perfect denoiser
FAMILIES = {"dynamicrafter": VP(zero_snr=True, rescale=0.7), "videocrafter1": VP(rescale=0.7)}
FLOAT32 = 2**-23  # one unit in the last place of a float32 entry, relative

# Processes with an M inside them, and the spacings of their times.
STARTS = {
    "VP": (VP(), 940, {}),
    "VP linspace": (VP(), 940, {"spacing": "linspace"}),
    "VP leading": (VP(), 940, {"spacing": "leading"}),
    "VP uniform": (VP(), 940, {"spacing": "uniform"}),
    "VP rescale": (VP(rescale=0.7), 700, {}),
    "EDM": (EDM(), 100, {}),
    "Flow": (Flow(), 0.9, {}),
}
# The ends of the processes too, and predictions that say something of x_0 there.
ORACLES = {
    "VP 600": (VP(), 600, ("eps", "v", "x0", "flow")),
    "VP 1000": (VP(), 1000, ("eps", "v", "x0", "flow")),
    "VP zero_snr 1000": (VP(zero_snr=True), 1000, ("v", "x0", "flow")),
    "VP rescale 940": (VP(rescale=0.7), 940, ("eps", "v", "x0", "flow")),
    "EDM 0.5": (EDM(), 0.5, ("eps", "v", "x0", "flow")),
    "EDM 700": (EDM(), 700, ("eps", "v", "x0", "flow")),
    "Flow 0.6": (Flow(), 0.6, ("eps", "v", "x0", "flow")),
    "Flow 1": (Flow(), 1, ("v", "x0", "flow")),
}
TOLD = [(name, prediction) for name, (_, _, predictions) in ORACLES.items() for prediction in predictions]


def levels(process: Process, times: Iterable[float]) -> list[tuple[float, float]]:
    """What x_0 and eps are multiplied with at each time, written anew, and (1, 0) after the last."""
    pairs = []
    for t in times:
        if isinstance(process, VP):
            a = float(process.alphas_bar[int(t)])
            s = 1 - (1 - process.rescale) * min(int(t) / (process.turning_step - 1), 1)
            pairs.append((math.sqrt(a) * s, math.sqrt(1 - a)))
        else:
            pairs.append((1.0 if isinstance(process, EDM) else 1 - float(t), float(t)))
    return [*pairs, (1.0, 0.0)]


def perfect(process: Process, prediction: Prediction = "x0") -> Denoiser:
    """The posterior mean for data N(MEAN, SPREAD^2), told in the given kind of prediction."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (per_sample(c, x) for c in (process.alpha(t) * process.x0_scale(t), process.sigma(t)))
        off = x - alpha * MEAN
        variance = alpha**2 * SPREAD**2 + sigma**2
        x0, eps = MEAN + alpha * SPREAD**2 / variance * off, sigma / variance * off
        return process.target(prediction, x0, eps, t)

    return denoise


def start(process: Process, t: Tensor) -> Tensor:
    """x_M one deviation below, at, and one above its mean [3, 1]. Without fresh noise all is linear: that is enough."""
    mean, std = InitialNoise(torch.full((1, 1, 1, 1), MEAN, dtype=torch.float64), SPREAD**2).at(process, t)
    return mean.flatten() + std * torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)


def nonlinear(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise, of x and t, in additions, products and quotients: rounded alike in a batch of any size."""
    return 0.3 * x + x / (1 + x * x) + 0.1 * per_sample(t, x) / (1 + per_sample(t, x))


class Recorded:
    """A denoiser that keeps what it was asked."""

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise, self.x, self.t = denoise, [], []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.x.append(x.clone())
        self.t.append(t.clone())
        return self.denoise(x, t)


class Given(Draws):
    """Draws that are given, first to last, where others are random."""

    def __init__(self, normals: Iterable[Tensor], batch: int) -> None:
        super().__init__([(i,) for i in range(batch)])
        self.left = list(normals)

    def normal(self, *shape: int) -> Tensor:
        assert self.left[0].shape[1:] == shape
        return self.left.pop(0)


def random_latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the reference's figures ---------------------------------------------------------------------------------------


def test_eulers_steps_on_edm_equal_the_references_trajectory(golden, reference_input):
    want = golden["schedules"]["svd_edm"]["euler_trajectory_with_given_outputs"]
    shape, steps = want["shape"], want["steps"]
    times = EDM().times(steps, want["sigma_max"])
    std = InitialNoise.standard(tuple(shape[1:])).at(EDM(), times[0])[1]
    answers = iter([reference_input(f"euler_out_{i}", *shape) for i in range(steps)])
    asked = Recorded(lambda x, t: next(answers))
    end = sample(asked, std.float() * reference_input("euler_x", *shape), EDM(), times, "v")
    assert len(want["latents"]) == steps + 1 == len(asked.x) + 1
    for i, (ours, theirs) in enumerate(zip([*asked.x, end], want["latents"], strict=True)):
        # float32: some eight roundings of the latents as they are at this step; a step shrinks what came before.
        atol = 8 * FLOAT32 * np.abs(theirs).max()
        np.testing.assert_allclose(ours.flatten(), theirs, rtol=0, atol=atol, err_msg=f"step {i}")


DDIM_KEYS = {
    "dynamicrafter": ["M=1000,uniform_trailing", "M=940,uniform_trailing", "M=900,uniform_trailing"],
    "videocrafter1": [f"M={M},uniform{kind}" for M in (1000, 940, 900) for kind in ("_trailing", "")],
}


def reference_levels(family: str, ascending: list[int]) -> list[tuple[Level, Level]]:
    """Each step's level and the one that it goes to, ascending in t, as the reference ends them."""
    process, times = FAMILIES[family], torch.tensor(ascending[::-1])
    chain = [_level(process, t) for t in times] + [_landing(process, times[-1], family)]
    return list(itertools.pairwise(chain))[::-1]


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in DDIM_KEYS.items() for key in keys])
def test_the_levels_and_fresh_noise_of_each_step_equal_the_references_ddim_parameters(family, key, golden):
    figures = golden["schedules"][family]
    assert list(figures["ddim_parameters"]) == DDIM_KEYS[family]
    want = figures["ddim_parameters"][key]
    assert want["eta"] == 1
    M, spacing = key.removeprefix("M=").split(",")
    steps = reference_levels(family, figures["ddim_timesteps_50_steps_by_M"][M][spacing])
    ours = {
        "alphas": [now.alpha**2 for now, _ in steps],
        "alphas_prev": [after.alpha**2 for _, after in steps],
        "sigmas": [fresh_noise(now, after) for now, after in steps],
    }
    for name, got in ours.items():
        # alphas: float32 entries. sigmas: roots of 1 - a' and 1 - a/a', differences of float32 numbers near 1, each off
        # by up to 6e-8 and at the least 8.5e-4.
        rtol = FLOAT32 if name != "sigmas" else 7e-5
        np.testing.assert_allclose(got, want[name], rtol=rtol, atol=0, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dynamic_rescale_of_each_step_equals_the_references(family, golden):
    figures = golden["schedules"][family]
    if family == "dynamicrafter":
        want, ascending = figures["sampler_M940"], figures["ddim_timesteps_50_steps_by_M"]["940"]["uniform_trailing"]
    else:
        want = figures["sampler_as_called_by_reference"]
        ascending = want["timesteps"]
    steps = reference_levels(family, ascending)
    scales, after = ([pair[i].scale for pair in steps] for i in (0, 1))
    np.testing.assert_allclose(scales, want["ddim_scale_arr"], rtol=FLOAT32, atol=0)  # float32 entries
    np.testing.assert_allclose(after, want["ddim_scale_arr_prev"], rtol=FLOAT32, atol=0)


def lvdm(family: str, denoise, x, timesteps, guidance, rescale, eta, noises):
    """LVDM's DDIM sampler with dynamic rescale, in numpy and float64, from its formulas: nothing of cil is in it."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if family == "dynamicrafter":  # zero terminal SNR
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    scale_arr = np.concatenate([np.linspace(1, 0.7, 400), np.full(1000, 0.7)])
    for i, t in enumerate(timesteps):
        last = i == len(timesteps) - 1
        a, a_prev = abar[t], abar[0] if last else abar[timesteps[i + 1]]
        scale = scale_arr[t]
        if last:
            scale_prev = scale if family == "dynamicrafter" else scale_arr[0]
        else:
            scale_prev = scale_arr[timesteps[i + 1]]
        conditional, unconditional = (d(x, np.full((len(x), 1, 1, 1, 1), t)) for d in denoise)
        output = unconditional + guidance * (conditional - unconditional)
        if rescale > 0:
            axes = tuple(range(1, x.ndim))
            ratio = conditional.std(axes, ddof=1, keepdims=True) / output.std(axes, ddof=1, keepdims=True)
            output = rescale * output * ratio + (1 - rescale) * output
        if family == "dynamicrafter":  # v
            e_t = np.sqrt(a) * output + np.sqrt(1 - a) * x
            pred_x0 = np.sqrt(a) * x - np.sqrt(1 - a) * output
        else:
            e_t, pred_x0 = output, (x - np.sqrt(1 - a) * output) / np.sqrt(a)
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        direction = np.sqrt(1 - a_prev - sigma**2) * e_t
        if family == "dynamicrafter":
            pred_x0 = pred_x0 * scale_prev / scale
            x = np.sqrt(a_prev) * pred_x0 + direction + sigma * noises[i]
        else:
            x = np.sqrt(a_prev) * scale_prev * pred_x0 / scale + direction + sigma * noises[i]
    return x


def given_image(x, t):
    return 0.3 * x + x / (1 + x * x) + t / 4000


def no_image(x, t):
    return 0.35 * x + 0.9 * x / (1 + 2 * x * x) - t / 9000


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_trajectories_equal_the_authors_sampler_written_anew(family, eta, golden, reference_input):
    figures, process = golden[f"{family}_ddim_trajectory"], FAMILIES[family]
    shape, M, timesteps = figures["shape"], figures["M"], figures["timesteps_in_order"]
    guidance, rescale = figures["cfg"], figures["guidance_rescale"]
    noise = InitialNoise(0.3 * reference_input("traj_mean", *shape)[0].double(), figures["trCov_d"])
    mean, std = noise.at(process, process.start(M), reference_compat=True)
    x = (mean + std * reference_input("traj_eps", *shape)).double()
    # float32 sums of two products, of values up to 4.
    np.testing.assert_allclose(x.flatten(), figures["x_T"], rtol=0, atol=1e-6, err_msg="x_T")
    step_noises = [reference_input(f"traj_step_noise_{i}", *shape).double() for i in range(5)]

    times = process.times(5, M) if family == "dynamicrafter" else process.times(5, spacing="uniform")
    assert times.tolist() == timesteps
    with_image, without = (lambda x, t, d=d: d(x, per_sample(t, x)) for d in (given_image, no_image))
    ours = sample(
        guided(with_image, without, guidance, rescale),
        x,
        process,
        times,
        figures["parameterization"],
        eta=eta,
        random=Given(step_noises, len(x)),
        reference_compat=family,
    )
    numpy_noises = [n.numpy() for n in step_noises]
    theirs = lvdm(family, (given_image, no_image), x.numpy(), timesteps, guidance, rescale, eta, numpy_noises)
    assert np.abs(theirs).max() > 1
    # float64: five steps of some ten roundings, of which VideoCrafter1's guidance of 12 multiplies each by up to 40.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13 * np.abs(theirs).max(), err_msg="x_0")


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_references_end_has_the_noise_of_index_0_left_in_and_ours_has_none(eta, reference_input):
    x0, process = random_latents(2, 3), VP(rescale=0.7)
    times = process.times(1, 1000)
    x = process.add_noise(x0, random_latents(2, 3, seed=1), times.expand(2))
    fresh = random_latents(2, 3, seed=2)

    def end(**options) -> Tensor:
        return sample(lambda x, t: x0, x, process, times, "x0", eta, Given([fresh], 2), **options)

    assert torch.equal(end(), x0)
    assert torch.equal(end(reference_compat=None), x0)
    abar, first = float(process.alphas_bar[999]), float(process.alphas_bar[0])
    eps = (x - abar**0.5 * 0.7 * x0) / (1 - abar) ** 0.5
    added = eta * ((1 - first) / (1 - abar) * (1 - abar / first)) ** 0.5
    left = (1 - first - added**2) ** 0.5 * eps + added * fresh
    for family, scale in (("dynamicrafter", 0.7), ("videocrafter1", 1.0)):
        want = first**0.5 * scale * x0 + left
        torch.testing.assert_close(end(reference_compat=family), want, rtol=0, atol=1e-14)  # float64 rounding
    assert (left.abs() > 1e-4).all()


# -- the steps taken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 12])
@pytest.mark.parametrize("name", STARTS)
def test_the_model_is_called_once_a_step_first_at_the_time_that_x_M_was_drawn_for(name, steps):
    process, M, options = STARTS[name]
    times = process.times(steps, M, **options)
    # One element of x_M is the mean of data that are all 1, the other a deviation above: they tell the drawn time.
    mean, std = InitialNoise(torch.ones(1, 1, 1, 1, dtype=torch.float64), 0.0).at(process, times[0])
    x = torch.stack([mean.flatten(), mean.flatten() + std], dim=1).expand(3, 2)
    asked = Recorded(perfect(process))
    sample(asked, x, process, times, "x0")
    assert torch.equal(asked.x[0], x)  # as it was given, multiplied with nothing
    assert torch.equal(torch.stack(asked.t), times[:, None].expand(steps, 3))
    t = asked.t[0]
    torch.testing.assert_close(process.alpha(t) * process.x0_scale(t), x[:, 0], rtol=1e-15, atol=0)
    torch.testing.assert_close(process.sigma(t), x[:, 1] - x[:, 0], rtol=0, atol=1e-13)  # a difference of values near 1


@pytest.mark.parametrize("M", [1, 500, 820, 940, 1000])
def test_an_M_of_vp_starts_at_the_index_before_it_whatever_the_prediction(M):
    for prediction in ("eps", "v", "x0"):
        asked = Recorded(perfect(VP(), prediction))
        times = VP().times(min(M, 5), M)
        sample(asked, start(VP(), times[0]), VP(), times, prediction)
        assert asked.t[0].tolist() == [M - 1] * 3
        assert len(asked.t) == min(M, 5)


def test_an_M_changes_what_eps_prediction_makes_of_the_same_start():
    x = random_latents(2, 3)
    results = [sample(nonlinear, x, VP(), VP().times(10, M), "eps") for M in (940, 1000)]
    assert (results[0] - results[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", STARTS)
def test_given_latents_are_used_as_they_are_and_left_alone(name):
    process, M, options = STARTS[name]
    x = 3 * random_latents(2, 3)
    before, asked = x.clone(), Recorded(nonlinear)
    sample(asked, x, process, process.times(4, M, **options), "x0", eta=1, random=torch.Generator().manual_seed(0))
    assert torch.equal(asked.x[0], before)
    assert torch.equal(x, before)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", STARTS)
def test_the_last_step_ends_at_the_denoisers_x0_without_noise_on_it(name, eta):
    process, M, options = STARTS[name]
    x, answer = random_latents(2, 3), random_latents(2, 3, seed=1)
    for steps in (1, 7):
        times = process.times(steps, M, **options)
        assert torch.equal(sample(lambda x, t: answer, x, process, times, "x0", eta), answer)


def test_sampling_keeps_no_graph():
    weight = torch.ones((), requires_grad=True)
    assert not sample(lambda x, t: weight * x, torch.ones(2, 3), VP(), VP().times(4), "eps").requires_grad


@pytest.mark.parametrize("name", STARTS)
def test_sampling_without_fresh_noise_asks_for_no_random_numbers_and_repeats_itself(name):
    process, M, options = STARTS[name]
    times, x = process.times(6, M, **options), random_latents(2, 3)
    state = torch.get_rng_state()
    results = [sample(nonlinear, x, process, times, "v", random=random) for random in (None, None, Given([], 2))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", STARTS)
def test_with_fresh_noise_the_same_draws_give_the_same_samples_and_others_do_not(name):
    process, M, options = STARTS[name]
    times, x = process.times(6, M, **options), random_latents(2, 3)

    def ancestral(seed: int, eta: float = 1.0) -> Tensor:
        return sample(nonlinear, x, process, times, "v", eta, Draws([(seed, 0), (seed, 1)]))

    assert torch.equal(ancestral(0), ancestral(0))
    assert (ancestral(0) != ancestral(1)).all()
    assert (ancestral(0) != ancestral(0, eta=0.5)).all()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", STARTS)
def test_a_sample_is_independent_of_the_batch_it_is_in(name, eta):
    process, M, options = STARTS[name]
    times, noise = process.times(6, M, **options), InitialNoise.standard((2, 3, 4, 5))

    def generate(chosen: list[int]) -> Tensor:
        draws = Draws([(7, i) for i in chosen])
        x = noise.sample(process, times[0], len(chosen), draws)
        return sample(nonlinear, x, process, times, "v", eta, draws)

    together = generate([0, 1, 2])
    assert together.std() > 0.03  # of EDM; others 0.1 and more
    for i in range(3):
        assert torch.equal(generate([i])[0], together[i])
    assert torch.equal(generate([2, 0]), together[[2, 0]])


def test_a_networks_sample_is_independent_of_the_batch_it_is_in():
    family = load("toy", 4, 16, 16, "tiny")
    net = family.network(0)
    torch.nn.init.normal_(net.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    noise = InitialNoise.standard(family.latent_shape)
    images = random_latents(3, *family.latent_shape[1:], seed=2).float()
    times = family.process.times(5, 940)

    def generate(chosen: list[int]) -> Tensor:
        draws = Draws([(0, i) for i in chosen])
        x = noise.sample(family.process, times[0], len(chosen), draws)
        condition = {"image": images[chosen]}
        denoise = lambda x, t: family.denoise(net, x, t, condition)  # noqa: E731
        return sample(denoise, x, family.process, times, family.prediction, 1.0, draws)

    together = generate([0, 1, 2])
    assert together.std() > 0.1
    for i in range(3):
        # float32 through a UNet five times: other batch sizes sum in another order.
        torch.testing.assert_close(generate([i])[0], together[i], rtol=0, atol=2e-5 * float(together.abs().max()))


# -- a perfect denoiser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prediction"), TOLD)
def test_a_perfect_denoiser_contracts_as_the_closed_form_says(name, prediction):
    """One step takes an offset at t to (alpha alpha' s^2 + sigma sigma') / (alpha^2 s^2 + sigma^2) of it at t'."""
    process, M, _ = ORACLES[name]
    times = process.times(10, M)
    gain = 1.0
    for (a, b), (a_next, b_next) in itertools.pairwise(levels(process, times.tolist())):
        gain *= (a * a_next * SPREAD**2 + b * b_next) / (a**2 * SPREAD**2 + b**2)
    x = start(process, times[0])
    want = MEAN + gain * (x - x[1])
    # float64; at VP's end eps-prediction divides by alpha = 0.07, at EDM's x_t is 700 times as large as x_0.
    torch.testing.assert_close(
        sample(perfect(process, prediction), x, process, times, prediction), want, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("process", "M"), [(EDM(), 700), (EDM(), 100), (EDM(), 5), (Flow(), 1), (Flow(), 0.7)])
@pytest.mark.parametrize("steps", [1, 6, 40])
def test_edms_and_flows_steps_are_eulers_method_for_their_differential_equation(process, M, steps):
    """dx/dt = (x - x_0) / t, of EDM and of flow alike, by their own times."""
    times = process.times(steps, M)
    x = random_latents(3, 4) * float(times[0])
    got = sample(nonlinear, x, process, times, "x0")
    for t, after in itertools.pairwise([*times.tolist(), 0.0]):
        x = x + (after - t) * (x - nonlinear(x, torch.full((3,), t, dtype=torch.float64))) / t
    torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)  # float64; 40 steps from values of 2000


@pytest.mark.parametrize(
    ("process", "M"),
    [(VP(), 700), (VP(), 1000), (VP(zero_snr=True), 940), (VP(zero_snr=True), 1000), (EDM(), 700), (Flow(), 1)],
)
def test_with_a_perfect_denoiser_the_samples_spread_approaches_the_datas(process, M):
    def spread(steps: int) -> float:
        times = process.times(steps, M)
        below, middle, above = (
            sample(perfect(process), start(process, times[0]), process, times, "x0").flatten().tolist()
        )
        assert middle == pytest.approx(MEAN, abs=1e-12)
        return (above - below) / 2

    errors = [abs(spread(steps) / SPREAD - 1) for steps in (5, 20, 80, 700)]
    assert all(fine < coarse for coarse, fine in itertools.pairwise(errors))
    # Errors of first order: 700 steps leave about 5 / 700 of what 5 leave. With each index of VP 0.0017 is left by the
    # last step, from sigma_0^2 = 8.5e-4 to 0, and 0.0029 by the others.
    assert errors[-1] < 1e-2


@pytest.mark.parametrize("name", ORACLES)
def test_all_predictions_of_one_oracle_give_one_result(name):
    process, M, predictions = ORACLES[name]
    times = process.times(25, M)
    results = [sample(perfect(process, p), start(process, times[0]), process, times, p) for p in predictions]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)  # as above


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", ORACLES)
def test_with_fresh_noise_a_perfect_denoisers_samples_spread_as_the_closed_form_says(name, eta):
    """Each step multiplies an offset with a gain, and adds noise that no sample has had before."""
    process, M, _ = ORACLES[name]
    times, count = process.times(30, M), 40_000
    chain = levels(process, times.tolist())
    variance = chain[0][0] ** 2 * SPREAD**2 + chain[0][1] ** 2
    if isinstance(process, VP):  # the fresh noise knows alpha, not the dynamic rescale
        alphas = [*process.alphas_bar[times].sqrt().tolist(), 1.0]
    else:
        alphas = [a for a, _ in chain]
    for ((a, b), (a_next, b_next)), (alpha, alpha_next) in zip(
        itertools.pairwise(chain), itertools.pairwise(alphas), strict=True
    ):
        fresh = eta * b_next * math.sqrt(1 - (alpha * b_next / (alpha_next * b)) ** 2)
        gain = (a * a_next * SPREAD**2 + b * math.sqrt(b_next**2 - fresh**2)) / (a**2 * SPREAD**2 + b**2)
        variance = gain**2 * variance + fresh**2
    random = torch.Generator().manual_seed(0)
    noise = InitialNoise(torch.full((1, 1, 1, 1), MEAN, dtype=torch.float64), SPREAD**2)
    x = noise.sample(process, times[0], count, random)
    samples = sample(perfect(process), x, process, times, "x0", eta, random).double()
    # Five standard errors, of the mean and of the variance of normal samples.
    assert float(samples.mean()) == pytest.approx(MEAN, abs=5 * (variance / count) ** 0.5)
    assert float(samples.var()) == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)
    # 30 steps leave less spread than the data have, on EDM from 700 a third less; none leaves more.
    assert 0.5 * SPREAD**2 < variance < SPREAD**2


def test_fresh_noise_is_none_at_eta_0_and_all_of_the_noise_after_a_level_without_signal():
    end, middle = Level(0.0, 1.0, 1.0), Level(0.6, 0.8, 1.0)
    assert fresh_noise(end, middle) == 0.8
    assert fresh_noise(middle, middle) == 0
    assert fresh_noise(middle, Level(1.0, 0.0, 1.0)) == 0
    # EDM's sigma_up: sqrt(s'^2 (s^2 - s'^2) / s^2).
    assert fresh_noise(Level(1.0, 5.0, 1.0), Level(1.0, 3.0, 1.0)) == pytest.approx(3 * 4 / 5, rel=1e-15)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_an_eta_outside_the_unit_interval_is_refused(eta):
    with pytest.raises(ValueError, match=rf"eta={eta}: in 0\.\.1"):
        sample(nonlinear, torch.zeros(1, 1), VP(), VP().times(2), "x0", eta)


def test_an_unknown_family_to_be_compatible_with_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"reference_compat='svd'.*dynamicrafter.*videocrafter1"):
        sample(nonlinear, torch.zeros(1, 1), VP(), VP().times(2), "x0", reference_compat="svd")


def test_a_prediction_there_is_not_is_refused():
    with pytest.raises(ValueError, match="prediction='noise'"):
        sample(nonlinear, torch.zeros(1, 1), VP(), VP().times(2), "noise")


def test_times_outside_the_process_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.999"):
        sample(nonlinear, torch.zeros(1, 1), VP(), torch.tensor([939, -1]), "x0")
    with pytest.raises(ValueError, match=r"0\.\.1"):
        sample(nonlinear, torch.zeros(1, 1), Flow(), torch.tensor([700.0, 1.0]), "x0")


@pytest.mark.parametrize("process", [VP(zero_snr=True), VP(zero_snr=True, rescale=0.7), Flow()])
def test_eps_prediction_is_refused_where_the_process_ends_without_signal(process):
    with pytest.raises(ValueError, match="use v or x0"):
        sample(nonlinear, torch.zeros(1, 1), process, process.times(5), "eps")


def test_eps_prediction_is_taken_a_step_before_the_end_of_zero_snr():
    times = VP(zero_snr=True).times(5, 999)
    assert torch.isfinite(sample(nonlinear, torch.ones(1, 1), VP(zero_snr=True), times, "eps")).all()


# -- guidance ------------------------------------------------------------------------------------------------------


def some_answers(*shape: int) -> tuple[Denoiser, Denoiser, Tensor, Tensor]:
    """Two denoisers of one answer each, and the answers."""
    with_it, without = 2 * random_latents(*shape, seed=1) + 0.5, random_latents(*shape, seed=2)
    return lambda x, t: with_it, lambda x, t: without, with_it, without


def test_guidance_of_one_costs_one_call_a_step_and_others_two():
    for scale, unconditional_calls in ((1.0, 0), (1, 0), (2.5, 6), (torch.ones(1), 6)):
        with_it, without = Recorded(nonlinear), Recorded(perfect(VP()))
        sample(guided(with_it, without, scale), torch.zeros(2, 3), VP(), VP().times(6, 940), "x0")
        assert (len(with_it.t), len(without.t)) == (6, unconditional_calls)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_guidance_goes_scale_times_the_way_from_without_to_with(scale):
    x, t = random_latents(2, 3), torch.tensor([3, 900])
    conditional, unconditional = perfect(VP()), lambda x, t: x.sin() + t[:, None]
    got = guided(conditional, unconditional, scale)(x, t)
    want = scale * conditional(x, t) + (1 - scale) * unconditional(x, t)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * 900 * 7.5)


def test_a_ramp_guides_each_frame_with_its_own_scale():
    """SVD's, from 1 to 3 over frames."""
    conditional, unconditional, with_it, without = some_answers(2, 5, 4, 3, 3)
    got = guided(conditional, unconditional, frame_ramp(1, 3, 5))(with_it, torch.zeros(2))
    for frame, scale in enumerate([1, 1.5, 2, 2.5, 3]):
        want = without[:, frame] + scale * (with_it[:, frame] - without[:, frame])
        torch.testing.assert_close(got[:, frame], want, rtol=0, atol=1e-14)  # float64, values up to 20
    torch.testing.assert_close(got[:, 0], with_it[:, 0], rtol=0, atol=1e-14)  # the first frame has no guidance


def test_a_ramp_over_one_frame_is_its_first_scale():
    assert frame_ramp(1, 3, 1).flatten().tolist() == [1]


def test_a_ramp_keeps_the_type_of_the_latents():
    conditional, unconditional, with_it, _ = some_answers(2, 5, 4, 3, 3)
    half = guided(*(lambda x, t, d=d: d(x, t).bfloat16() for d in (conditional, unconditional)), frame_ramp(1, 3, 5))
    assert half(with_it.bfloat16(), torch.zeros(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [7.5, frame_ramp(1, 3, 5)], ids=["number", "ramp"])
def test_a_full_rescale_gives_each_answer_the_deviation_it_has_without_guidance(scale):
    conditional, unconditional, with_it, _ = some_answers(3, 5, 4, 3, 3)
    plain = guided(conditional, unconditional, scale)(with_it, torch.zeros(3))
    full = guided(conditional, unconditional, scale, rescale=1.0)(with_it, torch.zeros(3))
    for i in range(3):
        assert float(plain[i].std()) > 1.2 * float(with_it[i].std())
        assert float(full[i].std()) == pytest.approx(float(with_it[i].std()), rel=1e-13)
        ratio = full[i] / plain[i]  # one factor for the whole of a sample
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-12, atol=0)


def test_a_rescale_of_a_share_goes_that_share_of_the_way():
    conditional, unconditional, with_it, _ = some_answers(2, 5, 4, 3, 3)
    none, most, full = (guided(conditional, unconditional, 7.5, r)(with_it, torch.zeros(2)) for r in (0.0, 0.7, 1.0))
    torch.testing.assert_close(most, 0.7 * full + 0.3 * none, rtol=0, atol=1e-13)  # float64, values up to 50


def test_the_rescale_of_a_sample_is_independent_of_the_batch_it_is_in():
    x, t = random_latents(3, 2, 3, 4, 5), torch.zeros(3)
    x[1] *= 100
    denoise = guided(nonlinear, lambda x, t: 0.5 * x, 7.5, rescale=0.7)
    together = denoise(x, t)
    for i in range(3):
        # A deviation of 120 float64 values, summed in whatever order.
        torch.testing.assert_close(denoise(x[i : i + 1], t[:1])[0], together[i], rtol=1e-13, atol=0)


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan])
def test_a_rescale_outside_the_unit_interval_is_refused(rescale):
    with pytest.raises(ValueError, match=rf"rescale={rescale}: in 0\.\.1"):
        guided(nonlinear, nonlinear, 2.0, rescale)


@pytest.mark.parametrize("process", [VP(), EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_times_that_do_not_fall_are_refused(process):
    for times in (process.times(3).flip(0), process.times(3)[[0, 0, 1]], process.times(3)[:0]):
        with pytest.raises(ValueError, match=r"times=.*falling"):
            sample(lambda x, t: x, torch.zeros(1, 2), process, times, "v", eta=1.0)


@pytest.mark.parametrize("process", [EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_times_that_end_in_0_are_refused_because_that_step_is_the_samplers_own(process):
    times = torch.cat([process.times(2), torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"above 0; the step to x_0 is taken after the last"):
        sample(lambda x, t: x, torch.zeros(1, 2), process, times, "v")


def test_an_answer_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"denoise answered \[1, 1\] for x of shape \[2, 3\]"):
        sample(lambda x, t: x[:1, :1], torch.zeros(2, 3), VP(), VP().times(2), "v")


def test_the_authors_end_is_one_of_vp_processes():
    with pytest.raises(ValueError, match="on a VP process"):
        sample(lambda x, t: x, torch.zeros(1, 2), EDM(), EDM().times(2), "v", reference_compat="dynamicrafter")


def test_guidance_by_no_number_is_refused_and_a_rescale_of_zero_answers_is_zero():
    with pytest.raises(ValueError, match="scale=nan"):
        guided(lambda x, t: x, lambda x, t: x, math.nan)
    zero = guided(lambda x, t: 0 * x, lambda x, t: 0 * x, 7.5, 0.7)
    assert torch.equal(zero(torch.ones(2, 3), torch.tensor([1, 2])), torch.zeros(2, 3))
