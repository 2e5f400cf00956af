"""The Inception Score, from sums that merge."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torchmetrics.image.inception import InceptionScore

from cil.metrics.bootstrap import interval
from cil.metrics.inception_score import ClassMoments, score_replicates, split_of


def logits(n: int, classes: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(p: np.ndarray) -> float:
    """exp of the mean of KL(p || mean), each by scipy."""
    return float(np.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p])))


def of(p: torch.Tensor, splits: int) -> ClassMoments:
    return ClassMoments.of(p, split_of(torch.arange(len(p)), len(p), splits), splits)


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_scores_are_those_of_the_definition_in_each_split(splits):
    p = logits(103, 7).softmax(1)
    parts = [p[i * 103 // splits : (i + 1) * 103 // splits].numpy() for i in range(splits)]
    np.testing.assert_allclose(of(p, splits).scores, [by_hand(part) for part in parts], rtol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_score_of_one_split_is_that_of_torchmetrics():
    x = logits(200, 11)
    public = InceptionScore(feature=torch.nn.Identity(), splits=1).set_dtype(torch.float64)
    public.update(x)
    assert of(x.softmax(1), 1).scores.tolist() == pytest.approx([float(public.compute()[0])], rel=1e-9)


def test_a_certain_classifier_of_equally_frequent_classes_scores_their_number_and_an_unsure_one_scores_1():
    """Probabilities of 0, of which the logarithm is none, count as nothing."""
    p = torch.eye(6).repeat(5, 1)
    assert of(p, 5).scores.tolist() == pytest.approx([6.0] * 5, rel=1e-12)
    assert of(torch.full((30, 6), 1 / 6), 5).scores.tolist() == pytest.approx([1.0] * 5, rel=1e-6)
    one_class = torch.eye(6)[[2] * 30]
    assert of(one_class, 3).scores.tolist() == [1.0] * 3


def test_a_mixture_of_two_kinds_of_videos_scores_what_its_entropies_say():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).repeat(10, 1)
    entropy = scipy.special.entr(p.numpy()).sum(1).mean()
    assert float(of(p, 1).scores) == pytest.approx(np.exp(scipy.special.entr([0.6, 0.4]).sum() - entropy), rel=1e-12)


@pytest.mark.parametrize("splits", [1, 4])
def test_parts_merge_in_any_order_to_the_scores_of_the_whole(splits):
    p = logits(57, 5).softmax(1)
    split = split_of(torch.arange(57), 57, splits)
    parts = [ClassMoments.of(p[i], split[i], splits) for i in torch.randperm(57).split([1, 20, 30, 6])]
    a, b, c, d = parts
    torch.testing.assert_close(d.merge(b).merge(a.merge(c)).scores, of(p, splits).scores, rtol=1e-12, atol=0)


def test_splits_are_consecutive_and_differ_by_one_video_at_most():
    assert split_of(torch.arange(7), 7, 3).tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert split_of(torch.tensor([9_999, 0, 1000, 999]), 10_000).tolist() == [9, 0, 1, 0]
    with pytest.raises(ValueError, match="splits=10: 1 to the number of videos, 7"):
        split_of(torch.arange(7), 7)


def test_what_has_no_score_is_refused():
    nothing = ClassMoments.of(torch.full((3, 2), 0.5), torch.tensor([0, 0, 2]), 3)
    with pytest.raises(ValueError, match="3 videos in 3 splits, of which some are empty"):
        _ = nothing.scores
    for p in ([[0.5, 0.6]], [[1.5, -0.5]], [[float("nan"), 1.0]]):
        with pytest.raises(ValueError, match="at least 0, and 1 in sum"):
            ClassMoments.of(torch.tensor(p), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"\[4, 2\] of splits \[3\]"):
        ClassMoments.of(torch.full((4, 2), 0.5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[1, 2\] cannot merge with \[1, 3\]"):
        of(torch.full((4, 2), 0.5), 1).merge(of(torch.full((3, 3), 1 / 3), 1))


def test_the_interval_is_as_wide_as_the_spread_of_scores_of_other_sets():
    found = torch.stack([of(logits(120, 4, seed).softmax(1), 2).scores.mean() for seed in range(300)])
    p = logits(120, 4, 1000).softmax(1)
    split = split_of(torch.arange(120), 120, 2)
    replicates = score_replicates(p, split, 2, times=500, seed=3)
    assert replicates.shape == (500,)
    low, high = interval(float(of(p, 2).scores.mean()), replicates)
    # 300 sets give a deviation to 4 %, one set of 120 to about 15 %.
    assert high - low == pytest.approx(2 * 1.96 * float(found.std()), rel=0.4)
    assert low < float(found.mean()) < high
    assert torch.equal(replicates, score_replicates(p, split, 2, times=500, seed=3))
    assert not torch.equal(replicates, score_replicates(p, split, 2, times=500, seed=4))


def test_splits_are_drawn_apart_from_each_other():
    """Of four splits that hold the same videos the mean is spread half as far as one of them."""
    p = logits(60, 4).softmax(1)
    split = torch.arange(4).repeat_interleave(60)
    one, four = score_replicates(p, split[:60], 1), score_replicates(p.repeat(4, 1), split, 4)
    assert float(four.std() / one.std()) == pytest.approx(0.5, rel=0.15)


def test_videos_of_one_image_are_drawn_together_whatever_split_they_are_in():
    p = logits(40, 4).softmax(1)
    twice, split = p.repeat(2, 1), split_of(torch.arange(80), 80, 2)  # each in both splits
    images = [*range(40)] * 2
    found = score_replicates(twice, split, 2, times=400, clusters=images)
    # Both splits are drawn alike, so their mean is as uncertain as one of them: apart from each other less so.
    one, apart = (score_replicates(x, split[:n], k, times=400) for x, n, k in ((p, 40, 1), (twice, 80, 2)))
    assert float(found.std()) == pytest.approx(float(one.std()), rel=0.15)
    assert float(apart.std()) == pytest.approx(float(one.std()) / 2**0.5, rel=0.15)
    each = score_replicates(p, split[:40], 1, times=400, clusters=[*range(40)])
    assert torch.equal(each, one)
    few = score_replicates(twice[:4], split_of(torch.arange(4), 4, 4), 4, times=50, clusters=[0, 0, 1, 1])
    assert torch.isfinite(few).all()  # though some splits got nothing
