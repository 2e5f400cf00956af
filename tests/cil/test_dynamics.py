"""Dynamic degree, static videos, and the motion that was asked for."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from cil.metrics.dynamics import fastest, is_dynamic, motion_score_error, static_share
from cil.metrics.motion import Flow


def texture(height: int = 64, width: int = 128, seed: int = 0) -> np.ndarray:
    smooth = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), 2.5)
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255)


def video(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures).astype(np.uint8))[..., None].repeat(1, 1, 1, 3)


def test_the_fastest_pixels_are_those_of_the_object_however_small_it_is():
    """A square of a tenth of the picture, which moves by three pixels over ground that stands still."""

    def frame(k: int) -> np.ndarray:
        ground = texture()
        ground[20:48, 30 + 3 * k : 58 + 3 * k] = texture(seed=1)[20:48, 30:58]
        return ground

    flow = Flow(video([frame(k) for k in range(4)]))
    assert fastest(flow) == pytest.approx([3.0] * 3, rel=0.1)
    assert flow.mean < 0.7


def test_each_pair_of_frames_has_its_own():
    scene = texture(width=160)
    shown = [scene[:, begin : begin + 96] for begin in (0, 0, 4, 4, 4)]
    assert fastest(Flow(video(shown))) == pytest.approx([0, 4, 0, 0], rel=0.2, abs=1e-6)


def test_a_share_of_five_percent_is_a_mean_over_the_largest():
    flow = Flow(torch.zeros(2, 20, 20, 3, dtype=torch.uint8))
    speeds = np.arange(400.0)
    flow.fields = [np.stack([0.6 * speeds, -0.8 * speeds], -1).reshape(20, 20, 2)]
    assert fastest(flow) == pytest.approx([speeds[-20:].mean()])


@pytest.mark.parametrize(
    ("speeds", "side", "fps", "dynamic"),
    [
        ([7.0] * 4 + [0.0] * 11, 256, 8, True),  # 16 frames: four of them
        ([7.0] * 3 + [0.0] * 12, 256, 8, False),
        ([6.0] * 15, 256, 8, False),  # faster, not as fast
        ([7.0] * 15, 320, 8, False),  # 7.5
        ([7.0] * 15, 256, 3, False),  # 16: frames are further apart
        ([3.1] * 15, 128, 8, True),
        ([2.1] * 15, 256, 24, True),
        ([7.0, 0.0, 0.0, 0.0], 256, 8, True),  # 5 frames: one
        ([0.0], 256, 8, False),
    ],
)
def test_a_video_is_dynamic_where_a_quarter_of_its_frames_is_fast_for_its_size_and_rate(speeds, side, fps, dynamic):
    assert is_dynamic(speeds, side, fps) is dynamic
    assert is_dynamic(speeds[::-1], side, fps) is dynamic


def test_the_static_share_is_of_videos_below_a_motion_score():
    assert static_share(torch.tensor([0.0, 0.39, 0.4, 3.0]), 0.4) == 0.5


def test_the_motion_score_error_is_clip_by_clip_and_tells_too_little_from_too_much():
    asked = torch.tensor([1.0, 2.0, 3.0])
    assert motion_score_error(asked - 0.5, asked) == (0.5, 0.5)
    assert motion_score_error(asked + 0.5, asked) == (-0.5, 0.5)
    below, off = motion_score_error(asked.flip(0), asked)  # the right distribution, on the wrong clips
    assert (below, off) == (0, pytest.approx(4 / 3))
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]: expected \[N\], of the same clips"):
        motion_score_error(asked, asked[:2])
    with pytest.raises(ValueError, match="of the same clips"):
        motion_score_error(asked[:0], asked[:0])
