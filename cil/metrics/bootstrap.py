"""How far a figure of a set would be another one for other videos: the set is drawn anew from itself, many times.

replicates = torch.tensor([figure(scores[drawn]) for drawn in resampled(len(scores), 200)])
low, high = interval(figure(scores), replicates)
"""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from cil.draws import stream_seed


def resampled(n: int, times: int, seed: int = 0, clusters: Sequence[Hashable] | None = None) -> Iterator[Tensor]:
    """`times` draws of n out of n, with replacement: int64 [n] each.

    `clusters`: what each of the n is of. Those of one, as several videos of one image, are alike, so as many clusters
    as there are get drawn, each with all that it has: a draw has n where all have as many.

    They are a function of (n, seed), so two rows that have videos of the same clips, in the same order, are drawn
    alike: the differences of their replicates are those of the difference, and give its interval.
    """
    places: dict[Hashable, list[int]] = {}
    for i, cluster in enumerate(range(n) if clusters is None else clusters):
        places.setdefault(cluster, []).append(i)
    members, count = [torch.tensor(own) for own in places.values()], len(places)
    random = torch.Generator().manual_seed(stream_seed(seed, count))
    for _ in range(times):
        drawn = torch.randint(count, (count,), generator=random)
        yield drawn if count == n else torch.cat([members[i] for i in drawn.tolist()])


def interval(
    estimate: float, replicates: Tensor, confidence: float = 0.95, least: float = -float("inf")
) -> tuple[float, float]:
    """Around the estimate, as wide as the replicates are spread around their own mean; nowhere below `least`.

    A set that was drawn from another one has fewer different videos, so distances of replicates are too large: taken
    as they are, their quantiles may not even hold the estimate.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: between 0 and 1")
    spread = replicates.double() - replicates.double().mean()
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = (estimate + spread.quantile(tails)).tolist()
    return max(low, least), high
