"""Spatial and temporal power spectra, against closed forms."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from cil import Moments
from cil.metrics.spectra import BINS, ROUNDING, spatial_spectrum, spectral_distance, temporal_spectrum


def video(grey: np.ndarray) -> torch.Tensor:
    """Of [T, H, W], rounded."""
    return torch.from_numpy(np.clip(np.rint(grey), 0, 255).astype(np.uint8))[..., None].repeat(1, 1, 1, 3)


def noise(deviation: float = 20.0, shape: tuple[int, int, int] = (12, 64, 96), seed: int = 0) -> np.ndarray:
    return 128 + deviation * np.random.default_rng(seed).standard_normal(shape)


def test_white_noise_has_the_same_power_at_all_frequencies():
    frames = video(noise())
    # 12 frames of 6,144 coefficients: the bin with the fewest has 12 x 11 of them, 3 deviations of sqrt(2 / 132).
    assert spatial_spectrum(frames).tolist() == pytest.approx([20**2 + ROUNDING] * BINS, rel=0.37)
    assert spatial_spectrum(frames)[3:].tolist() == pytest.approx([20**2 + ROUNDING] * (BINS - 3), rel=0.1)
    assert temporal_spectrum(frames).tolist() == pytest.approx([20**2 + ROUNDING] * 11, rel=0.06)


def half_waves(k: int, n: int) -> np.ndarray:
    return np.cos(np.pi * k * (np.arange(n) + 0.5) / n)


@pytest.mark.parametrize(("down", "right", "found"), [(1, 0, 0), (0, 12, 2), (20, 0, 5), (30, 60, 12), (0, 95, 15)])
def test_a_cosine_is_in_a_single_bin(down, right, found):
    """Of k half waves over n pixels: k / (2 n) cycles a pixel, in bins of 1 / 32."""
    wave = half_waves(down, 64)[:, None] * half_waves(right, 96)
    assert found == int(32 * np.hypot(down / 128, right / 192))
    spectrum = spatial_spectrum(video(np.stack([128 + 100 * wave] * 2)))
    others = spectrum[torch.arange(BINS) != found]
    assert spectrum[found] > 300 * others.max()  # which is rounding
    coefficients = BINS * 64 * 96 / BINS  # Parseval: all power is the wave's mean square
    in_bin = int((_bins(64, 96) == found).sum())
    assert float(spectrum[found]) * in_bin / coefficients == pytest.approx(100**2 * (wave**2).mean(), rel=0.01)


def _bins(height: int, width: int) -> np.ndarray:
    bins = np.floor(32 * np.hypot(np.arange(height)[:, None] / (2 * height), np.arange(width) / (2 * width)) + 1e-9)
    bins[0, 0] = -1
    return bins


@pytest.mark.parametrize("k", [1, 4, 9])
def test_what_swings_once_in_time_is_one_temporal_frequency(k):
    grey = 128 + 80 * half_waves(k, 10)[:, None, None] * np.ones((1, 32, 32))
    spectrum = temporal_spectrum(video(grey))
    assert int(spectrum.argmax()) == k - 1
    assert float(spectrum[k - 1]) == pytest.approx(80**2 * 10 / 2, rel=0.01)
    assert (spectrum.sum() - spectrum[k - 1]) < 1e-3 * spectrum[k - 1]


def test_a_frozen_video_has_no_temporal_power_and_a_flat_one_no_spatial():
    frozen = video(np.repeat(noise()[:1], 12, 0))
    assert temporal_spectrum(frozen).max() < 1e-20
    assert spatial_spectrum(video(np.full((2, 32, 32), 77))).max() < 1e-20


def test_a_slope_leaks_nothing_into_what_is_fine():
    """Fourier's transform of it has a step at the border."""
    slope = np.stack([np.linspace(50, 200, 128)[None].repeat(128, 0)] * 2)
    spectrum = spatial_spectrum(video(slope))
    fourier = np.abs(np.fft.fft2(slope[0], norm="ortho")) ** 2
    radius = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))
    assert fourier[(radius > 0.4) & (radius < 0.5)].mean() > 20 * float(spectrum[13:].mean())


def test_spectra_of_parts_merge_to_the_mean_of_the_set():
    videos = [video(noise(10 + i, (4, 32, 40), i)) for i in range(5)]
    for spectrum in (spatial_spectrum, temporal_spectrum):
        each = torch.stack([spectrum(frames) for frames in videos])
        merged = Moments.of(each[:2]).merge(Moments.of(each[2:]))
        torch.testing.assert_close(merged.mean, each.mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(32, 8), (24, 40), (256, 33)])
def test_no_bin_is_empty_in_small_and_narrow_pictures(size):
    assert torch.isfinite(spatial_spectrum(video(noise(shape=(2, *size))))).all()


def test_colours_weigh_as_the_eye_weighs_them():
    grey = video(noise(shape=(3, 32, 32)))
    for colour, weight in enumerate((0.299, 0.587, 0.114)):
        one = torch.zeros_like(grey)
        one[..., colour] = grey[..., colour]
        torch.testing.assert_close(temporal_spectrum(one), weight**2 * temporal_spectrum(grey))


# -- the distance ------------------------------------------------------------------------------------------------------


def test_twice_the_contrast_is_six_decibel_away_at_every_frequency():
    real = torch.tensor([100.0, 30.0, 5.0])
    assert spectral_distance(4 * real, real) == pytest.approx(20 * np.log10(2), rel=1e-6)
    assert spectral_distance(real, 4 * real) == pytest.approx(20 * np.log10(2), rel=1e-6)
    assert spectral_distance(real, real) == 0
    assert spectral_distance(torch.tensor([100.0, 300.0]), torch.tensor([100.0, 30.0])) == pytest.approx(10 / 2**0.5)


def test_a_frozen_video_is_at_a_finite_distance_and_rounding_is_none():
    real = torch.tensor([1000 * ROUNDING, ROUNDING])
    assert spectral_distance(torch.zeros(2), real) == pytest.approx(30 / 2**0.5, rel=1e-6)


def test_blur_and_stillness_show_as_distance():
    real = noise(shape=(6, 64, 64))
    blurred = scipy.ndimage.gaussian_filter(real, (0, 1, 1))
    slowed = scipy.ndimage.gaussian_filter(real, (1, 0, 0))
    a, b, c = (video(grey) for grey in (real, blurred, slowed))
    for spectrum, worse in ((spatial_spectrum, b), (temporal_spectrum, c)):
        same = spectral_distance(spectrum(video(noise(shape=(6, 64, 64), seed=1))), spectrum(a))
        assert spectral_distance(spectrum(worse), spectrum(a)) > 5 > 4 * same


def test_spectra_that_cannot_be_compared_or_made_are_refused():
    with pytest.raises(ValueError, match=r"spectra of \[15\] and \[7\]: of one kind, of as many frames"):
        spectral_distance(torch.ones(15), torch.ones(7))
    with pytest.raises(ValueError, match="needs 32 pixels on the longer side"):
        spatial_spectrum(torch.zeros(2, 31, 31, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a temporal spectrum needs 2"):
        temporal_spectrum(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
