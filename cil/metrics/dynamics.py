"""Which videos move at all, and how far a set's motion is from the motion that it was asked for.

    moving = is_dynamic(fastest(Flow(frames)), min(frames.shape[1:3]), fps=8)      # dynamic degree: a mean over videos
    below, off = motion_score_error(motion_of_ours, motion_of_the_true_clips)

Not in `motion.py`, on whose text the identity of latent caches depends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cil.metrics.motion import Flow

SHARE = 0.05  # of the pixels
FAST, SIDE, FPS = 6.0, 256, 8.0  # pixels a frame, of videos of this shorter side and rate
ENOUGH = 4 / 16  # of the frames


def fastest(flow: Flow) -> list[float]:
    """Of each pair of frames, how fast the SHARE of its pixels moves that moves most, in pixels of its own pictures."""
    found = []
    for field in flow.fields:
        squares = (field[..., 0] ** 2 + field[..., 1] ** 2).ravel()
        most = max(int(len(squares) * SHARE), 1)
        found.append(float(np.sqrt(np.partition(squares, -most)[-most:], dtype=np.float64).mean()))
    return found


def is_dynamic(fastest: Sequence[float], side: int, fps: float = FPS) -> bool:
    """VBench's rule: a quarter of the frames has pixels faster than FAST, for this shorter side and frame rate.

    VBench's flow is RAFT's: by DIS figures are near to its, and to be compared with those of DIS only.
    """
    least = FAST * (side / SIDE) * (FPS / fps)
    return sum(speed > least for speed in fastest) >= max(round(ENOUGH * (len(fastest) + 1)), 1)


def static_share(motion: Tensor, below: float) -> float:
    """Of videos by their motion scores [N]."""
    return float((motion < below).double().mean())


class MotionScoreError(NamedTuple):
    below: float  # a mean of what is lacking: negative where there is more motion than was asked for
    off: float  # a mean of how far off it is, either way


def motion_score_error(found: Tensor, asked: Tensor) -> MotionScoreError:
    """Of motion scores [N], clip by clip: those of videos against those asked for, or of the true clips."""
    if found.shape != asked.shape or found.dim() != 1 or not len(found):
        raise ValueError(f"motion scores {list(found.shape)} and {list(asked.shape)}: expected [N], of the same clips")
    lacking = asked.double() - found.double()
    return MotionScoreError(float(lacking.mean()), float(lacking.abs().mean()))
