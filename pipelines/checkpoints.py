"""Checkpoints of one training: what every rank holds (pipelines.shards), in a folder for each number of samples.

    training/ROW-FINGERPRINT/000640/rank-0-of-2.safetensors ... manifest.json

A folder without its manifest is nothing. Training stands still only while the shards are copied in memory; a thread
writes them, and the ranks' threads agree with each other before the manifest is written, by rank 0 and last.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from pipelines import storage
from pipelines.artifact import Artifact
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.shards import WEIGHTS, Shards

MANIFEST = "manifest.json"
NUMBER = re.compile(r"\d+")
LONGEST = timedelta(hours=2)  # that a rank may take longer than another to write its shard


class Writer:
    """One rank's. The folder of a checkpoint is named by the samples seen."""

    def __init__(self, folder: str, shards: Shards, keep: int) -> None:
        self.folder, self.shards, self.keep = folder, shards, keep
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Of the threads alone: their words must not come between those of the training steps.
        self._others = dist.new_group(backend="gloo", timeout=LONGEST)
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, samples: int, told: Mapping[str, Any]) -> None:
        """Returns when all is copied; what was still being written from the last time is waited for."""
        self.wait()
        ranges = {}
        for one in self.shards.ranges:
            if one.mine:
                ranges[one.name] = [one.start, one.numel]
                for kind, tensor in one.tensors.items():
                    self._copy(f"{kind}/{one.name}", tensor)
        self._writing = self._thread.submit(self._write, samples, ranges, dict(told))

    def wait(self) -> None:
        """Until the last one is whole; raises what went wrong with it."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        self._thread.shutdown()
        dist.destroy_process_group(self._others)

    def _copy(self, key: str, tensor: Tensor) -> None:
        if key not in self._copies:
            pinned = tensor.device.type == "cuda"
            self._copies[key] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        self._copies[key].copy_(tensor)

    def _write(self, samples: int, ranges: dict[str, list[int]], told: dict[str, Any]) -> None:
        folder = storage.join(self.folder, f"{samples:09d}")
        failed = ""
        try:
            with storage.creating(storage.join(folder, _shard(self.rank, self.world))) as path:
                save_file(self._copies, path, {"ranges": json.dumps(ranges)})
        except Exception as error:  # whatever it is, the other ranks wait for a word
            failed = f"rank {self.rank}: {error}"
        if problems := [problem for problem in self._all(failed) if problem]:
            raise OSError(f"the checkpoint at {folder} could not be written: {'; '.join(problems)}")
        if self.rank == 0:
            shards = [_shard(rank, self.world) for rank in range(self.world)]
            body = json.dumps(told | {"samples": samples, "shards": shards}, indent=1)
            storage.write(storage.join(folder, MANIFEST), body.encode())
            with suppress(OSError):  # the next one removes them
                self._forget()

    def _all(self, mine: str) -> list[str]:
        found: list[str] = [""] * self.world
        dist.all_gather_object(found, mine, group=self._others)
        return found

    def _forget(self) -> None:
        """All but the newest ones and the best one."""
        there = found(self.folder)
        kept = {*there[-self.keep :], best(there)}
        for folder in there:
            if folder not in kept:
                remove(folder)


def training_of(config: Config, name: str, made: Artifact) -> str:
    """Where a row's checkpoints are."""
    return storage.join(config.out, "training", f"{name}-{made.fingerprint[:8]}")


def found(folder: str) -> list[str]:
    """Whole ones, in order."""
    numbers = sorted((name for name in storage.names(folder) if NUMBER.fullmatch(name)), key=int)
    return [each for name in numbers if storage.exists(storage.join(each := storage.join(folder, name), MANIFEST))]


def best(folders: list[str]) -> str | None:
    """That of the least loss on held-out clips, if any was measured."""
    scores = {folder: score for folder in folders if (score := manifest(folder)["validation_loss"]) is not None}
    return min(scores, key=scores.__getitem__, default=None)


def manifest(folder: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(storage.read(storage.join(folder, MANIFEST)))
    return body


def remove(folder: str) -> None:
    """The manifest first: what is left of it then is nothing."""
    for name in (MANIFEST, *(name for name in storage.names(folder) if name != MANIFEST)):
        storage.remove(storage.join(folder, name))
    storage.remove_folder(folder)


class Stored(Mapping[str, Tensor]):
    """A whole checkpoint: of one kind (`weights`, `average`, ...) every parameter by its name.

    Nothing is held: each answer is read from its places in the shards, on a disk or from S3, when it is asked for.
    """

    def __init__(self, folder: str, kind: str = WEIGHTS) -> None:
        self.folder, self.told, self.kind = folder, manifest(folder), kind
        self.shapes: dict[str, list[int]] = self.told["shapes"]
        self._places: dict[tuple[str, str], list[_Place]] = {}
        for name in self.told["shards"]:
            for key, place in _places(storage.inside(folder, name)):
                self._places.setdefault(key, []).append(place)

    def of(self, kind: str) -> "Stored":
        other = copy(self)
        other.kind = kind
        return other

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.read(self.kind, name, 0, math.prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """These elements of the flat tensor, whichever shards they are in."""
        answer = torch.empty(stop - start)
        missing = stop - start
        for place in self._places[kind, name]:
            begin, end = max(start, place.start), min(stop, place.start + place.numel)
            if begin < end:
                data = storage.read_range(place.uri, place.offset + 4 * (begin - place.start), 4 * (end - begin))
                answer[begin - start : end - start] = torch.frombuffer(bytearray(data), dtype=torch.float32)
                missing -= end - begin
        if missing:
            raise UserError(
                f"{self.folder} is damaged: {missing} elements of {kind} of {name} are in none of its shards"
            )
        return answer


class _Place(NamedTuple):
    uri: str
    offset: int  # of its bytes
    start: int  # of its elements in the flat tensor
    numel: int


def _places(uri: str) -> Iterator[tuple[tuple[str, str], _Place]]:
    """What a shard holds, by its header alone (safetensors: its length in 8 bytes, JSON, then the tensors)."""
    length = int.from_bytes(storage.read_range(uri, 0, 8), "little")
    header = json.loads(storage.read_range(uri, 8, length))
    ranges = json.loads(header.pop("__metadata__")["ranges"])
    for key, told in header.items():
        kind, name = key.split("/", 1)
        start, numel = ranges[name]
        yield (kind, name), _Place(uri, 8 + length + told["data_offsets"][0], start, numel)


def _shard(rank: int, world: int) -> str:
    return f"rank-{rank}-of-{world}.safetensors"
