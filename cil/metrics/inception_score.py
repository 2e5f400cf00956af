"""The Inception Score of videos: how sure a classifier is of each, and how different they are (Salimans et al. 2016).

split = split_of(positions, videos=10_000)                     # which tenth of the set each one belongs to
state = ClassMoments.of(probabilities, split)                  # [B, K] of a part; parts are merged in any order
scores = state.merge(others).scores                            # one for each tenth: published are mean and deviation
low, high = interval(float(scores.mean()), score_replicates(all_probabilities, all_splits))
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cil.metrics.bootstrap import resampled

SPLITS = 10


def split_of(positions: Tensor, videos: int, splits: int = SPLITS) -> Tensor:
    """Consecutive parts of a set in its own order, of equal size but for one video: int64, 0 .. splits - 1.

    The order must say nothing of the content: of videos sorted by class each part would have few classes.
    """
    if not 1 <= splits <= videos:
        raise ValueError(f"splits={splits}: 1 to the number of videos, {videos}")
    ends = torch.arange(1, splits + 1) * videos // splits
    return torch.bucketize(positions, ends, right=True)


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Of each split S: videos, sum of their probabilities and of sum_k p_k log p_k, mergeable, in float64."""

    count: Tensor  # [S]
    total: Tensor  # [S, K]
    certainty: Tensor  # [S]

    @classmethod
    def of(cls, probabilities: Tensor, split: Tensor, splits: int = SPLITS) -> "ClassMoments":
        """Of probabilities [B, K] of videos that belong to the splits [B]."""
        p = probabilities.detach().double().cpu()
        if p.dim() != 2 or p.shape[:1] != split.shape:
            raise ValueError(f"probabilities {list(p.shape)} of splits {list(split.shape)}: expected [B, K] of [B]")
        if not (p >= 0).all() or (p.sum(1) - 1).abs().max() > 1e-3:
            raise ValueError("probabilities: of each video at least 0, and 1 in sum")
        p = p / p.sum(1, keepdim=True)
        member = torch.nn.functional.one_hot(split, splits).double().T
        return cls(member.sum(1), member @ p, member @ torch.xlogy(p, p).sum(1))

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        if self.total.shape != other.total.shape:
            raise ValueError(f"splits x classes {list(self.total.shape)} cannot merge with {list(other.total.shape)}")
        return ClassMoments(self.count + other.count, self.total + other.total, self.certainty + other.certainty)

    @property
    def scores(self) -> Tensor:
        """[S]: exp of the mean over videos of KL(p || mean of p), which is the mean certainty less the mean's own."""
        if not (self.count > 0).all():
            raise ValueError(f"{int(self.count.sum())} videos in {len(self.count)} splits, of which some are empty")
        mean = self.total / self.count[:, None]
        return (self.certainty / self.count - torch.xlogy(mean, mean).sum(1)).exp()


def score_replicates(
    probabilities: Tensor,
    split: Tensor,
    splits: int = SPLITS,
    times: int = 1000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Tensor:
    """[times] means over splits, each split drawn anew from itself: for `cil.metrics.bootstrap.interval`.

    `clusters`: what `resampled` takes. Those of one may be in several splits, so that all splits are drawn at once, and
    those that get nothing are left out.
    """
    if clusters is not None and len(set(clusters)) < len(clusters):
        drawn = [draw.bincount(minlength=len(split)) for draw in resampled(len(split), times, seed, clusters)]
        weights = [torch.stack(drawn)[:, split == number].double() for number in range(splits)]
    else:
        sizes = [int((split == number).sum()) for number in range(splits)]
        weights = [
            torch.stack([draw.bincount(minlength=size) for draw in resampled(size, times, seed + number)]).double()
            for number, size in enumerate(sizes)
        ]
    found = []
    for number, weight in enumerate(weights):
        p = probabilities[split == number].double().cpu()
        count = weight.sum(1)
        mean, certainty = weight @ p / count[:, None], weight @ torch.xlogy(p, p).sum(1) / count
        found.append((certainty - torch.xlogy(mean, mean).sum(1)).exp())  # NaN where the count is 0
    return torch.stack(found).nanmean(0)
