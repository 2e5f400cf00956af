"""Scores of a clip against decoding it, and near duplicates among many hashes against comparing all pairs; one core.

    python -m benchmarks.scores

Clips are those of benchmarks.decode, resized to 320x512. A fourth of the time of decoding is what all scores together
may take; the second row shows motion at full size, for which one would have to decode twice. The third sets 20,000
hashes beside numpy's comparing each with each; the last a million, a fifth of them near another, beside 30 s.
"""

import os
import time

import numpy as np
import torch

from benchmarks import Row, alternately, main, paired
from benchmarks.decode import sample
from cil.metrics.clips import clip_scores
from cil.metrics.duplicates import near_duplicates
from cil.metrics.motion import motion_score
from pipelines.video import PyAVDecoder, fit

SIZE = (320, 512)
FEW, MANY = 20_000, 1_000_000
LIMIT = 30.0  # s


def measure(quick: bool) -> list[Row]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rounds = 3 if quick else 7
    samples = [sample(number) for number in range(2 if quick else 6)]
    clips = [fit(PyAVDecoder(data).frames(indices), *SIZE) for data, indices in samples]

    def decode() -> None:
        for data, indices in samples:
            PyAVDecoder(data).frames(indices)

    def scores() -> None:
        for clip in clips:
            clip_scores(clip)

    def motion() -> None:
        for clip in clips:
            motion_score(clip)

    seconds = alternately(scores, motion, decode, rounds=rounds, clock=time.process_time)
    ours, full, decoding = (1e3 / len(clips) * float(np.median(times)) for times in seconds)
    few, many = _hashes(FEW), _hashes(MANY)
    if len(np.unique(near_duplicates(few))) != FEW - FEW // 5:
        raise SystemExit("benchmarks.scores: near_duplicates has not found the hashes that were planted")
    found, compared = alternately(lambda: near_duplicates(few), lambda: _each_with_each(few), rounds=rounds)
    million = float(np.median(alternately(lambda: near_duplicates(many), rounds=rounds)[0]))
    fast, slow = float(np.median(found)), float(np.median(compared))
    return [
        Row("scores: decoding", ours, decoding, None, "ms a clip", paired(seconds[2], seconds[0]), 4.0),
        Row("scores: motion at full size alone", ours, full, None, "ms a clip", paired(seconds[1], seconds[0])),
        Row("scores: near duplicates, all pairs", fast, slow, None, "s", paired(compared, found), 10.0),
        Row("scores: a million hashes, 30 s", million, LIMIT, None, "s", LIMIT / million, 1.0),
    ]


def _hashes(n: int) -> np.ndarray:
    """Random ones; a fifth are another one with a bit changed."""
    random = np.random.default_rng(0)
    alone = random.integers(1, 2**64, n - n // 5, dtype=np.uint64)
    near = alone[: n // 5] ^ np.uint64(1) << random.integers(0, 64, n // 5, dtype=np.uint64)
    return random.permutation(np.concatenate([alone, near]))


def _each_with_each(hashes: np.ndarray) -> None:
    for i in range(len(hashes)):
        np.flatnonzero(np.bitwise_count(hashes[i + 1 :] ^ hashes[i]) <= 3)


if __name__ == "__main__":
    main(__doc__, measure)
