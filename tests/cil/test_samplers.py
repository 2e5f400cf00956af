"""DDIM that starts at M: which steps it takes, and where it ends when the denoiser is perfect."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from cil import VP, Draws, InitialNoise, ddim, guided
from cil.families import load
from cil.samplers import Denoiser, trailing_steps

PREDICTIONS = ("eps", "v", "x0")
MEAN, SPREAD = 0.7, 0.5  # of the data in the tests with a perfect denoiser


def perfect(process: VP, prediction: str = "x0") -> Denoiser:
    """The posterior mean for data N(MEAN, SPREAD^2), told in the given kind of prediction."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (f(t).to(x).reshape(-1, 1) for f in (process.alpha, process.sigma))
        off = x - alpha * MEAN
        variance = alpha**2 * SPREAD**2 + sigma**2
        x0, eps = MEAN + alpha * SPREAD**2 / variance * off, sigma / variance * off
        return process.target(prediction, x0, eps, t)

    return denoise


def start(process: VP, M: int) -> Tensor:
    """x_M one deviation below, at, and one deviation above its mean: [3, 1]. DDIM is linear here, so that is enough."""
    mean, std = InitialNoise(torch.full((1,), MEAN, dtype=torch.float64), SPREAD**2, 1).at(process, M)
    return mean + std * torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)


def test_steps_are_distinct_from_M_minus_1_down_and_never_below_0_for_every_M():
    for M in range(1, 1001):
        for steps in {1, 5, 12, 25, 50, M}:
            if steps > M:
                continue
            indices = trailing_steps(M, steps)
            assert len(indices) == steps, (M, steps)
            assert indices[0] == M - 1, (M, steps)
            assert all(a > b for a, b in itertools.pairwise(indices)), (M, steps)
            assert indices[-1] >= 0, (M, steps)


@pytest.mark.parametrize("M", [820, 870, 920, 970])
@pytest.mark.parametrize("steps", [25, 50, 100])
def test_the_M_at_which_floating_point_gives_a_step_too_many_are_right(M, steps):
    indices = trailing_steps(M, steps)
    assert len(indices) == steps
    assert indices[-1] == round(M / steps) - 1


@pytest.mark.parametrize("family", ["dynamicrafter", "videocrafter1"])
def test_fifty_steps_equal_the_references_trailing_steps(family, golden):
    want = golden["schedules"][family]["trailing_timesteps_50_steps_by_M"]
    assert sorted(map(int, want)) == [820, 860, 900, 940, 960, 1000]
    for M, ascending in want.items():
        assert trailing_steps(int(M), 50) == [t for t in reversed(ascending) if t >= 0], M


def test_five_steps_equal_the_steps_of_the_references_trajectory():
    assert trailing_steps(940, 5) == [939, 751, 563, 375, 187]


@pytest.mark.parametrize("M", [1, 10, 937, 1000])
def test_gaps_between_steps_are_their_even_width_rounded_up_or_down(M):
    for steps in {1, min(M, 7), min(M, 400), M}:
        ends = [*trailing_steps(M, steps), -1]
        gaps = [a - b for a, b in itertools.pairwise(ends)]
        assert all(math.floor(M / steps) <= gap <= math.ceil(M / steps) for gap in gaps)


@pytest.mark.parametrize(("M", "steps"), [(10, 11), (10, 0), (10, -1), (1, 2)])
def test_more_steps_than_there_are_or_none_are_refused(M, steps):
    with pytest.raises(ValueError, match=rf"steps={steps}.*1\.\.{M}"):
        trailing_steps(M, steps)


@pytest.mark.parametrize("M", [0, 1001])
def test_a_start_outside_the_schedule_is_refused(M):
    with pytest.raises(ValueError, match=f"M={M}"):
        ddim(perfect(VP()), torch.zeros(1, 1), VP(), M, 1)


