"""Warp error along the flow, and what the flow cannot follow."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from cil.metrics.consistency import warp_error
from cil.metrics.motion import Flow


def texture(seed: int = 0, height: int = 64, width: int = 160) -> np.ndarray:
    smooth = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), 2.5)
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255)


def video(pictures: list[np.ndarray]) -> torch.Tensor:
    grey = np.clip(np.rint(np.stack(pictures)), 0, 255).astype(np.uint8)
    return torch.from_numpy(grey)[..., None].repeat(1, 1, 1, 3)


def pan(speed: int, frames: int = 5, width: int = 80) -> list[np.ndarray]:
    scene = texture()
    return [scene[:, k * speed : k * speed + width] for k in range(frames)]


@pytest.mark.parametrize("speed", [1, 2, 4])
def test_a_pan_is_consistent_and_what_leaves_the_picture_is_hidden(speed):
    found = warp_error(video(pan(speed)))
    # Measured: at most 2e-6, a third of a grey level; unmoved, the frames differ by 2e-3 to 3e-2.
    assert found.error < 1e-5
    assert speed / 80 * 0.5 < found.hidden < speed / 80 * 2 + 0.03


def test_less_than_a_pixel_beyond_the_border_is_hidden_and_not_taken_for_black():
    """Half a pixel a frame: the ways there and back would be allowed to be that far off."""
    scene = texture(0, 128, 200)
    found = warp_error(video([scipy.ndimage.zoom(scene[:, k : k + 160], 0.5, order=1) for k in range(3)]))
    assert found.error < 4e-4  # measured: 1.5e-4, and 1.3e-3 with what the border is mixed with
    assert found.hidden > 1 / 80 / 2


def test_fast_motion_may_be_further_off():
    """A texture that turns by 15 degrees a frame, up to 12 pixels: a quarter is hidden if only .7 of one is allowed."""
    scene, (y, x) = texture(0, 400, 400), np.mgrid[-48:48, -48:48]
    angles = np.deg2rad([0, 15, 30])
    ways = [[200 + y * np.cos(a) + x * np.sin(a), 200 - y * np.sin(a) + x * np.cos(a)] for a in angles]
    found = warp_error(video([scipy.ndimage.map_coordinates(scene, way) for way in ways]))
    assert found.hidden < 0.17  # measured: 0.12
    assert found.error < 1e-3


def test_a_still_video_has_no_error_and_nothing_hidden():
    assert warp_error(video([texture()] * 3)) == (0, 0)


def test_brightness_that_flickers_is_an_error_of_its_square_wherever_it_is_seen():
    """By 12 grey levels up and down, which the flow does not see."""
    still = np.clip(texture(), 20, 230)
    found = warp_error(video([still + (6 if k % 2 else -6) for k in range(6)]))
    assert found.hidden < 0.05
    assert found.error == pytest.approx((12 / 255) ** 2, rel=0.1)


@pytest.mark.parametrize("deviation", [3.0, 6.0])
def test_noise_of_its_own_in_each_frame_is_an_error_of_about_its_variance(deviation):
    """From one to two variances: interpolation between pixels of the second frame averages its noise."""
    random = np.random.default_rng(1)
    found = warp_error(video([p + deviation * random.standard_normal(p.shape) for p in pan(1)]))
    assert 1 < found.error / (deviation / 255) ** 2 < 2.1


def test_a_mean_over_pairs_weighs_by_what_is_seen():
    flickering = np.clip(texture(), 20, 230)
    found = warp_error(video([flickering, flickering + 12, flickering + 12, flickering + 12, flickering + 12]))
    assert found.error == pytest.approx((12 / 255) ** 2 / 4, rel=0.1)


def test_an_object_that_covers_the_ground_hides_it_and_costs_no_error():
    def frame(k: int) -> np.ndarray:
        ground = texture(0)[:, :96].copy()
        ground[16:48, 10 + 6 * k : 42 + 6 * k] = texture(1)[16:48, :32]
        return ground

    found = warp_error(video([frame(k) for k in range(4)]))
    covered = 6 * 32 / (64 * 96)  # of each pair: what the object is about to cover
    assert covered / 2 < found.hidden < 5 * covered
    unchecked = np.mean([(frame(k) - frame(k + 1)) ** 2 for k in range(3)]) / 255**2
    assert found.error < unchecked / 10


def test_what_cannot_be_followed_is_hidden():
    found = warp_error(video([texture(seed, 64, 96) for seed in range(3)]))
    assert found.hidden > 0.5
    assert math.isnan(found.error) or found.error >= 0


def test_smaller_pictures_tell_the_same():
    frames = video(pan(4)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    found = warp_error(frames, longest=80)
    assert found.error < 2e-4
    assert found.error != warp_error(frames, longest=120).error


def test_a_flow_that_is_known_already_is_not_computed_anew():
    frames = video(pan(2))
    assert warp_error(frames, flow=Flow(frames)) == warp_error(frames)
    still = Flow(video([texture()[:, :80]] * 5))
    assert warp_error(frames, flow=still).hidden > 0.9  # there and back is not where it was


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (4, 8, 64, 3)])
def test_videos_without_a_flow_are_refused(shape):
    with pytest.raises(ValueError, match="16x16 or more"):
        warp_error(torch.zeros(shape, dtype=torch.uint8))
