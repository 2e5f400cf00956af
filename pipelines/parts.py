"""An artifact made in parts over Ray Data: each part a file, whole or absent, whose content is a function of the plan.

What a killed run left is found by its name; only the parts that are missing are made. A part that two workers make at
once has the same bytes, so nobody needs a lock: each run has an order of its own, and passes over what others made.
"""

import errno
import json
import posixpath
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from pipelines import cluster, metrics, storage
from pipelines.errors import Unfinished, shown
from pipelines.progress import Progress

# What no other part would fare better with: a disk that is full, rights that are missing, a bucket that is not there.
LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
IN_A_ROW = 8  # parts that fail one after the other, beside one of each worker: more are no accident


@dataclass(frozen=True)
class Part:
    uri: str  # of the file
    plan: Any  # what the maker needs to know
    size: int  # in the unit that progress counts


class Made(NamedTuple):
    data: bytes | None  # of the file
    problem: str = ""  # why there is none
    told: Mapping[str, float] = {}  # figures that are added up for the line of progress


class Maker(Protocol):
    """Made once a worker, then called with a part's plan."""

    def __call__(self, plan: Any) -> Made: ...


def make_parts(
    label: str,
    unit: str,
    parts: list[Part],
    maker: Callable[..., Maker],
    arguments: dict[str, Any],
    gpus: float = 0,
    note: Callable[[int, Counter[str]], str] = lambda done, told: "",
) -> list[str]:
    """Have every part made that is not there yet. Answers what the makers said of parts that they could not make.

    A worker has a CPU, and `gpus` of a GPU. `note` words how much is done, and the sums of what makers told. Files that
    cannot be read or written are Unfinished: at once where that lasts, else when all others are made or part after part
    has failed.
    """
    import ray

    folders = {posixpath.dirname(part.uri) for part in parts}
    there = {storage.join(folder, name) for folder in folders for name in storage.names(folder)}
    missing = [part for part in parts if part.uri not in there]
    total = sum(part.size for part in parts)
    done = total - sum(part.size for part in missing)
    if not missing:
        return []
    if done:
        print(f"{label}: {done} of {total} {unit} are there already", flush=True)
    progress = Progress(label, unit, total, done)
    cluster.connect()
    cluster.refuse_unshared(posixpath.dirname(missing[0].uri))
    # Several runs at once begin at other places; neighbours stay together, as a worker may keep what they share.
    begin = random.randrange(len(missing))
    missing = missing[begin:] + missing[:begin]
    workers = min(cluster.workers(gpus), len(missing))
    made = ray.data.from_items([asdict(part) for part in missing], override_num_blocks=len(missing)).map(
        _PartWriter,  # type: ignore[arg-type]  # Ray takes a class as well
        fn_constructor_args=(maker, arguments),
        compute=ray.data.ActorPoolStrategy(min_size=workers, max_size=len(missing)),  # more where nodes come
        num_cpus=1,
        num_gpus=gpus or None,
    )
    problems: list[str] = []
    failed: list[str] = []
    told, in_a_row, heard = Counter[str](), 0, set[str]()
    blocks = made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)  # each row when it is there
    for row in (row for block in blocks for row in block.to_pylist()):  # type: ignore[union-attr]
        heard.add(row["worker"])
        if problem := row["problem"] or row["failed"]:
            if not problems + failed:
                print(f"{label}: {shown(problem)}; tried again by the next run", flush=True)
            (failed if row["failed"] else problems).append(problem)
            in_a_row += 1
            if row["lasting"]:
                raise Unfinished(f"{label} stopped: {problem}. What is made stays; the same command goes on from there")
            if in_a_row > max(workers, len(heard)) + IN_A_ROW:
                print(f"{label}: stops, as {in_a_row} parts in a row could not be made", flush=True)
                break
            continue
        in_a_row = 0
        counted = json.loads(row["told"])
        told.update(counted)
        metrics.count(label, counted)
        progress.advance(row["size"], note(progress.done + row["size"], told))
    if failed:
        raise Unfinished(f"{label}: {len(failed)} parts are missing ({failed[0]}). Run the same command again")
    return problems


class _PartWriter:
    def __init__(self, maker: Callable[..., Maker], arguments: dict[str, Any]) -> None:
        self._make = maker(**arguments)
        self._known_by = uuid.uuid4().hex

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        made, failed, lasting = Made(None), "", False
        try:
            if not storage.exists(part["uri"]):  # of another run by now
                made = self._make(part["plan"])
            if made.data is not None:
                storage.write(part["uri"], made.data)
        except OSError as error:
            failed = " ".join(f"{part['uri']}: {error}".split())
            lasting = error.errno in LASTING or isinstance(error, PermissionError | FileNotFoundError)
            with suppress(OSError):
                if isinstance(error, FileNotFoundError) and storage.exists(part["uri"]):  # a faster run has tidied up
                    failed, lasting = "", False
        return {
            "worker": self._known_by,
            "size": part["size"],
            "problem": made.problem,
            "failed": failed,
            "lasting": lasting,
            "told": json.dumps(made.told),
        }


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
