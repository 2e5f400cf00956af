"""Training's reading of one rank, shuffled, batches of 4: from a disk whose pages are in memory, and from S3.

    python -m benchmarks.read

A cache of 1,500 clips of 16 x 320 x 512 with their captions' tensors, 0.6 GB, made of random numbers by the functions
that make parts. On the disk, against a memmap of the same clips in the same order, a row of it one clip: mapped anew
for each epoch, as no cache of real size is mapped when its clips' turn comes; and, shown without a goal, one of which
every page is mapped and touched already, which is a copy from memory to memory.

From S3 by an index of ten million clips, which cite those 1,500 in turn; an answer takes 30 ms longer than it needs to
(benchmarks.endpoint; the limit is what plain HTTP gets of it by 16 requests at a time). The index is on the
machine already, as after a job's first run. The time to the first batch begins with opening the reader, with a filter,
in a new process that has imported everything. Its memory is the largest it ever held, pages of the index included.
"""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import Row, alternately, main, paired
from benchmarks.endpoint import ROOT, served
from benchmarks.random_cache import SHAPE, enlarge, written
from pipelines.artifact import read_manifest
from pipelines.cache import SNAPSHOT, Cache
from pipelines.reader import ClipReader, SampleOrder

BATCH = 4
DELAY, AT_ONCE = 0.03, 16
WHERE = {"motion": (0.1, None)}
GIB = 2**30


def measure(quick: bool) -> list[Row]:
    videos, million = (100, 1) if quick else (750, 10)
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        cache = written(folder, videos)
        rows = [*from_disk(cache, Path(folder, "memmap"), rounds=3 if quick else 5)]
        enlarge(cache, million * 10**6)
        with served(folder, DELAY) as port:
            program = f"from benchmarks.read import from_s3; from_s3({folder!r}, {100 if quick else 600})"
            command, own = [sys.executable, "-c", program], os.environ | {"XDG_CACHE_HOME": f"{folder}/kept"}
            for _ in range(2):  # the first one copies the index to this machine
                done = subprocess.run(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, text=True, check=True)
            told = json.loads(done.stdout.splitlines()[-1])
            limit = plain_http(port, cache, 600 if quick else 2000)
    name = f"read: S3 + 30 ms, {million} million clips"
    return [
        *rows,
        Row(f"{name}: 50 MB/s", told["rate"], 50, limit, "MB/s", told["rate"] / 50, 1.0),
        Row(f"{name}: open", told["open"], 5, None, "s", 5 / told["open"]),
        Row(f"{name}: first batch", told["first"], 5, None, "s", 5 / told["first"], 1.0),
        Row(f"{name}: peak memory", told["peak"], 1, None, "GiB", 1 / told["peak"], 1.0),
    ]


def from_disk(cache: Cache, path: Path, rounds: int) -> list[Row]:
    reader = ClipReader(cache, "train")
    size = sum(t[0].numel() * t.element_size() for t in tensors(reader.batch([0])))
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (len(reader), size // 2))
    for number in range(len(reader)):
        rows[number] = torch.cat([t.flatten() for t in tensors(reader.batch([number]))]).numpy()
    order = SampleOrder(len(reader), seed=0)
    batches = [
        [order(p) for p in range(begin, begin + BATCH)] for begin in range(0, len(reader) // BATCH * BATCH, BATCH)
    ]

    def ours() -> None:
        assert sum(len(batch["latents"]) for batch in reader.ahead(batches)) == BATCH * len(batches)

    def memmap(rows: np.ndarray) -> None:
        for numbers in batches:
            torch.from_numpy(rows[numbers])

    calls = ours, lambda: memmap(np.load(path, mmap_mode="r")), lambda: memmap(rows)
    mine, anew, touched = alternately(*calls, rounds=rounds)
    rate, *rates = (len(batches) * BATCH * size / 1e6 / float(np.median(times)) for times in (mine, anew, touched))
    return [
        Row("read: memmap", rate, rates[0], None, "MB/s", paired(anew, mine), 0.45),
        Row("read: memmap, touched before", rate, rates[1], None, "MB/s", paired(touched, mine)),
    ]


def tensors(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [batch["latents"], batch["text"]]


# -- from S3 ---------------------------------------------------------------------------------------------------------


def from_s3(folder: str, batches: int) -> None:
    """In a process of its own."""
    manifest = read_manifest("s3://all/cache/snapshots/large", SNAPSHOT)
    begin = time.perf_counter()
    reader = ClipReader(Cache("s3://all/cache", manifest), "train", WHERE)
    opened_after = time.perf_counter() - begin
    order = SampleOrder(len(reader), seed=0)
    wanted = ([order(BATCH * i + k) for k in range(BATCH)] for i in range(batches + 1))
    coming = reader.ahead(wanted)
    size = sum(t.numel() * t.element_size() for t in tensors(next(coming)))
    first = time.perf_counter() - begin
    assert sum(len(batch["latents"]) for batch in coming) == BATCH * batches
    seconds = time.perf_counter() - begin - first
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 / GIB for line in status if line.startswith("VmHWM"))
    print(json.dumps({"open": opened_after, "first": first, "rate": batches * size / 1e6 / seconds, "peak": peak}))


def plain_http(port: int, cache: Cache, requests: int) -> float:
    """MB/s of ranges as long as one clip's latents."""
    size, mine = 2 * int(np.prod(SHAPE)), threading.local()

    def get(number: int) -> None:
        if not hasattr(mine, "connection"):
            mine.connection = http.client.HTTPConnection("127.0.0.1", port)
        part = cache.parts[number % len(cache.parts)]
        begin = part["tensors"]["latents"]["offset"] + number % part["clips"] * size
        headers = {"Range": f"bytes={begin}-{begin + size - 1}"}
        mine.connection.request("GET", f"/all/cache/parts/{part['name']}.arrow", headers=headers)
        assert len(mine.connection.getresponse().read()) == size

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(get, range(AT_ONCE)))
        begin = time.perf_counter()
        list(pool.map(get, range(requests)))
        return requests * size / 1e6 / (time.perf_counter() - begin)


if __name__ == "__main__":
    main(__doc__, measure)
