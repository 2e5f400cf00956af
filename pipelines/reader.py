"""Clips of a finished cache by number, and the endless order in which training sees them.

What is known of clips comes from the snapshot's index, which is mapped into memory; their tensors are read when they
are asked for, from the place in a part's file that the index tells: of ten million clips as of ten.
"""

import itertools
import math
import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipelines import storage
from pipelines.cache import Cache
from pipelines.config import Score, Where
from pipelines.errors import UserError

SCORES = get_args(Score)
OPEN = 256  # files of parts
CHUNKS = 8  # sizes of a score that a balanced order tells apart


class ClipReader:
    """The clips of one split with scores in the ranges of `where`, numbered in the order of their ids."""

    def __init__(self, cache: Cache, split: str | None, where: Where | None = None) -> None:
        self._cache = cache
        self._parts, self._local = cache.parts, storage.is_local(cache.uri)
        self.index = cache.index()
        self.rows = np.flatnonzero(selected(self.index, split, where or {}))
        self._part, self._row, self._place = (
            self.index[name].to_numpy()[self.rows] for name in ("part", "row", "place")
        )
        self._frame = self.index["frame"].to_numpy()[self.rows]
        self._files: OrderedDict[int, int] = OrderedDict()
        self._pool = ThreadPoolExecutor(storage.AT_ONCE)

    def __len__(self) -> int:
        return len(self.rows)

    def known(self, number: int) -> dict[str, Any]:
        """Of a clip, all but its tensors."""
        told: dict[str, Any] = self.index.slice(self.rows[number], 1).to_pylist()[0]
        return told

    def values(self, column: str) -> np.ndarray:
        """Of all clips."""
        return _values(self.index, column)[self.rows]

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Every tensor of these clips, [B, ...], and `frame`, which of their frames is the conditional image."""
        batch, wanted = {}, []
        for name, told in self._parts[self._part[numbers[0]]]["tensors"].items():
            dtype = getattr(torch, told["dtype"])
            size = math.prod(told["shape"]) * dtype.itemsize
            held = np.empty(len(numbers) * size, np.uint8)  # numpy asks the kernel for huge pages, torch does not
            batch[name] = torch.from_numpy(held).view(dtype).view(len(numbers), *told["shape"])
            memory = held.data
            wanted += [(name, number, memory[i * size : (i + 1) * size]) for i, number in enumerate(numbers)]
        if self._local:
            for one in wanted:
                self._fill(*one)
        else:
            list(self._pool.map(lambda one: self._fill(*one), wanted))
        return batch | {"frame": torch.from_numpy(self._frame[numbers])}

    def ahead(self, batches: Iterable[Sequence[int]], depth: int = 2) -> Iterator[dict[str, Tensor]]:
        """Batches in order, the next ones read while one is used: from S3, so many that enough requests are made."""
        threads = 1
        if not self._local and len(self):
            batches = iter(batches)
            first = list(itertools.islice(batches, 1))
            requests = sum(len(numbers) for numbers in first) * len(self._parts[self._part[0]]["tensors"])
            threads = depth = max(depth, math.ceil(storage.AT_ONCE / max(requests, 1)) + 1)
            batches = itertools.chain(first, batches)
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[dict[str, Tensor]]] = deque()
            for numbers in batches:
                waiting.append(pool.submit(self.batch, numbers))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _fill(self, name: str, number: int, memory: memoryview) -> None:
        part = int(self._part[number])
        told = self._parts[part]["tensors"][name]
        place = self._row[number] if told["by"] == "row" else self._place[number]
        begin = told["offset"] + int(place) * len(memory)
        uri = self._cache.path(self._parts[part]["name"])
        if self._local:
            found = os.preadv(self._file(part), [memory], begin)
        else:
            data = storage.read_range(uri, begin, len(memory))
            found = len(data)
            memory[:found] = data
        if found != len(memory):
            raise OSError(
                f"{uri} is shorter than its index says; jobs.show_cache show_cache.verify=true says what to do"
            )

    def _file(self, part: int) -> int:
        if part in self._files:
            self._files.move_to_end(part)
            return self._files[part]
        if len(self._files) >= OPEN:
            os.close(self._files.popitem(last=False)[1])
        self._files[part] = os.open(self._cache.path(self._parts[part]["name"]), os.O_RDONLY)
        return self._files[part]


def selected(index: pa.Table, split: str | None, where: Where) -> np.ndarray:
    """Which rows of an index are of the split and have these scores: both ends of a range belong to it."""
    mask = np.ones(len(index), bool) if split is None else pc.equal(index["split"], split).to_numpy()
    for score, (least, most) in where.items():
        values = _values(index, score)
        mask = mask & (values >= (-np.inf if least is None else least)) & (values <= (np.inf if most is None else most))
    return mask


def scored(index: pa.Table, score: str) -> bool:
    """Of one score, a cache has all or none: what it is made by is part of its identity."""
    return score in index.column_names and not index[score].null_count


def _values(index: pa.Table, column: str) -> np.ndarray:
    if not scored(index, column):
        raise UserError(
            f"no clip of this cache has a score `{column}`: build one, in another `out`, with "
            "cache.aesthetic.head and cache.aesthetic.clip"
        )
    values: np.ndarray = index[column].to_numpy()
    return values


class SampleOrder:
    """Position in the endless stream -> number of a clip: a new permutation each epoch, a function of (seed, epoch)."""

    def __init__(self, clips: int, seed: int) -> None:
        self.clips, self.seed = clips, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.clips)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.clips)
            self._epoch = epoch
        return int(self._permutation[place])


class BalancedOrder:
    """The same, where clips of every size of a score are seen equally often: small ones come again more often.

    Sizes are equal steps of the score between its 1st and its 99th percentile.
    """

    def __init__(self, scores: np.ndarray, seed: int) -> None:
        low, high = np.percentile(scores, [1, 99])
        sizes = np.clip(((scores - low) / max(high - low, 1e-12) * CHUNKS).astype(int), 0, CHUNKS - 1)
        self._groups = [group for size in range(CHUNKS) if len(group := np.flatnonzero(sizes == size))]
        self._orders = [SampleOrder(len(group), seed + 1 + i) for i, group in enumerate(self._groups)]
        self._turns = SampleOrder(len(self._groups), seed)

    def __call__(self, position: int) -> int:
        group = self._turns(position)
        return int(self._groups[group][self._orders[group](position // len(self._groups))])


def lanes(start: int, batch: int, rank: int, world: int) -> list[int]:
    """The positions of rank r in the batch that starts at `start`: r, r + W, ..."""
    return list(range(start + rank, start + batch, world))
