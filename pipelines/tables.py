"""Tables of more rows than memory should hold: mapped files, of which the kernel keeps what it has room for."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from pipelines.errors import Unfinished

ROWS = 65536  # in memory at once


def write(path: str, schema: pa.Schema, tables: Iterable[pa.Table], known_as: str = "") -> None:
    """One behind the other, as an Arrow file in batches of about ROWS."""
    with _written_to(known_as or path):
        writer = pa.ipc.new_file(path, schema)
    for batch in _of_size(batch for table in tables for batch in table.to_batches(max_chunksize=ROWS)):
        with _written_to(known_as or path):
            writer.write_batch(batch)
    with _written_to(known_as or path):
        writer.close()


@contextmanager
def _written_to(place: str) -> Iterator[None]:
    """What goes wrong in the making of tables is not the fault of the place."""
    try:
        yield
    except OSError as error:
        raise Unfinished(
            f"{place}: rows cannot be written there ({error}); make room, and run the same command again"
        ) from None


def _of_size(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += len(batch)
        if rows >= ROWS:
            yield pa.concat_batches(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def spooled(schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Table:
    """One behind the other, in a file that has no name: it is gone with the table, or with the process."""
    with tempfile.TemporaryFile() as file:
        path = f"/proc/self/fd/{file.fileno()}"
        write(path, schema, tables, f"TMPDIR={tempfile.gettempdir()}")
        return pa.ipc.open_file(pa.memory_map(path)).read_all()


def in_order(table: pa.Table, order: np.ndarray) -> Iterator[pa.Table]:
    """The rows of these numbers, ROWS at a time."""
    batches = table.to_batches()
    for start in range(0, len(order), ROWS):
        yield _taken(batches, order[start : start + ROWS])


def taken(table: pa.Table, order: np.ndarray) -> pa.Table:
    """table.take(order), which would first copy each column whole."""
    return _taken(table.to_batches(), order) if len(order) else table.slice(0, 0)


def _taken(batches: list[pa.RecordBatch], order: np.ndarray) -> pa.Table:
    begins = np.cumsum([0, *map(len, batches)])
    order = order.astype(np.int64)  # Arrow numbers rows without a sign
    by = np.argsort(order, kind="stable")
    ascending, back = order[by], np.empty_like(by)
    back[by] = np.arange(len(by))
    ends = np.searchsorted(ascending, begins)
    touched = np.flatnonzero(np.diff(ends))
    pieces = [batches[i].take(pa.array(ascending[ends[i] : ends[i + 1]] - begins[i])) for i in touched]
    return pa.Table.from_batches(pieces).combine_chunks().take(back)