@pytest.mark.parametrize("M", [1, 500, 820, 940, 1000])
def test_the_first_model_call_is_made_at_the_index_that_x_M_was_drawn_for(M):
    process, seen = VP(), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return perfect(process)(x, t)

    # Noise of no variance is alpha x0: its scale tells the index that it was drawn for.
    x = InitialNoise(torch.ones(1, dtype=torch.float64), 1.0, 1).at(process, M)[0].expand(2, 1)
    ddim(denoise, x, process, M, min(M, 5), "x0")
    first_x, first_t = seen[0]
    assert torch.equal(first_x, x)
    torch.testing.assert_close(process.alpha(first_t), x[:, 0], rtol=1e-15, atol=0)
    assert first_t.tolist() == [M - 1, M - 1]
    assert len(seen) == min(M, 5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("M", [600, 940, 1000])
def test_a_perfect_denoiser_contracts_as_the_closed_form_says(M, prediction):
    """One step takes an offset at t to (alpha alpha' s^2 + sigma sigma') / (alpha^2 s^2 + sigma^2) of it at t'."""
    process, steps = VP(), 10
    table = [float(x) for x in process.alphas_bar]
    indices = trailing_steps(M, steps)
    gain = 1.0
    for now, after in itertools.pairwise([*indices, None]):
        a, b = table[now], 1.0 if after is None else table[after]
        gain *= (math.sqrt(a * b) * SPREAD**2 + math.sqrt((1 - a) * (1 - b))) / (a * SPREAD**2 + 1 - a)
    x = start(process, M)
    want = MEAN + gain * (x - x[1])
    # float64; at M = 1000 eps-prediction divides by alpha = 0.07.
    got = ddim(perfect(process, prediction), x, process, M, steps, prediction)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("M", [700, 940, 1000])
def test_with_a_perfect_denoiser_the_samples_spread_approaches_the_datas(M, zero_snr):
    process = VP(zero_snr=zero_snr)

    def spread(steps: int) -> float:
        below, middle, above = ddim(perfect(process), start(process, M), process, M, steps, "x0").flatten().tolist()
        assert middle == pytest.approx(MEAN, abs=1e-12)
        return (above - below) / 2

    errors = [abs(spread(steps) / SPREAD - 1) for steps in (5, 20, 80, M)]
    assert all(fine < coarse for coarse, fine in itertools.pairwise(errors))
    # What is left with every step: 0.0017 by the last one, from sigma_0^2 = 8.5e-4 to 0, and 0.0029 by the others.
    assert errors[-1] < 6e-3


def test_eps_v_and_x0_predictions_of_one_oracle_give_one_result():
    process = VP()
    results = [ddim(perfect(process, p), start(process, 940), process, 940, 25, p) for p in PREDICTIONS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def test_the_last_step_ends_at_the_denoisers_x0_without_noise_on_it():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    answer = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for M, steps in ((1, 1), (1000, 1), (940, 7)):
        assert torch.equal(ddim(lambda x, t: answer, x, VP(), M, steps, "x0"), answer)


def test_a_samples_result_is_independent_of_the_batch_it_is_in():
    family = load("toy", 4, 16, 16, "tiny")
    net = family.network(0)
    torch.nn.init.normal_(net.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    keys = [(0, i) for i in range(3)]
    noise = InitialNoise.standard(family.latent_shape)
    images = torch.randn(3, *family.latent_shape[1:], generator=torch.Generator().manual_seed(2))

    def generate(chosen: list[int]) -> Tensor:
        x = noise.sample(family.process, 940, len(chosen), Draws([keys[i] for i in chosen]))
        condition = {"image": images[chosen]}
        denoise = lambda x, t: family.denoise(net, x, t, condition)  # noqa: E731
        return ddim(denoise, x, family.process, 940, 5, family.prediction)

    together = generate([0, 1, 2])
    assert together.std() > 0.1
    for i in range(3):
        # float32 through a UNet five times: other batch sizes sum in another order.
        torch.testing.assert_close(generate([i])[0], together[i], rtol=0, atol=2e-5 * float(together.abs().max()))


def test_sampling_keeps_no_graph_and_leaves_its_start_alone():
    weight = torch.ones((), requires_grad=True)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    result = ddim(lambda x, t: weight * x, x, VP(), 1000, 4)
    assert not result.requires_grad
    assert torch.equal(x, before)


def test_guidance_of_one_costs_one_call_a_step_and_others_two():
    calls = {"with": 0, "without": 0}

    def counted(name: str, value: float) -> Denoiser:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            calls[name] += 1
            return torch.full_like(x, value)

        return denoise

    for scale, want in ((1.0, {"with": 6, "without": 0}), (2.5, {"with": 6, "without": 6})):
        calls.update({"with": 0, "without": 0})
        ddim(guided(counted("with", 0.1), counted("without", 0.2), scale), torch.zeros(2, 3), VP(), 940, 6)
        assert calls == want


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_guidance_goes_scale_times_the_way_from_without_to_with(scale):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([3, 900])
    conditional, unconditional = perfect(VP()), lambda x, t: x.sin() + t[:, None]
    got = guided(conditional, unconditional, scale)(x, t)
    want = scale * conditional(x, t) + (1 - scale) * unconditional(x, t)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * 900 * 7.5)
