"""Two rows compared video by video: the same clip, seed and prompt, so what differs is the row.

found = paired({"12:0": 1.4, "15:0": 0.9}, {"12:0": 1.1, "15:0": 0.7})
print(found.mean, found.low, found.high, found.p, found.holes)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 14  # pairs up to which every one of the 2^n flips is tried
AT_ONCE = 2**22  # signs in memory


@dataclass(frozen=True)
class Paired:
    pairs: int
    mean: float  # of ours - theirs
    low: float  # of its t-interval
    high: float
    p: float  # of a mean as far from 0 as this one, if neither row were better
    holes: tuple[str, ...]  # clips of which one row has no finite score: they are not compared


def paired(
    ours: Mapping[str, float | None],
    theirs: Mapping[str, float | None],
    confidence: float = 0.95,
    flips: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Of scores by clip. None, NaN and infinity are scores that are missing.

    p is of a sign-flip test of the mean: whatever the scores are distributed like, without a difference between the
    rows each pair could as well have been the other way round. With more than EXACT pairs `flips` random ones are
    tried, and p is at least 1 / (flips + 1).
    """
    from scipy.stats import t

    a, b = _present(ours), _present(theirs)
    both = sorted(a.keys() & b.keys())
    if len(both) < 2:
        raise ValueError(f"{len(both)} clips with a score in both rows, of {len(ours)} and {len(theirs)}: at least 2")
    d = torch.tensor([a[clip] - b[clip] for clip in both], dtype=torch.float64)
    mean, half = float(d.mean()), float(t.ppf((1 + confidence) / 2, len(d) - 1) * d.std()) / len(d) ** 0.5
    holes = tuple(sorted((ours.keys() | theirs.keys()) - set(both)))
    return Paired(len(d), mean, mean - half, mean + half, _by_flips(d, flips, seed), holes)


def _present(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {clip: score for clip, score in scores.items() if score is not None and math.isfinite(score)}


def _by_flips(d: Tensor, flips: int, seed: int) -> float:
    least = float(d.sum().abs() - 1e-12 * d.abs().sum())  # sums that are equal but for their rounding are equal
    if len(d) <= EXACT:
        signs = 1 - 2 * (torch.arange(2 ** len(d))[:, None] >> torch.arange(len(d)) & 1).double()
        return float(((signs @ d).abs() >= least).double().mean())
    random = torch.Generator().manual_seed(seed)
    beyond, rows = 0, max(AT_ONCE // len(d), 1)
    for begin in range(0, flips, rows):
        shape = min(rows, flips - begin), len(d)
        signs = 1 - 2 * torch.randint(2, shape, generator=random, dtype=torch.int8).double()
        beyond += int(((signs @ d).abs() >= least).sum())
    return (1 + beyond) / (1 + flips)
