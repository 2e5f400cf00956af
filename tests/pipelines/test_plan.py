"""Which videos stand in which part, for one catalog and for the next; and which split clips are in."""

import time

import numpy as np
import pyarrow as pa
import pytest

from pipelines.cache import _split_together, hashes_of, part_names, plan_parts
from pipelines.catalog import read_catalog
from pipelines.config import CatalogConfig


def rows(*numbers: int) -> np.ndarray:
    """Hashes of rows, in the order of a catalog."""
    return np.array([n * 0xD6E8FEB86659FD93 % 2**64 for n in numbers], np.uint64)


def parts(plan: pa.Table) -> dict[str, set[int]]:
    """Of each part its rows' places in the catalog."""
    names, part = part_names(plan), plan["part"].to_numpy()
    assert len(set(names)) == len(names)
    assert set(part.tolist()) <= set(range(len(names)))
    return {name: set(np.flatnonzero(part == i).tolist()) for i, name in enumerate(names)}


def members(plan: pa.Table) -> dict[str, frozenset[int]]:
    """Of each part its rows' hashes."""
    hashes = plan["hash"].to_numpy()
    return {name: frozenset(hashes[sorted(mine)].tolist()) for name, mine in parts(plan).items()}


# -- one catalog -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4])])
def test_every_row_is_in_one_part_and_parts_are_as_large_as_asked(count, sizes):
    plan = plan_parts(rows(*range(count)), None, 4)
    found = list(parts(plan).values())
    assert [len(mine) for mine in found] == sizes
    assert sorted(row for mine in found for row in mine) == list(range(count))


def test_a_part_is_named_by_its_members_alone():
    forwards, backwards = (plan_parts(rows(*order), None, 4) for order in ((1, 2, 3, 4, 5), (4, 3, 1, 2, 5)))
    assert members(forwards) == members(backwards)
    alone = plan_parts(rows(5), None, 100)
    assert part_names(alone) == part_names(forwards)[1:]
    other = plan_parts(rows(1, 2, 3, 6), None, 4)
    assert part_names(other)[0] != part_names(forwards)[0]


def test_an_empty_catalog_has_no_parts_and_can_grow():
    empty = plan_parts(rows(), None, 4)
    assert (len(empty), part_names(empty)) == (0, [])
    assert parts(plan_parts(rows(1, 2), empty, 4)) == parts(plan_parts(rows(1, 2), None, 4))
    assert part_names(plan_parts(rows(), plan_parts(rows(1, 2), None, 4), 4)) == []


# -- the next ----------------------------------------------------------------------------------------------------------


def test_a_longer_catalog_keeps_the_parts_and_puts_new_rows_into_new_ones():
    before = plan_parts(rows(*range(0, 20, 2)), None, 4)
    after = plan_parts(rows(*range(20)), before, 4)
    new = {name: mine for name, mine in members(after).items() if name not in members(before)}
    assert members(before).items() <= members(after).items()
    assert set().union(*new.values()) == set(rows(*range(1, 20, 2)).tolist())
    assert sorted(map(len, new.values())) == [2, 4, 4]
    assert sorted(row for mine in parts(after).values() for row in mine) == list(range(20))


def test_the_same_catalog_in_another_order_is_the_same_plan():
    before = plan_parts(rows(*range(10)), None, 4)
    assert members(plan_parts(rows(*range(9, -1, -1)), before, 4)) == members(before)


@pytest.mark.parametrize("after", [(0, 1, 2, 3, 4, 6, 7, 8), (0, 1, 2, 3, 4, 99, 6, 7, 8)], ids=["removed", "changed"])
def test_a_row_that_is_gone_dissolves_its_part_and_no_other(after):
    before = plan_parts(rows(0, 1, 2, 3, 4, 5, 6, 7, 8), None, 4)
    first, second, third = part_names(before)
    plan = plan_parts(rows(*after), before, 4)
    assert {first, third} < set(part_names(plan))
    assert second not in part_names(plan)
    (name,) = set(part_names(plan)) - {first, third}
    assert members(plan)[name] == set(rows(*after).tolist()) & set(rows(4, 99, 6, 7).tolist())
    assert len(plan) == len(after)


