"""Tables in mapped files hold what tables in memory would."""

import itertools
import os
import resource
import tempfile
import time

import numpy as np
import pyarrow as pa
import pytest

from pipelines import tables
from pipelines.errors import Unfinished

SCHEMA = pa.schema({"number": pa.int64(), "text": pa.large_string()})


def table_of(numbers: range) -> pa.Table:
    return pa.table([list(numbers), [f"text {i}" if i % 3 else None for i in numbers]], SCHEMA)


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 8)


@pytest.fixture
def found() -> pa.Table:
    """Of pieces shorter and longer than what is handled at once, and of none."""
    ends = [0, 3, 3, 5, 40, 41, 64]
    return tables.spooled(SCHEMA, (table_of(range(*each)) for each in itertools.pairwise(ends)))


def test_what_is_spooled_is_the_pieces_one_behind_the_other(found):
    assert found.equals(table_of(range(64)))
    assert max(len(chunk) for chunk in found["text"].chunks) < 2 * tables.ROWS
    assert len(tables.spooled(SCHEMA, [])) == 0


def test_the_file_has_no_name_and_the_table_outlives_that(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = tables.spooled(SCHEMA, [table_of(range(20))])
    assert os.listdir(tmp_path) == []
    assert str(tmp_path) in open("/proc/self/maps").read()  # noqa: SIM115
    assert found.equals(table_of(range(20)))


@pytest.mark.parametrize("order", [[], [5], [5, 5, 63, 0], list(range(64)), list(range(64))[::-1]])
def test_rows_come_in_the_order_that_is_asked_for(found, order):
    order = np.array(order, np.uint64)
    expected = table_of(range(64)).take(order)
    assert tables.taken(found, order).equals(expected)
    pieces = list(tables.in_order(found, order))
    assert all(len(piece) <= tables.ROWS for piece in pieces)
    assert pa.concat_tables([found.slice(0, 0), *pieces]).equals(expected)


def test_a_disk_that_is_full_is_named_and_what_goes_wrong_in_the_making_is_not_its_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Unfinished, match=f"^TMPDIR={tmp_path}: rows cannot be written there .*File too large"):
            tables.spooled(SCHEMA, [table_of(range(100))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def broken():
        yield table_of(range(10))
        raise OSError("the store is away")

    with pytest.raises(OSError, match=r"^the store is away$"):
        tables.spooled(SCHEMA, broken())


def test_many_small_tables_cost_no_more_than_large_ones(monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 65536)
    one = table_of(range(1))
    begin = time.process_time()
    assert len(tables.spooled(SCHEMA, (one for _ in range(20_000)))) == 20_000
    assert time.process_time() - begin < 2  # .2 s; 14 when lengths were added up for each


def test_a_file_is_read_as_it_was_written(tmp_path, found):
    tables.write(str(tmp_path / "table"), SCHEMA, [found])
    assert pa.ipc.open_file(str(tmp_path / "table")).read_all().equals(found)
