import numpy as np
import pytest

from pipelines.config import ShapesConfig
from pipelines.make_shapes import shape_of
from pipelines.shapes import Shape, velocity_of


def shape(**changes) -> Shape:
    return Shape(
        **(
            {"seed": 0, "index": 5, "frames": 12, "size": 32, "moving": True}
            | {"min_speed": 0.5, "max_speed": 2.5}
            | changes
        )
    )


def test_a_video_is_a_function_of_its_seed_and_number():
    np.testing.assert_array_equal(shape().render(), shape().render())
    assert (shape().render() != shape(index=6).render()).any()
    assert (shape().render() != shape(seed=1).render()).any()


def test_the_caption_tells_the_velocity_that_the_disc_has():
    told = velocity_of(shape().caption)
    assert told == pytest.approx(shape().velocity, abs=1e-3)
    assert 0.5 <= np.hypot(*told) <= 2.5
    assert velocity_of(shape(moving=False).caption) == (0.0, 0.0)
    assert velocity_of("a cat on a roof") is None


def test_the_disc_moves_as_told():
    """The centre of the bright pixels, on the torus, over frames."""
    moving = shape(frames=24, min_speed=1.5, max_speed=1.5)
    frames = moving.render()[..., 0].astype(float)
    bright = np.clip(frames - np.median(frames, axis=0), 20, None) - 20  # the ground is what is seen most of the time
    turns = np.exp(2j * np.pi * np.arange(32) / 32)
    across = np.unwrap(np.angle((bright.sum(1) * turns).sum(1))) * 32 / (2 * np.pi)
    down = np.unwrap(np.angle((bright.sum(2) * turns).sum(1))) * 32 / (2 * np.pi)
    speed = [np.polyfit(range(len(x)), x, 1)[0] for x in (across, down)]
    assert speed == pytest.approx(moving.velocity, abs=0.15)


def test_a_still_disc_stands_still():
    frames = shape(moving=False).render()
    assert (frames == frames[0]).all()


def test_the_share_of_moving_videos_is_kept_in_every_stretch():
    shapes = ShapesConfig(moving=0.15)
    moving = [shape_of(0, shapes, i).moving for i in range(1000)]
    assert sum(moving) == 150
    assert all(14 <= sum(moving[i : i + 100]) <= 16 for i in range(0, 900, 50))


def test_the_first_frame_does_not_tell_the_direction():
    """The same picture whatever the speed: the first frame is drawn from other numbers than the velocity."""
    np.testing.assert_array_equal(shape().render()[0], shape(min_speed=0.0, max_speed=0.1).render()[0])
