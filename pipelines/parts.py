"""An artifact made in parts over Ray Data: each part a file, whole or absent, whose content is a function of the plan.

What a killed run left is found by its name; only the parts that are missing are made. A part that two workers make at
once has the same bytes, so nobody needs a lock.
"""

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pipelines import cluster, storage
from pipelines.progress import Progress


@dataclass(frozen=True)
class Part:
    uri: str  # of the file
    plan: Any  # what the maker needs to know
    size: int  # in the unit that progress counts


class Maker(Protocol):
    """Made once a worker, then called with a part's plan; answers its bytes, or None and why it cannot be made."""

    def __call__(self, plan: Any) -> tuple[bytes | None, str]: ...


def make_parts(
    label: str,
    unit: str,
    parts: list[Part],
    maker: Callable[..., Maker],
    arguments: dict[str, Any],
    gpus: float = 0,
) -> list[str]:
    """Have every part made that is not there yet. Answers what the makers said of parts that they could not make.

    A worker has a CPU, or `gpus` of a GPU.
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
    problems = []
    for row in made.iter_rows():
        if row["problem"]:
            problems.append(row["problem"])
        progress.advance(row["size"])
    return problems


class _PartWriter:
    def __init__(self, maker: Callable[..., Maker], arguments: dict[str, Any]) -> None:
        self._make = maker(**arguments)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        data, problem = self._make(part["plan"])
        if data is not None:
            storage.write(part["uri"], data)
        return {"size": part["size"], "problem": problem}


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
