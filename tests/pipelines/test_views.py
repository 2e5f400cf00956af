"""Which frames a view takes: by hand, and by counting over thousands of videos."""

from collections import Counter

import pytest

from pipelines.config import Config, load
from pipelines.video import BadVideo
from pipelines.views import View, split_of, views_of

VIDEOS = [f"video-{i}" for i in range(2000)]


def policy(*overrides: str) -> Config:
    return load(None, ["cache.views_per_video=1", "cache.validation=0", "cache.test=0", *overrides])


def of(config: Config, count: int = 100, fps: float = 30.0, frames: int = 8, videos=VIDEOS) -> list[View]:
    return [view for video in videos for view in views_of(config, video, count, fps, frames)]


def assert_uniform(found: Counter, values) -> None:
    """Each as often as the others: to 5 standard deviations of a count, which a fair draw keeps to."""
    values, total = list(values), sum(found.values())
    assert set(found) == set(values)
    share = 1 / len(values)
    assert max(abs(found[v] - share * total) for v in values) <= 5 * (total * share * (1 - share)) ** 0.5, found


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "frames", "count"), [(1, 8, 8), (3, 8, 22), (3, 8, 40), (5, 2, 6)])
def test_a_clip_has_its_frames_a_stride_apart_and_inside_the_video(stride, frames, count):
    starts = set()
    for view in of(policy(f"cache.stride={stride}"), count=count, frames=frames):
        assert view.stride == stride
        start = view.indices[0]
        assert view.indices == [start + i * stride for i in range(frames)]
        assert start >= 0
        assert view.indices[-1] < count
        starts.add(start)
    assert starts == set(range(count - (frames - 1) * stride))  # the last one that fits is among them


def test_clips_start_anywhere_alike():
    views = of(policy("cache.stride=3"), count=31)
    assert_uniform(Counter(view.indices[0] for view in views), range(10))


@pytest.mark.parametrize(("overrides", "least"), [(["cache.stride=3"], 22), (["cache.stride=[3, 6]"], 22)])
def test_a_video_that_is_a_frame_too_short_is_refused_with_both_numbers(overrides, least):
    config = policy(*overrides)
    assert of(config, count=least)[0].indices[-1] == least - 1
    with pytest.raises(BadVideo, match=f"^{least - 1} frames; a clip spans {least}$") as refused:
        views_of(config, "a", least - 1, 30.0, 8)
    assert refused.value.reason == "too_short"


# -- strides -----------------------------------------------------------------------------------------------------------


def test_strides_of_a_range_are_drawn_alike():
    assert_uniform(Counter(view.stride for view in of(policy("cache.stride=[1, 6]"), count=500)), range(1, 7))
    assert {view.stride for view in of(policy("cache.stride=[4, 4]"), count=500)} == {4}


@pytest.mark.parametrize(("count", "fitting"), [(43, 6), (42, 5), (29, 4), (28, 3), (15, 2)])
def test_a_short_video_takes_those_of_a_range_that_fit_alike(count, fitting):
    views = of(policy("cache.stride=[2, 6]"), count=count)
    assert_uniform(Counter(view.stride for view in views), range(2, fitting + 1))
    assert all(view.indices[-1] < count for view in views)


def test_the_start_is_not_tied_to_the_stride():
    views = of(policy("cache.stride=[1, 2]"), count=17, frames=8)
    of_two = Counter(view.indices[0] for view in views if view.stride == 2)
    assert_uniform(of_two, range(3))


@pytest.mark.parametrize(
    ("fps", "asked", "stride"),
    [(30, 3, 10), (25, 3, 8), (29.97, 3, 10), (23.976, 8, 3), (60, 8, 8), (8, 8, 1), (10, 30, 1), (30, 29, 1)],
)
def test_a_frame_rate_that_is_asked_for_is_met_as_near_as_whole_strides_can(fps, asked, stride):
    views = of(policy(f"cache.fps={asked}"), fps=fps, videos=VIDEOS[:20])
    assert {view.stride for view in views} == {stride}


@pytest.mark.parametrize("fps", [0.0, float("nan"), -1.0, float("inf")])
def test_a_video_without_a_frame_rate_is_refused_where_one_is_asked_for(fps):
    with pytest.raises(BadVideo) as refused:
        views_of(policy("cache.fps=3"), "a", 100, fps, 8)
    assert refused.value.reason == "no_frame_rate"
    assert "cache.fps" in str(refused.value)
    assert len(views_of(policy("cache.stride=3"), "a", 100, fps, 8)) == 1


