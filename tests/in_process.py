"""What is tested elsewhere and takes seconds to start is left out: Ray, decode processes, a process for each job."""

import json
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict

import pytest
import torch

from pipelines import storage
from pipelines.decoding import Decoded
from pipelines.parts import _PartWriter
from pipelines.video import fit


def run_job(name: str, *arguments: str) -> None:
    """`python -m jobs.NAME ...` in this process, so that the next one finds Ray and what is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [name, *arguments])
        patch.delitem(sys.modules, f"jobs.{name}", raising=False)  # runpy warns of one that is there
        try:
            runpy.run_module(f"jobs.{name}", run_name="__main__")
        finally:  # as each process of a job takes them for itself
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Here:
    """Takes the place of Ray: makes the parts that are asked for in this process."""

    def __init__(self) -> None:
        self.made: list[str] = []  # names of files
        self.told: dict[str, Counter] = {}  # what makers told, by stage

    def make_parts(self, label, unit, parts, maker, arguments, gpus=0, note=None) -> list[str]:
        missing = [part for part in parts if not storage.exists(part.uri)]
        if not missing:
            return []
        writer, problems = _PartWriter(maker, arguments), []
        told, done = Counter(), sum(part.size for part in parts) - sum(part.size for part in missing)
        for part in missing:
            self.made.append(part.uri.rsplit("/", 1)[1])
            row = writer(asdict(part))
            problems.append(row["problem"] or row["failed"])
            self.told.setdefault(label, Counter()).update(json.loads(row["told"]))
            if note and not problems[-1]:
                told.update(json.loads(row["told"]))
                done += row["size"]
                note(done, told)
        return [problem for problem in problems if problem]


class DecodeHere:
    """Takes the place of DecodePool: no process is started."""

    busy = 0.0

    def __init__(self, decoder, seconds, processes=1, most=None) -> None:
        self._decoder = decoder

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def close(self) -> None:
        pass

    def __call__(self, data, wanted, height=None, width=None, crop=None) -> Decoded:
        video = self._decoder(data)
        indices = list(wanted(video.count, video.fps))
        pictures = video.frames(indices)
        frames = torch.from_numpy(pictures) if height is None else fit(pictures, height, width, crop)
        return Decoded(frames, indices, video.count, video.fps)

    def ahead(self, function, items) -> Iterator[Future]:
        for item in items:
            future = Future()
            try:
                future.set_result(function(item))
            except Exception as error:
                future.set_exception(error)
            yield future


def instead_of_ray(monkeypatch: pytest.MonkeyPatch) -> Here:
    ours = Here()
    for module in ("clips", "scorer"):
        monkeypatch.setattr(f"pipelines.{module}.DecodePool", DecodeHere)
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("pipelines.cluster.connect", lambda: None)
    monkeypatch.setattr("pipelines.cluster.refuse_unseen", lambda files: None)
    for module in ("cache", "initial_noise", "generate", "score", "leakage"):
        monkeypatch.setattr(f"pipelines.{module}.make_parts", ours.make_parts)
    return ours
