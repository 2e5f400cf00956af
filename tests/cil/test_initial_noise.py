"""Analytic-Init: the normal that sampling from M starts from, equation (5) of the paper."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cil import VP, Draws, InitialNoise, Moments

PROCESSES = {"plain": VP(), "zero_snr": VP(zero_snr=True)}
SOME_M = [1, 2, 500, 940, 999, 1000]


def some_noise(variance: float = 0.4) -> InitialNoise:
    mean = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return InitialNoise(mean, variance, 10)


@pytest.fixture(scope="module")
def of_reference_samples(reference_input) -> InitialNoise:
    shared = 0.5 * reference_input("analytic_mean", 4, 4, 8, 8).double()
    samples = [0.6 * reference_input(f"analytic_sample_{i}", 4, 4, 8, 8).double() + shared for i in range(64)]
    parts = [Moments.of(torch.stack(samples[i : i + 10])) for i in range(0, 64, 10)]
    moments = Moments.zeros((4, 4, 8, 8))
    for part in parts:
        moments = moments.merge(part)
    return InitialNoise.from_moments(moments)


def test_mean_and_variance_of_the_reference_samples_equal_the_reference(of_reference_samples, golden):
    want = golden["analytic_init"]
    # 9 digits of E[X0] and 12 of tr(Cov)/d are in the file. Dividing by N - 1 would be 1.6 % off.
    np.testing.assert_allclose(of_reference_samples.mean.flatten()[:16], want["E_X0_first16"], rtol=2e-8)
    assert of_reference_samples.variance == pytest.approx(want["trCov_d"], rel=1e-11)
    assert of_reference_samples.count == 64


@pytest.mark.parametrize("process", PROCESSES)
def test_the_start_at_M_equals_the_reference(process, of_reference_samples, golden):
    rows = golden["analytic_init"][process]
    assert len(rows) == 6
    for M, want in rows.items():
        mean, std = of_reference_samples.at(PROCESSES[process], int(M))
        # The reference computes in float32.
        scale = mean / of_reference_samples.mean
        assert std == pytest.approx(want["sigma_p"], rel=1e-6)
        torch.testing.assert_close(scale, torch.full_like(scale, want["mu_p_scale"]), rtol=1e-6, atol=0)


def test_x_M_made_from_the_references_normals_equals_the_reference(of_reference_samples, golden, reference_input):
    eps = reference_input("analytic_eps", 1, 4, 4, 8, 8)[0]
    for M, want in golden["analytic_init"]["zero_snr"].items():
        mean, std = of_reference_samples.at(PROCESSES["zero_snr"], int(M))
        # float32 values up to 2: the reference itself is off its formula by 4e-7.
        np.testing.assert_allclose((mean + std * eps).flatten()[:4], want["reference_x_T"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("M", SOME_M)
@pytest.mark.parametrize("process", PROCESSES)
def test_mean_and_deviation_are_equation_5(process, M):
    noise, alpha_bar = some_noise(), float(PROCESSES[process].alphas_bar[M - 1])
    mean, std = noise.at(PROCESSES[process], M)
    torch.testing.assert_close(mean, alpha_bar**0.5 * noise.mean, rtol=1e-14, atol=0)
    assert std**2 == pytest.approx(alpha_bar * 0.4 + 1 - alpha_bar, rel=1e-14)


def test_the_start_is_the_normal_closest_to_noised_data():
    """The mean and the average variance of add_noise(x0, eps, M - 1), counted in samples."""
    process, M, n = VP(), 300, 20_000
    random = torch.Generator().manual_seed(3)
    spread = torch.tensor([0.2, 1.0, 2.0])
    x0 = torch.tensor([1.0, -2.0, 0.5]) + spread * torch.randn(n, 3, generator=random)
    x_M = process.add_noise(x0, torch.randn(n, 3, generator=random), torch.full((n,), M - 1))
    mean, std = InitialNoise.from_moments(Moments.of(x0)).at(process, M)
    assert ((x_M.mean(0) - mean).abs() < 5 * x_M.std(0) / n**0.5).all()
    assert float(x_M.var(0).mean()) == pytest.approx(std**2, rel=5 * (2 / n) ** 0.5)


def test_samples_have_the_mean_and_deviation_they_were_asked_for():
    noise, n = some_noise(0.01), 20_000
    mean, std = noise.at(VP(), 200)
    x = noise.sample(VP(), 200, n, torch.Generator().manual_seed(1)).double()
    assert x.shape == (n, 2, 3, 4, 4)
    # Five standard errors, for each of 96 elements.
    assert ((x.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((x.std(0) / std - 1).abs() < 5 / (2 * n) ** 0.5).all()


def test_a_sample_is_a_function_of_its_key_and_float32():
    keys = [(0, i) for i in range(3)]
    together = some_noise().sample(VP(), 940, 3, Draws(keys))
    alone = some_noise().sample(VP(), 940, 1, Draws(keys[2:]))
    assert torch.equal(alone[0], together[2])
    assert together.dtype == torch.float32
    assert not torch.equal(together[0], together[1])


def test_with_zero_snr_the_start_at_the_end_is_the_standard_normal():
    process, draws = VP(zero_snr=True), [Draws([(0, i) for i in range(3)]) for _ in range(2)]
    mean, std = some_noise().at(process, 1000)
    assert torch.equal(mean, torch.zeros_like(mean))
    assert std == 1
    assert torch.equal(some_noise().sample(process, 1000, 3, draws[0]), draws[1].normal(2, 3, 4, 4))


@pytest.mark.parametrize("process", PROCESSES)
def test_standard_is_the_standard_normal_at_every_M(process):
    noise = InitialNoise.standard((1, 2, 2, 2))
    starts = [noise.at(PROCESSES[process], M) for M in range(1, 1001)]
    assert all(std == pytest.approx(1, abs=1e-15) for _, std in starts)
    assert all(torch.equal(mean, torch.zeros(1, 2, 2, 2, dtype=torch.float64)) for mean, _ in starts)
    drawn = noise.sample(VP(), 300, 2, Draws([(0,), (1,)]))
    assert torch.equal(drawn, Draws([(0,), (1,)]).normal(1, 2, 2, 2))


@pytest.mark.parametrize("M", [0, 1001])
def test_a_start_outside_the_schedule_is_refused(M):
    with pytest.raises(ValueError, match=f"M={M}"):
        some_noise().sample(VP(), M, 1)


@pytest.mark.parametrize("variance", [0.1 + 0.2, 1e-300, 0.0])
def test_bytes_give_the_same_noise_back_to_the_bit(variance):
    before = some_noise(variance)
    after = InitialNoise.from_bytes(before.to_bytes(source="a test"))
    assert torch.equal(after.mean, before.mean)
    assert after.mean.dtype == torch.float64
    assert after.variance == before.variance
    assert after.count == before.count


def test_the_file_says_where_its_figures_are_from(tmp_path):
    path = tmp_path / "initial_noise.safetensors"
    path.write_bytes(some_noise().to_bytes(encoder="toy-dct4", variance="a lie"))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"encoder": "toy-dct4", "variance": "0.4", "count": "10"}
        assert torch.equal(file.get_tensor("mean"), some_noise().mean)


def test_a_mean_in_any_memory_order_can_be_written():
    turned = InitialNoise(some_noise().mean.transpose(0, 1), 0.4, 10)
    assert torch.equal(InitialNoise.from_bytes(turned.to_bytes()).mean, turned.mean)


@pytest.mark.parametrize("variance", [-1e-9, float("nan")])
def test_an_impossible_variance_is_refused(variance):
    with pytest.raises(ValueError, match="variance="):
        some_noise(variance)


def test_no_samples_make_no_initial_noise():
    with pytest.raises(ValueError, match="no samples"):
        InitialNoise.from_moments(Moments.zeros((2, 3, 4, 4)))
