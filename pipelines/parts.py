"""An artifact made in parts over Ray Data: each part a file, whole or absent, whose content is a function of the plan.

What a killed run left is found by its name; only the parts that are missing are made. A part that two workers make at
once has the same bytes, so nobody needs a lock.
"""

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from pipelines import cluster, storage
from pipelines.progress import Progress


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
    note: Callable[[Counter[str]], str] = lambda told: "",
) -> list[str]:
    """Have every part made that is not there yet. Answers what the makers said of parts that they could not make.

    A worker has a CPU, and `gpus` of a GPU. `note` words the sums of what they tell.
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
    made = ray.data.from_items([asdict(part) for part in missing], override_num_blocks=len(missing)).map(
        _PartWriter,  # type: ignore[arg-type]  # Ray takes a class as well
        fn_constructor_args=(maker, arguments),
        compute=ray.data.ActorPoolStrategy(size=min(cluster.workers(gpus), len(missing))),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    problems, told = [], Counter[str]()
    for row in made.iter_rows():
        if row["problem"]:
            problems.append(row["problem"])
        told.update(json.loads(row["told"]))
        progress.advance(row["size"], note(told))
    return problems


class _PartWriter:
    def __init__(self, maker: Callable[..., Maker], arguments: dict[str, Any]) -> None:
        self._make = maker(**arguments)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        made = self._make(part["plan"])
        if made.data is not None:
            storage.write(part["uri"], made.data)
        return {"size": part["size"], "problem": made.problem, "told": json.dumps(made.told)}


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