def test_a_video_too_short_for_the_frame_rate_is_refused_and_not_sped_up():
    with pytest.raises(BadVideo, match="70 frames; a clip spans 71"):
        views_of(policy("cache.fps=3"), "a", 70, 30.0, 8)


# -- what is done to them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_clips_are_mirrored_in_the_share_asked_for(share):
    flips = [view.flip for view in of(policy(f"cache.flip={share}"))]
    assert abs(sum(flips) - share * len(flips)) <= 5 * (len(flips) * share * (1 - share)) ** 0.5


def test_the_conditional_image_is_the_first_frame_unless_any_is_asked_for():
    assert {view.frame for view in of(policy())} == {0}
    assert_uniform(Counter(view.frame for view in of(policy("cache.condition=random"))), range(8))


def test_a_video_that_is_held_out_is_always_continued_from_its_first_frame():
    config = policy("cache.condition=random", "cache.validation=0.3", "cache.test=0.3")
    frames = {"train": set(), "validation": set(), "test": set()}
    for video in VIDEOS[:300]:
        frames[split_of(config, video)] |= {view.frame for view in of(config, videos=[video])}
    assert frames == {"train": set(range(8)), "validation": {0}, "test": {0}}


# -- of what it is a function ------------------------------------------------------------------------------------------

EVERYTHING = ("cache.stride=[1, 6]", "cache.flip=0.5", "cache.condition=random")


def test_a_view_is_a_function_of_seed_videoid_and_number_alone():
    config = policy(*EVERYTHING, "cache.views_per_video=3")
    whole = {video: views_of(config, video, 60, 30.0, 8) for video in VIDEOS[:50]}
    backwards = {video: views_of(config, video, 60, 30.0, 8) for video in VIDEOS[49::-7]}
    assert {video: whole[video] for video in backwards} == backwards
    more = policy(*EVERYTHING, "cache.views_per_video=5")
    assert all(views_of(more, video, 60, 30.0, 8)[:3] == views for video, views in whole.items())


@pytest.mark.parametrize("what", ["seed", "video", "number"])
def test_another_seed_video_or_number_draws_everything_anew(what):
    one, other = (
        policy(*EVERYTHING, "cache.views_per_video=2"),
        policy(*EVERYTHING, "cache.views_per_video=2", "seed=1"),
    )
    pairs = []
    for i, video in enumerate(VIDEOS[:200]):
        first, second = views_of(one, video, 100, 30.0, 8)
        another = {
            "seed": views_of(other, video, 100, 30.0, 8)[0],
            "video": views_of(one, VIDEOS[i + 1], 100, 30.0, 8)[0],
            "number": second,
        }
        pairs.append((first, another[what]))
    for name, by_chance in (("stride", 1 / 6), ("flip", 1 / 2), ("frame", 1 / 8)):
        same = sum(getattr(a, name) == getattr(b, name) for a, b in pairs)
        assert abs(same - 200 * by_chance) < 5 * (200 * by_chance) ** 0.5, (name, same)
    assert sum(a.indices[0] == b.indices[0] for a, b in pairs) < 20


# -- splits ------------------------------------------------------------------------------------------------------------


def test_videos_are_held_out_in_the_shares_asked_for():
    config = policy("cache.validation=0.1", "cache.test=0.25")
    found = Counter(split_of(config, video) for video in VIDEOS)
    for split, share in (("validation", 0.1), ("test", 0.25), ("train", 0.65)):
        assert abs(found[split] - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5, found
    assert {split_of(policy(), video) for video in VIDEOS} == {"train"}


def test_splits_are_of_the_video_and_drawn_anew_by_another_seed():
    shares = ("cache.validation=0.2", "cache.test=0.3")
    configs = [policy(*shares, *more) for more in ([], ["cache.flip=1"], ["seed=1"])]
    splits = [[split_of(config, video) for video in VIDEOS] for config in configs]
    assert splits[0] == splits[1]
    same = sum(a == b for a, b in zip(splits[0], splits[2], strict=True))
    assert abs(same / 2000 - (0.2**2 + 0.3**2 + 0.5**2)) < 0.06


def test_a_larger_share_for_the_test_takes_no_test_video_back():
    few, many = policy("cache.test=0.2"), policy("cache.test=0.4")
    assert all(split_of(many, v) == "test" for v in VIDEOS if split_of(few, v) == "test")
