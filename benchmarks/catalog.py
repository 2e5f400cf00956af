"""What the driver of a build does alone: planning a catalog, and finishing a snapshot whose parts are all made.

    python -m benchmarks.catalog

A csv as WebVid's, of 800,000 rows, against one of 200,000: the same rate is linear time. In CPU seconds of processes of
their own, whose imports do not count. Planning is build_cache up to where workers would start; then the parts' indexes
are written as fast as can be, every twentieth video a reject, and finishing is build_cache again. Memory is what a row
adds to the most that the process holds beside mapped files, of which the kernel keeps what it has room for. Last,
parts handed out by Ray Data to two workers who have nothing to do, four times as many against as many.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa

from benchmarks import Row, main
from pipelines import cache, storage, tables
from pipelines.catalog import Catalog, read_catalog
from pipelines.clips import CLIP, to_ipc
from pipelines.config import Config, load
from pipelines.parts import Made, Part, make_parts

ROOT = Path(__file__).parents[1]
SETTINGS = ("family.preset=tiny", "family.height=16", "family.width=16", "family.frames=4", "cache.views_per_video=1")
MOST = 300  # bytes of memory a row: about what the row itself has
REJECTED = 20  # each so many-th video


def measure(quick: bool) -> list[Row]:
    large = 280_000 if quick else 800_000
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        small = stages(Path(folder, "small"), large // 4)
        told = stages(Path(folder, "large"), large)
        parts = [handed_out(Path(folder, str(number)), number) for number in (large // 4800, large // 1200)]
    rows = []
    for stage, name in (("plan", "planned"), ("finish", "finished")):
        ours, peer = (rows_ / each[stage]["seconds"] for rows_, each in ((large, told), (large // 4, small)))
        rows.append(Row(f"catalog: {name}", ours, peer, None, "rows/s", ours / peer, 0.67))
    for stage, name in (("plan", "planning"), ("finish", "finishing")):
        added = a_row(small[stage]["peak"], told[stage]["peak"], large)
        rows.append(Row(f"catalog: memory of {name}", added, MOST, None, "bytes a row", MOST / max(added, 1), 1.0))
    rows.append(Row("catalog: parts handed out", parts[1], parts[0], None, "parts/s", parts[1] / parts[0], 0.67))
    return rows


def a_row(small: float, large: float, rows: int) -> float:
    """Bytes, by the peaks of so many rows and of a quarter of them."""
    return (large - small) / (rows - rows // 4)


def stages(folder: Path, rows: int) -> dict[str, dict[str, float]]:
    write_csv(folder, rows)
    planned = in_process("plan", folder)
    write_parts(config_of(folder))
    return {"plan": planned, "finish": in_process("finish", folder)}


def config_of(folder: Path) -> Config:
    catalog = [f"catalog.csv={folder}/videos.csv", f"catalog.videos={folder}"]
    return load(None, [f"out={folder}/out", *catalog, *SETTINGS])


def write_csv(folder: Path, rows: int) -> None:
    """Each as long as one of WebVid's."""
    folder.mkdir(parents=True)
    address = "https://videos.example.com/{0}/preview/stock-footage-{0}.mp4"
    caption = "Video {0} shows somebody who walks along a beach at sunset while waves come in, 4k and slow motion"
    with (folder / "videos.csv").open("w") as file:
        file.write("videoid,contentUrl,duration,page_dir,name\n")
        for row in range(rows):
            known, page = 1_000_000 + 7 * row, f"{row // 1000:06d}_{row // 1000 + 1:06d}"
            file.write(f'{known},{address.format(known)},PT00H00M{row % 60:02d}S,{page},"{caption.format(row)}"\n')


