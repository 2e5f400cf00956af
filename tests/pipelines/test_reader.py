import numpy as np
import pytest

from pipelines.cache import opened
from pipelines.errors import UserError
from pipelines.reader import BalancedOrder, SampleOrder, lanes


def test_every_epoch_sees_every_clip_once_in_an_order_of_its_own():
    order = SampleOrder(50, seed=3)
    epochs = [[order(p) for p in range(start, start + 50)] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_the_same_from_any_position_and_differs_by_seed():
    whole = [SampleOrder(7, seed=1)(p) for p in range(40)]
    order = SampleOrder(7, seed=1)
    assert [order(p) for p in (39, 0, 20, 21)] == [whole[p] for p in (39, 0, 20, 21)]
    assert whole != [SampleOrder(7, seed=2)(p) for p in range(40)]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_ranks_together_read_the_same_batch_whatever_their_number(world):
    positions = sorted(p for rank in range(world) for p in lanes(48, 16, rank, world))
    assert positions == list(range(48, 64))
    assert lanes(48, 16, 0, world) == list(range(48, 64, world))


@pytest.mark.parametrize("data", [b"", b"ARROW1", b"\0" * 500])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, data):
    (tmp_path / "part.arrow").write_bytes(data)
    with pytest.raises(UserError, match=r"part\.arrow is damaged .*jobs\.build_cache"):
        opened(str(tmp_path / "part.arrow"))


def test_a_balanced_order_sees_small_and_large_scores_equally_often_and_forgets_none():
    scores = np.concatenate([np.linspace(0, 0.1, 90), np.linspace(0.9, 1, 10)])
    order = BalancedOrder(scores, seed=1)
    seen = [order(p) for p in range(2000)]
    assert sum(number >= 90 for number in seen) == pytest.approx(1000, abs=5)
    assert set(seen) == set(range(100))
    again = BalancedOrder(scores, seed=1)
    assert [again(p) for p in (1999, 0, 1000)] == [seen[p] for p in (1999, 0, 1000)]


def test_a_balanced_order_of_equal_scores_is_an_order():
    order = BalancedOrder(np.ones(7), seed=0)
    assert sorted(order(p) for p in range(7)) == list(range(7))
