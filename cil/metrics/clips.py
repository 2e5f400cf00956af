"""Scores of a clip, to filter by and to balance training with: motion, a cut in it, the subject's share of the picture.

    scores = clip_scores(frames)        # uint8 [T, H, W, 3]; 320x512 and 16 frames: a fifth of the time of decoding them

No weights are needed. The scores tell clips apart; what to keep is said where clips are used (docs: benchmarks/scores.py).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from cil.metrics.duplicates import picture_hash
from cil.metrics.motion import Flow

LONGEST = 192  # pixels of the longer side, for the flow
SALIENCY = 64  # the same, for the saliency
LOOKS = 4  # frames whose subject is looked for


@dataclass(frozen=True)
class ClipScores:
    motion: float  # pixels a frame
    cut: float  # 0 .. 1
    subject: float  # share of the picture
    hash: int  # of the middle frame, 0 if that is flat


def clip_scores(frames: Tensor) -> ClipScores:
    """All of them, with the flow computed once. Motion is `motion_score(frames, LONGEST)`."""
    flow = Flow(frames, LONGEST)
    return ClipScores(flow.mean, _scene_cut(flow), subject_share(frames), picture_hash(frames[len(frames) // 2]))


def scene_cut(frames: Tensor) -> float:
    """How sure it is that a cut lies within uint8 frames [T, H, W, 3]: 0 to 1; a cut from about 0.3.

    Each frame is compared with the next one, moved back by their optical flow: 1 - their correlation, which neither
    brightness nor contrast changes. A cut stands out from the pairs on both its sides and from the clip's median, which
    a flash, noise, and motion too fast for the flow do not. So a single strange frame, after which the picture goes on,
    is no cut, nor is a dissolve over four frames or more.
    """
    return _scene_cut(Flow(frames, LONGEST))


def _scene_cut(flow: Flow) -> float:
    # Contrast that says little: of codecs, and of a picture that has almost faded.
    little = max(4.0, max(float(picture.std()) for picture in flow.pictures) / 3)
    pairs = zip(pairwise(flow.pictures), flow.fields, strict=True)
    unlike = [_unlike(a, b, field, little) for (a, b), field in pairs]
    surest = 0.0
    for i, here in enumerate(unlike):
        others = unlike[:i] + unlike[i + 1 :]
        around = unlike[max(i - 1, 0) : i] + unlike[i + 1 : i + 2]
        surest = max(surest, here - max(float(np.median(others or 0)), *around, 0.0))
    return min(surest, 1.0)


def _unlike(a: np.ndarray, b: np.ndarray, field: np.ndarray, little: float) -> float:
    """1 - the correlation of grey pictures [h, w] where b, moved back by the flow from a to b, covers a."""
    import cv2

    height, width = a.shape
    x, y = field[..., 0] + np.arange(width, dtype=np.float32), field[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    seen = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if not seen.any():
        return 1.0
    p, q = (z[seen].astype(np.float32) for z in (a, cv2.remap(b, x, y, cv2.INTER_LINEAR)))
    p, q = p - p.mean(), q - q.mean()
    pq, pp, qq = (float(np.mean(z)) + little**2 for z in (p * q, p * p, q * q))
    return 1 - pq / (pp * qq) ** 0.5


def subject_share(frames: Tensor) -> float:
    """Share of the picture that its main subject takes, by saliency: a mean over a few of uint8 frames [T, H, W, 3].

    Spectral residual, Hou and Zhang 2007. It sees a subject by its outline: one of half of the picture and more is lost.
    """
    looks = np.unique(np.linspace(0, len(frames) - 1, LOOKS).round().astype(int))
    return float(np.mean([_subject(frame) for frame in frames[looks].numpy()]))


def _subject(frame: np.ndarray) -> float:
    """The largest salient region of [H, W, 3], filled, less the width that blurring has added to it."""
    import cv2

    cv2.setNumThreads(1)
    scale = SALIENCY / max(frame.shape[:2])
    size = [max(8, round(side * scale)) for side in frame.shape[1::-1]]
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    if grey.std() < 1:
        return 0.0
    spectrum = np.fft.fft2(grey)
    amplitude = np.log(np.abs(spectrum) + 1e-3)
    average = cv2.blur(np.tile(amplitude, (3, 3)), (3, 3))[len(grey) : 2 * len(grey), size[0] : 2 * size[0]]
    saliency = np.abs(np.fft.ifft2(np.exp(amplitude - average + 1j * np.angle(spectrum)))) ** 2
    saliency = cv2.GaussianBlur(saliency, (0, 0), 1.5)
    salient = (saliency > 3 * saliency.mean()).astype(np.uint8)
    outlines, _ = cv2.findContours(salient, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    regions = [cv2.drawContours(np.zeros_like(salient), outlines, i, 1, cv2.FILLED) for i in range(len(outlines))]
    largest = max(regions, key=np.sum, default=np.zeros_like(salient))
    halo = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    return float(cv2.erode(largest, halo).mean())