def write_parts(config: Config, left: int = 0) -> Catalog:
    """The indexes of all planned parts but the last ones; answers the rows that these have."""
    catalog = read_catalog(config.catalog, config.out)
    (plan_uri,) = Path(config.out, "cache/snapshots").glob(f"*/{cache.PLAN}")
    plan = cache.opened(str(plan_uri)).read_all()
    part, names = plan["part"].to_numpy(), cache.part_names(plan)
    order, ends = np.argsort(part, kind="stable"), np.cumsum(np.bincount(part))
    layout = {"latents": {"shape": [4, 4, 2, 2], "dtype": "float16", "by": "row", "offset": 0}}
    digests = {"sha256": "0" * 64, "moments_sha256": "0" * 64, "bytes": "1000", "tensors": json.dumps(layout)}
    folder, begin = Path(config.out, "cache/parts"), 0
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    stop = len(names) - left
    for name, end in zip(names[:stop], ends[:stop], strict=True):
        rows = tables.taken(catalog.table, order[begin:end])
        videoids, captions = rows["videoid"].to_pylist(), rows["caption"].to_pylist()
        missing = [{"videoid": v, "reason": "missing", "clips": 1, "message": "none"} for v in videoids[::REJECTED]]
        kept = [row for row in range(len(videoids)) if row % REJECTED]
        known = dict.fromkeys(CLIP.names, np.zeros(len(kept)))
        known |= {"clip_id": [f"{videoids[row]}:0" for row in kept], "videoid": [videoids[row] for row in kept]}
        known |= {"caption": [captions[row] for row in kept], "split": ["train"] * len(kept)}
        known |= {"hash": random.integers(2**63, size=len(kept)), "flip": np.zeros(len(kept), bool)}
        columns = {n: pa.array(known[n], CLIP.field(n).type) for n in CLIP.names if n not in ("frame_indices", "extra")}
        index = pa.table(columns | {"place": pa.array(range(len(kept)), pa.int32())})
        (folder / f"{name}.index").write_bytes(
            to_ipc(index.replace_schema_metadata(digests | {"rejects": json.dumps(missing)}))
        )
        begin = end
    last = order[begin:]
    return Catalog(tables.taken(catalog.table, last), "", "", catalog.roots, catalog.csvs)


# -- in a process of its own -----------------------------------------------------------------------------------------


def in_process(stage: str, folder: Path) -> dict[str, float]:
    """CPU seconds, and bytes at the peak."""
    program = f"from benchmarks import catalog; catalog.{stage}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


class Stop(Exception):
    pass


def plan(folder: str) -> None:
    Path(folder, "1000000.mp4").touch()  # one of those that are looked for
    with ExitStack() as patched, watched() as told:
        patched.enter_context(mock.patch.object(cache, "make_parts", _stop))
        patched.enter_context(mock.patch.object(cache.cluster, "connect"))
        patched.enter_context(mock.patch.object(cache.cluster, "refuse_unseen", list))  # as if there were more nodes
        patched.enter_context(suppress(Stop))
        cache.build_cache(config_of(Path(folder)))
    print(json.dumps(told))


def _stop(*_: object) -> None:
    raise Stop


def finish(folder: str) -> None:
    with watched() as told:
        cache.build_cache(config_of(Path(folder)))
    print(json.dumps(told))


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Told at the end: CPU seconds of what is done meanwhile, and the most bytes that it holds beside mapped files."""
    told, done = {"seconds": 0.0, "peak": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            held = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
            told["peak"] = max(told["peak"], int(held[1]) * 1024 if held else 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.process_time()
    try:
        yield told
    finally:
        told["seconds"] = time.process_time() - begin
        done.set()
        watcher.join()


# -- parts -----------------------------------------------------------------------------------------------------------


class Nothing:
    def __call__(self, plan: object) -> Made:
        return Made(b"")


def handed_out(folder: Path, number: int) -> float:
    """Parts a second, from the first that is made to the last."""
    folder.mkdir()
    times: list[float] = []
    parts = [Part(storage.join(str(folder), f"{i}.index"), {"start": i, "stop": i + 1}, 1) for i in range(number)]
    with ExitStack() as patched:
        patched.enter_context(mock.patch.dict(os.environ, {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}))
        make_parts("parts", "parts", parts, Nothing, {}, note=lambda *_: times.append(time.monotonic()) or "")
    return (len(times) - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    main(__doc__, measure)
