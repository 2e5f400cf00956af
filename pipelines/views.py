"""Which frames a view takes, and what is done to them: a pure function of (seed, videoid, view) and the policy."""

import hashlib
from dataclasses import dataclass

from pipelines.config import CacheConfig, Config
from pipelines.video import BadVideo


@dataclass(frozen=True)
class View:
    indices: list[int]  # of source frames
    stride: int
    flip: bool  # left to right
    frame: int  # of the clip: the conditional image


def views_of(config: Config, videoid: str, count: int, fps: float, frames: int) -> list[View]:
    """Of a video of `count` frames: clips of `frames`."""
    policy = config.cache
    split = split_of(config, videoid)
    found = []
    for view in range(policy.views_per_video):
        stride = _stride(policy, unit(config.seed, videoid, f"stride-{view}"), count, fps, frames)
        span = (frames - 1) * stride + 1
        start = int(unit(config.seed, videoid, f"view-{view}") * (count - span + 1))
        flip = unit(config.seed, videoid, f"flip-{view}") < policy.flip
        # Only training needs another than the first: a video is sampled from its beginning.
        anywhere = policy.condition == "random" and split == "train"
        frame = int(unit(config.seed, videoid, f"frame-{view}") * frames) if anywhere else 0
        found.append(View(list(range(start, start + span, stride)), stride, flip, frame))
    return found


def _stride(policy: CacheConfig, u: float, count: int, fps: float, frames: int) -> int:
    """The one nearest to the frame rate that is asked for, or one of a range, as far as the video has frames for it."""
    if policy.fps is not None:
        if not 0 < fps < float("inf"):
            raise BadVideo("no_frame_rate", "its frame rate is unknown, and cache.fps asks for one")
        least = most = max(round(fps / policy.fps), 1)
    else:
        least, most = (policy.stride, policy.stride) if isinstance(policy.stride, int) else policy.stride
    fitting = min(most, (count - 1) // max(frames - 1, 1))
    if fitting < least:
        raise BadVideo("too_short", f"{count} frames; a clip spans {(frames - 1) * least + 1}")
    return least + int(u * (fitting - least + 1))


def split_of(config: Config, videoid: str) -> str:
    """All views of a video are in one split."""
    u = unit(config.seed, videoid, "split")
    if u < config.cache.test:
        return "test"
    return "validation" if u < config.cache.test + config.cache.validation else "train"


def unit(seed: int, videoid: str, what: str) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.sha256(f"{seed}/{videoid}/{what}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
