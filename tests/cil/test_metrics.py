"""Motion, agreement with the image, and the Frechet distance and its features."""

import cv2
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.stats
import torch

from cil.metrics.features import FEATURES, train_velocity_net
from cil.metrics.frechet import frechet_distance
from cil.metrics.motion import distribution_error, first_frame_error, motion_score
from pipelines.shapes import Shape


def features(n: int, dimensions: int, seed: int) -> torch.Tensor:
    """Correlated, off centre."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=random, dtype=torch.float64) / dimensions**0.5
    shift = torch.randn(dimensions, generator=random, dtype=torch.float64)
    return torch.randn(n, dimensions, generator=random, dtype=torch.float64) @ mix + shift


# -- Frechet distance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_a", "n_b", "dimensions"), [(200, 300, 8), (100, 100, 32), (50, 400, 1)])
def test_the_frechet_distance_equals_the_root_of_the_matrix_product(n_a, n_b, dimensions):
    a, b = features(n_a, dimensions, 0), features(n_b, dimensions, 1)
    cov_a, cov_b = (np.cov(x.numpy(), rowvar=False).reshape(dimensions, dimensions) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    # sqrtm of a product that is not symmetric is the less exact of the two.
    assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(float(want), rel=1e-6)


def test_a_set_is_at_no_distance_from_itself_in_any_order():
    a = features(100, 16, 0)
    assert frechet_distance(a, a.flip(0)) < 1e-12 * float(a.var(0).sum()) * 100


@pytest.mark.parametrize("n", [3, 100])
def test_a_shifted_set_is_at_the_square_of_the_shift(n):
    a, shift = features(n, 16, 0), torch.linspace(-1, 2, 16, dtype=torch.float64)
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)


def test_a_stretched_set_is_at_the_square_of_the_stretch():
    a = features(100, 16, 0)
    a = a - a.mean(0)
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * float(a.var(0).sum()), rel=1e-9)


def test_fewer_samples_than_dimensions_are_right_too():
    a, b = features(5, FEATURES, 0), features(7, FEATURES, 1)
    cov_a, cov_b = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    root_a = scipy.linalg.eigh(cov_a)
    half = root_a[1] * np.sqrt(root_a[0].clip(0)) @ root_a[1].T
    cross = np.sqrt(scipy.linalg.eigvalsh(half @ cov_b @ half).clip(0)).sum()
    want = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(cov_a + cov_b) - 2 * cross
    # Eigenvalues that should be 0 come out as 1e-16, and their roots as 1e-8: about 30 of them.
    assert frechet_distance(a, b) == pytest.approx(want, abs=1e-6)


def test_features_in_single_precision_are_compared_in_double():
    a, b = (features(100, 8, seed).float() + 1000 for seed in (0, 1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a.double(), b.double()), rel=1e-12)


def test_a_single_vector_has_no_covariance_and_is_refused():
    with pytest.raises(ValueError, match="1 and 9 feature vectors"):
        frechet_distance(features(1, 4, 0), features(9, 4, 1))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(features(9, 4, 0), features(1, 4, 1))


# -- motion ------------------------------------------------------------------------------------------------------------


def drifting(right: int, down: int, frames: int = 4, size: int = 64) -> torch.Tensor:
    noise = np.random.default_rng(0).standard_normal((size, size))
    texture = scipy.ndimage.gaussian_filter(noise, 3, mode="wrap")
    grey = np.clip(128 + 50 * texture / texture.std(), 0, 255).astype(np.uint8)
    moved = [np.roll(grey, (k * down, k * right), (0, 1)) for k in range(frames)]
    return torch.from_numpy(np.stack(moved))[..., None].repeat(1, 1, 1, 3)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, -2), (3, 0), (2, 2)])
def test_the_motion_score_of_a_drifting_texture_is_its_speed(right, down):
    # Measured: within 0.5 %. What leaves on one side comes in on the other, where its flow cannot be seen.
    assert motion_score(drifting(right, down)) == pytest.approx(np.hypot(right, down), rel=0.03)


def test_a_still_clip_does_not_move():
    assert motion_score(drifting(0, 0)) == 0


def test_the_motion_score_is_a_mean_over_pairs_of_frames():
    """Half of the pairs at rest, half at 2 pixels."""
    clip = drifting(2, 0, frames=5)
    halting = clip[[0, 0, 1, 1, 2, 2, 3, 3, 4]]
    assert motion_score(halting) == pytest.approx(motion_score(clip) / 2, rel=1e-6)


def test_the_motion_score_is_the_same_whatever_was_scored_before():
    clip = drifting(2, 1)
    alone = motion_score(clip)
    motion_score(drifting(3, 0, size=32))
    assert motion_score(clip) == alone


def test_the_motion_score_is_independent_of_the_number_of_opencvs_threads():
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    two = motion_score(drifting(2, 1))
    cv2.setNumThreads(before)
    assert motion_score(drifting(2, 1)) == two


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (4, 8, 64, 3), (4, 64, 15, 3)])
def test_clips_without_motion_to_see_are_refused(shape):
    with pytest.raises(ValueError, match="16x16 or more"):
        motion_score(torch.zeros(shape, dtype=torch.uint8))


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_the_first_frame_error_is_the_mean_square_over_the_first_frame_alone():
    image = torch.full((8, 8, 3), 100, dtype=torch.uint8)
    frames = torch.stack([image + 10, image + 90, image])
    assert first_frame_error(frames, image) == pytest.approx((10 / 127.5) ** 2, rel=1e-6)
    assert first_frame_error(frames[[2, 0]], image) == 0
    darker = first_frame_error((image - 20)[None], image)  # uint8 does not wrap
    assert darker == pytest.approx((20 / 127.5) ** 2, rel=1e-6)


@pytest.mark.parametrize(("n_ours", "n_real"), [(400, 400), (300, 500)])
def test_the_distribution_error_is_the_wasserstein_distance(n_ours, n_real):
    random = np.random.default_rng(0)
    ours, real = random.gamma(1.0, 1.0, n_ours), random.gamma(4.0, 0.5, n_real)
    want = scipy.stats.wasserstein_distance(ours, real)
    # Quantiles between the samples are interpolated here and stairs there. Measured: within 0.2 %.
    assert distribution_error(torch.tensor(ours), torch.tensor(real)) == pytest.approx(want, rel=0.01)


def test_the_distribution_error_of_a_shift_is_the_shift_either_way():
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for shift in (0.0, 0.3, -0.3):
        assert distribution_error(scores + shift, scores.flip(0)) == pytest.approx(abs(shift), abs=1e-12)


def test_too_much_motion_is_as_far_off_as_too_little():
    real = torch.linspace(1, 2, 100)
    assert distribution_error(real + 0.5, real) == pytest.approx(distribution_error(real - 0.5, real), rel=1e-6)


# -- the features ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> tuple[torch.Tensor, torch.Tensor]:
    """260 clips of 8 frames of 16x16, and their velocities."""
    shapes = [Shape(0, i, frames=8, size=16, moving=True, min_speed=0.5, max_speed=1.5) for i in range(260)]
    return torch.from_numpy(np.stack([s.render() for s in shapes])), torch.tensor([s.velocity for s in shapes])


def test_the_velocity_net_learns_to_read_the_velocity_of_clips_it_has_not_seen(clips):
    frames, velocity = clips
    net = train_velocity_net(frames[:200], velocity[:200], steps=120, seed=0)
    found, said = net(frames[200:])
    assert found.shape == (60, FEATURES)
    # Measured: 0.11 to 0.23 of the error of answering 0, over four seeds.
    assert (said - velocity[200:]).square().mean() < 0.35 * velocity[200:].square().mean()
    assert not any(p.requires_grad for p in net.parameters())
    # A mirrored clip moves the mirrored way.
    mirrored = net(frames[200:].flip(3))[1]
    turned = velocity[200:] * torch.tensor([-1.0, 1.0])
    assert (mirrored - turned).square().mean() < 0.35 * turned.square().mean()


def test_training_the_velocity_net_is_a_function_of_its_arguments(clips):
    frames, velocity = (x[:20] for x in clips)
    torch.manual_seed(1)
    first = train_velocity_net(frames, velocity, steps=5, seed=0, batch=4).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = train_velocity_net(frames, velocity, steps=5, seed=0, batch=4).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    other = train_velocity_net(frames, velocity, steps=5, seed=1, batch=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_feature_net_is_not_learned_from_one_clip(clips):
    frames, velocity = clips
    with pytest.raises(ValueError, match="1 clips"):
        train_velocity_net(frames[:1], velocity[:1], steps=5, seed=0)
