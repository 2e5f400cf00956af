"""Scores of a clip, to filter by and to balance training with: motion, a cut in it, the subject's share of the picture.

    scores = clip_scores(frames)        # uint8 [T, H, W, 3]; 320x512 and 16 frames: about a fifth of decoding

No weights are needed. Scores only tell clips apart: what to keep is for those to say who train.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from cil.metrics.duplicates import picture_hash
from cil.metrics.motion import Flow

LONGEST = 192  # pixels of the longer side, for the flow
SALIENCY = 64  # the same, for the saliency
FINE = (9, 9)  # pixels of half of that size
LOOKS = 3  # frames whose subject is looked for


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
    """How sure it is that a cut lies within uint8 frames [T, H, W, 3]: 0 to 1; call it one from 0.3.

    Each frame is compared with the next one, moved back by their optical flow, by correlation, which neither brightness
    nor contrast changes. A cut stands out from the pairs on both its sides and from the median of the clip: a flash,
    noise, and motion too fast for the flow do not. So a single strange frame, after which the picture goes on, is no
    cut, nor is a dissolve over three frames or more.

    0.3: cuts between textures give 0.36 to 0.86, what the tests know to be no cut at most 0.1, pans of a quarter of the
    width a frame 0.2, of half of it 0.45, which cannot be told from cuts.
    """
    return _scene_cut(Flow(frames, LONGEST))


def _scene_cut(flow: Flow) -> float:
    # Contrast that says little: of codecs, and of a picture that has almost faded.
    little = max(4.0, max(float(picture.std()) for picture in flow.pictures) / 3)
    pairs = zip(pairwise(flow.pictures), flow.fields, strict=True)
    both = np.array([_unlike(a, b, field, little) for (a, b), field in pairs])  # [T - 1, 2]
    return float(np.clip([_standing_out(unlike.tolist()) for unlike in both.T], 0, 1).max())


def _standing_out(series: list[float]) -> float:
    """How far one stands out from those beside it, and from the median of the others."""
    heights = []
    for i, here in enumerate(series):
        beside = series[max(i - 1, 0) : i] + series[i + 1 : i + 2]
        heights.append(here - max(float(np.median(series[:i] + series[i + 1 :] or 0)), *beside, 0.0))
    return max(heights)


def _unlike(a: np.ndarray, b: np.ndarray, field: np.ndarray, little: float) -> tuple[float, float]:
    """1 - the correlation of grey pictures [h, w] where b, moved back by the flow from a to b, covers a.

    Once as they are and once without what is coarse, of which two scenes can have the same by chance.
    """
    import cv2

    height, width = a.shape
    some = slice(None, None, 2)  # a quarter of the pixels says as much
    x = field[some, some, 0] + np.arange(0, width, 2, dtype=np.float32)
    y = field[some, some, 1] + np.arange(0, height, 2, dtype=np.float32)[:, None]
    seen = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if not seen.any():
        return 1.0, 1.0
    p, q = (z.astype(np.float32) for z in (a[some, some], cv2.remap(b, x, y, cv2.INTER_LINEAR)))
    fine_p, fine_q = (z - cv2.blur(z, FINE) for z in (p, q))
    return _uncorrelated(p[seen], q[seen], little), _uncorrelated(fine_p[seen], fine_q[seen], little / 2)


def _uncorrelated(p: np.ndarray, q: np.ndarray, little: float) -> float:
    p, q = p - p.mean(), q - q.mean()
    pq, pp, qq = (float(np.mean(z)) + little**2 for z in (p * q, p * p, q * q))
    return 1 - pq / float(np.sqrt(pp * qq))


def subject_share(frames: Tensor) -> float:
    """Share of the picture that its main subject takes, by saliency: a mean over a few of uint8 frames [T, H, W, 3].

    Spectral residual, Hou and Zhang 2007. It sees a subject by its outline: of one that fills half of the picture there
    is none, and a picture that is all texture has none. Good to balance by, in a few classes; no measure of area.
    """
    looks = np.unique(np.linspace(0, len(frames) - 1, LOOKS).round().astype(int))
    return float(np.mean([_subject(frame) for frame in frames[looks].numpy()]))


def _subject(frame: np.ndarray) -> float:
    """Share of the largest salient region of [H, W, 3], filled, less the width that blurring has added to it."""
    import cv2

    cv2.setNumThreads(1)
    scale = SALIENCY / max(frame.shape[:2])
    width, height = (max(8, round(side * scale)) for side in frame.shape[1::-1])
    small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    # Without its slope: the transform sees a step where one border meets the other.
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in grey.shape)
    grey -= grey.mean() + np.add.outer(y * (y @ grey.mean(1)) / (y @ y), x * (x @ grey.mean(0)) / (x @ x))
    if grey.std() < 1:
        return 0.0
    spectrum = np.fft.fft2(grey)
    amplitude = np.log(np.abs(spectrum) + 1)
    average = cv2.blur(np.tile(amplitude, (3, 3)), (3, 3))[height : 2 * height, width : 2 * width]
    saliency = np.abs(np.fft.ifft2(np.exp(amplitude - average + 1j * np.angle(spectrum)))) ** 2
    saliency = cv2.GaussianBlur(saliency, (0, 0), 1.5)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    salient = cv2.morphologyEx((saliency > 1.5 * saliency.mean()).astype(np.uint8), cv2.MORPH_CLOSE, disc)
    outlines, _ = cv2.findContours(salient, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    regions = [cv2.drawContours(np.zeros_like(salient), outlines, i, 1, cv2.FILLED) for i in range(len(outlines))]
    largest = max(regions, key=np.sum, default=np.zeros_like(salient))
    return float(cv2.erode(largest, disc).mean())