def test_plans_of_plans_keep_what_all_have_in_common():
    first = plan_parts(rows(*range(8)), None, 4)
    second = plan_parts(rows(*range(14)), first, 4)
    third = plan_parts(rows(*range(1, 30)), second, 4)
    kept = part_names(first)[1:] + [name for name in part_names(second) if name not in part_names(first)]
    assert set(kept) < set(part_names(third))
    assert part_names(first)[0] not in part_names(third)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_rows_that_say_the_same_are_told_apart(count):
    """Duplicates are rejected each in its part: a part must not win or lose any when the catalog changes."""
    catalog = [7, *[1] * count, 3]
    before = plan_parts(rows(*catalog), None, 2)
    assert [len(mine) for mine in parts(before).values()] == [2] * (len(catalog) // 2) + [1] * (len(catalog) % 2)
    assert len(set(before["hash"].to_pylist())) == len(catalog)
    assert members(plan_parts(rows(*catalog), before, 2)) == members(before)
    more = plan_parts(rows(*catalog, 1, 9), before, 2)
    assert members(before).items() < members(more).items()
    assert sorted(map(len, parts(more).values()))[-1] == 2
    fewer = plan_parts(rows(7, *[1] * (count - 1), 3), before, 2)
    assert sorted(row for mine in parts(fewer).values() for row in mine) == list(range(len(catalog) - 1))
    assert all(members(before)[name] == mine for name, mine in members(fewer).items() if name in members(before))


def test_a_million_rows_are_planned_and_extended_in_seconds():
    hashes = np.random.default_rng(0).integers(0, 2**64, 1_100_000, np.uint64)
    start = time.process_time()
    before = plan_parts(hashes[:1_000_000], None, 100)
    after = plan_parts(hashes, before, 100)
    seconds = time.process_time() - start
    assert len(part_names(after)) == 11_000
    assert part_names(after)[:10_000] == part_names(before)
    assert seconds < 10  # about 1.5 on an idle core


# -- what a row's hash is of -------------------------------------------------------------------------------------------


def catalog(folder, text: str, **told):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "v.csv").write_text(text)
    return read_catalog(CatalogConfig(csv=f"{folder}/v.csv", videos=str(folder), **told), "")


def test_a_rows_hash_is_not_of_where_its_file_lies(tmp_path):
    one = catalog(tmp_path / "a", "videoid,name\n1,a dog\n2,a cat\n")
    moved = catalog(tmp_path / "b", "videoid,page_dir,name\n1,p/q,a dog\n2,,a cat\n")
    assert np.array_equal(hashes_of(one), hashes_of(moved))
    more = catalog(tmp_path / "c", "videoid,name\n0,a bird\n1,a dog\n2,a cat\n")
    assert np.array_equal(hashes_of(one), hashes_of(more)[1:])


@pytest.mark.parametrize("changed", ["1,a wolf\n2,a cat\n", "3,a dog\n2,a cat\n", "1,a dog\n1,a dog\n2,a cat\n"])
def test_a_rows_hash_is_of_its_id_its_caption_and_what_is_wrong_with_it(tmp_path, changed):
    one, other = (catalog(tmp_path, f"videoid,name\n{text}") for text in ("1,a dog\n2,a cat\n", changed))
    assert len(set(hashes_of(other).tolist()) - set(hashes_of(one).tolist())) == 1
    assert set(hashes_of(one).tolist()) & set(hashes_of(other).tolist())


# -- near-duplicates in one split --------------------------------------------------------------------------------------


def split_of_each(*clips: tuple[str, str, int]) -> list[str]:
    """After near-duplicates are brought together. A clip: videoid, the split that was drawn, hash."""
    videos, splits, hashes = zip(*clips, strict=True)
    index = pa.table({"videoid": videos, "split": splits, "hash": pa.array(hashes, pa.uint64())})
    return _split_together(index).to_pylist()


A, B, C, D = 1 << 63, (1 << 63) | 0b111, (1 << 63) | 0b111111, 0x7FFF_0000_FFFF_0000  # three bits from one to the next


def test_videos_with_a_near_duplicate_in_common_are_in_the_split_of_the_first():
    assert split_of_each(("1", "test", A), ("2", "train", D), ("3", "train", B)) == ["test", "train", "test"]
    assert split_of_each(("1", "train", B), ("2", "validation", D), ("3", "test", B)) == [
        "train",
        "validation",
        "train",
    ]


def test_a_chain_of_near_duplicates_is_in_one_split():
    assert split_of_each(("1", "train", A), ("2", "test", C), ("3", "validation", B)) == ["train"] * 3
    assert split_of_each(("1", "train", A), ("2", "test", C)) == ["train", "test"]


def test_all_clips_of_a_video_go_with_the_one_that_has_a_duplicate():
    found = split_of_each(
        ("1", "test", A), ("2", "train", D), ("2", "train", A), ("3", "train", D ^ 1), ("4", "train", C)
    )
    assert found == ["test", "test", "test", "test", "train"]


def test_a_chain_over_videos_is_followed_to_its_end():
    random = np.random.default_rng(0).integers(2**63, 2**64, 40, np.uint64).tolist()  # far apart
    chain = [[("test" if i == 0 else "train", random[i + k]) for k in (0, 1)] for i in range(39)]
    order = np.random.default_rng(1).permutation(38) + 1
    for numbers, split in (([0, *order], "test"), ([*order, 0], "train")):
        clips = [(f"{place}", *clip) for place, number in enumerate(numbers) for clip in chain[number]]
        assert set(split_of_each(*clips)) == {split}


def test_pictures_without_a_hash_tie_nobody():
    assert split_of_each(("1", "train", 0), ("2", "test", 0), ("3", "test", 1)) == ["train", "test", "test"]


def test_a_cache_of_nothing_has_no_splits():
    nothing = pa.table(
        {"videoid": pa.array([], pa.string()), "split": pa.array([], pa.string()), "hash": pa.array([], pa.uint64())}
    )
    assert _split_together(nothing).to_pylist() == []
