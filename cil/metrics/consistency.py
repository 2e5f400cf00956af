"""Temporal consistency: how well each frame is the one before it, moved along the optical flow.

found = warp_error(frames)      # uint8 [T, H, W, 3]; found.error, found.hidden
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cil.metrics.motion import Flow

BACK = 0.01, 0.5  # how far off a way there and back may be: of the squares of both ways, and in pixels squared


class WarpError(NamedTuple):
    error: float  # mean square of the difference where both frames see the same, of brightness in 0..1
    hidden: float  # share of the pixels that the other frame does not see, or of which that is not sure


def warp_error(
    frames: Tensor, longest: int | None = None, flow: Flow | None = None, back: Flow | None = None
) -> WarpError:
    """A mean over pairs of frames, by the flow of `motion_score`, on pictures of at most `longest` pixels. `flow`: that
    of these frames, where it is known already; `back`: of these frames in reverse.

    A pixel counts if the flow leads it to the other frame, and the flow from there back to where it was (Sundaram et
    al. 2010). So a pair in which nothing can be followed, as at a cut, tells by `hidden` and not by `error`; a video
    all of whose pixels are hidden has an error of NaN. A video that stands still has an error of 0: look at its motion.
    """
    there, back = flow or Flow(frames, longest), back or Flow(frames.flip(0), longest)
    pairs = zip(pairwise(there.pictures), there.fields, reversed(back.fields), strict=True)
    found = [_of_pair(a, b, field, backward) for (a, b), field, backward in pairs]
    squares, seen, pixels = (float(sum(values)) for values in zip(*found, strict=True))
    return WarpError(squares / seen if seen else float("nan"), 1 - seen / pixels)


def _of_pair(a: np.ndarray, b: np.ndarray, field: np.ndarray, back: np.ndarray) -> tuple[float, int, int]:
    """Sum of squares over the pixels of a that b sees, how many these are, and how many there are."""
    import cv2

    height, width = a.shape
    x = field[..., 0] + np.arange(width, dtype=np.float32)
    y = field[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    returned = cv2.remap(back, x, y, cv2.INTER_LINEAR)
    allowed = BACK[0] * ((field**2).sum(-1) + (returned**2).sum(-1)) + BACK[1]
    seen = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    seen &= ((field + returned) ** 2).sum(-1) <= allowed
    warped = cv2.remap(b.astype(np.float32), x, y, cv2.INTER_LINEAR)
    difference = (a[seen] - warped[seen]).astype(np.float64) / 255
    return float((difference**2).sum()), int(seen.sum()), seen.size
