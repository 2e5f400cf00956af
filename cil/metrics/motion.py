"""How much a video moves: the mean magnitude of its optical flow, by DIS (no weights needed)."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

SMALLEST = 16  # pixels: DIS needs this much to work on


def motion_score(frames: Tensor) -> float:
    """Mean optical flow of uint8 frames [T, H, W, 3], in pixels a frame."""
    import cv2

    if len(frames) < 2 or min(frames.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"frames {tuple(frames.shape)}: a motion score needs 2 frames of {SMALLEST}x{SMALLEST} or more"
        )
    cv2.setNumThreads(1)
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in np.ascontiguousarray(frames.numpy())]
    still = np.zeros((*grey[0].shape, 2), np.float32)  # the flow that DIS starts from
    flows = [flow.calc(a, b, still.copy()) for a, b in pairwise(grey)]
    return float(np.mean([np.linalg.norm(f, axis=-1).mean() for f in flows]))


def first_frame_error(frames: Tensor, image: Tensor) -> float:
    """Mean squared error of the first frame [T, H, W, 3] against the conditional image [H, W, 3], pixels in [-1, 1]."""
    return float(((frames[0].float() - image.float()) / 127.5).square().mean())


def distribution_error(ours: Tensor, real: Tensor) -> float:
    """Wasserstein-1 distance between two samples of a score: more motion than the data's is not better."""
    q = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    return float((ours.double().quantile(q) - real.double().quantile(q)).abs().mean())
