"""build_cache in steady state, 520 clips on two cores, against a loop of the same work and against the reference's way.

    python -m benchmarks.build

The videos are those of benchmarks.decode, under many names; two views of 8 frames at stride 8 each, 32 x 64, by
videocrafter1 `tiny`: so small that the VAE, which both ways share, does not hide what they do otherwise. At 64 x 128 it
takes half of the time, and ours was 1.29 x the reference's way. The loop is build_cache too, but in place of Ray Data
there is a multiprocessing pool of two processes that call the same maker for the same parts. It runs before and after
Ray's, a quarter of the videos each.
Where there is a GPU, all encode on it. Rates are of the time in which all workers were busy and started: from when as
many parts were finished as there are workers, to the last part but one, by the times of the parts' index files.

The reference's way decodes each clip on its own with decord in one DataLoader of two workers, resizes in float32, and
calls the frozen networks clip by clip; it scores nothing, keeps nothing, and sums the latents for their mean.

Memory is the largest sum over Ray's workers and their decoders, of a cache of four times as many videos.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks import Row, decode, main
from cil.families import Clip
from pipelines import cache
from pipelines.config import Config, load
from pipelines.models import family_of
from pipelines.parts import _PartWriter

CORES, VIEWS, VIDEOS_PER_PART = 2, 2, 10
GPU = torch.cuda.is_available()
SETTINGS = (
    f"cache.gpus={1 / CORES if GPU else 0}",
    *("family.name=videocrafter1", "family.preset=tiny", "family.frames=8", "family.height=32", "family.width=64"),
    *(f"cache.stride={decode.STRIDE}", f"cache.views_per_video={VIEWS}", f"cache.videos_per_part={VIDEOS_PER_PART}"),
)


def measure(quick: bool) -> list[Row]:
    videos = 96 if quick else 260
    # The loop as Ray's workers: one thread each; and they as the loop: not behind whatever else runs here.
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_ADDRESS": "local"}
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        os.environ["RAY_TMPDIR"] = folder  # a Ray of our own, whatever else runs here
        linked(Path(folder, "videos"), videos)

        def config(name: str, videos: int) -> Config:
            catalog = [f"catalog.folder={folder}/videos", f"catalog.limit={videos}"]
            return load(None, [f"out={folder}/{name}", *catalog, *SETTINGS])

        loops = [by_loop(config("before", videos // 4))]
        _, small = by_ray(config("small", videos // 4))
        made, large = by_ray(config("large", videos))
        ours = steady(made)
        import ray

        ray.shutdown()
        loops.append(by_loop(config("after", videos // 4)))
        reference = by_reference(config("none", videos // 12))
    print(f"the loop's rates: {loops}")
    loop, gib = float(np.mean(loops)), 2**30
    return [
        Row("build: a loop of the same work", ours, loop, None, "clips/s", ours / loop, 0.9),
        Row("build: the reference's way", ours, reference, None, "clips/s", ours / reference, 1.5),
        Row("build: memory at 4 x the videos", large / gib, small / gib, None, "GiB", small / large, 1 / 1.1),
    ]


def linked(folder: Path, videos: int) -> None:
    folder.mkdir()
    for number in range(12):
        decode.sample(number)
    files = sorted(Path(tempfile.gettempdir(), "cil-benchmarks").glob(f"{decode.SEED}-*.mp4"))
    for number in range(videos):
        (folder / f"{number:04d}.mp4").symlink_to(files[number % len(files)])
        (folder / f"{number:04d}.txt").write_text(f"what somebody said of video {number}")


def by_ray(config: Config) -> tuple[cache.Cache, float]:
    """And the peak of the workers' memory in bytes."""
    with watched() as peak:
        made = cache.build_cache(config)
    return made, peak[0]


def by_loop(config: Config) -> float:
    with ExitStack() as patched:
        patched.enter_context(mock.patch("ray.put", lambda value: value))
        patched.enter_context(mock.patch("pipelines.cluster.connect"))
        patched.enter_context(mock.patch("pipelines.cluster.refuse_unseen"))
        patched.enter_context(mock.patch.object(cache, "make_parts", make_here))
        return steady(cache.build_cache(config))


def make_here(kind: str, unit: str, parts: list[Any], maker: Any, arguments: dict[str, Any], *_: Any) -> list[str]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(CORES, _start, (maker, arguments)) as pool:
        made = pool.imap_unordered(_make, [asdict(part) for part in parts])
        return [row["problem"] for row in made if row["problem"]]


def _start(maker: Callable[..., Any], arguments: dict[str, Any]) -> None:
    global _writer
    torch.set_num_threads(1)
    _writer = _PartWriter(maker, arguments)


def _make(part: dict[str, Any]) -> dict[str, Any]:
    return _writer(part)


def steady(made: cache.Cache) -> float:
    assert made.counts["clips"] == made.counts["planned"], made.counts
    clips = {part["name"]: part["clips"] for part in made.parts}
    done = sorted((Path(made.path(name, "index")).stat().st_mtime, count) for name, count in clips.items())
    assert len(done) > 2 * CORES
    return sum(count for _, count in done[CORES:-1]) / (done[-2][0] - done[CORES - 1][0])


@contextmanager
def watched() -> Iterator[list[float]]:
    """The peak of what Ray's workers and their children hold, looked at four times a second."""
    peak, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.25):
            peak[0] = max(peak[0], _held(psutil.Process()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _held(process: psutil.Process) -> float:
    total = 0.0
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.cmdline()[:1] and "ray::MapWorker" in child.cmdline()[0]:
                total += sum(each.memory_info().rss for each in [child, *child.children()])
    return total


# -- the reference's way ---------------------------------------------------------------------------------------------


class Clips(Dataset[torch.Tensor]):
    def __init__(self, config: Config) -> None:
        self.files = sorted(Path(str(config.catalog.folder)).glob("*.mp4"))[: config.catalog.limit]
        self.frames, *self.size = (getattr(config.family, key) for key in ("frames", "height", "width"))

    def __len__(self) -> int:
        return len(self.files) * VIEWS

    def __getitem__(self, number: int) -> torch.Tensor:
        import decord

        video = decord.VideoReader(str(self.files[number // VIEWS]), num_threads=1)
        span = (self.frames - 1) * decode.STRIDE + 1
        start = int(np.random.default_rng(number).integers(len(video) - span + 1))
        frames = torch.from_numpy(video.get_batch(range(start, start + span, decode.STRIDE)).asnumpy())
        height, width = self.size
        scale = max(height / frames.shape[1], width / frames.shape[2])
        size = [max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale))]
        x = F.interpolate(frames.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        return x[..., top : top + height, left : left + width]


def by_reference(config: Config) -> float:
    """Clips a second from the eighth on."""
    family, clips = family_of(config).to("cuda" if GPU else "cpu"), Clips(config)
    torch.set_num_threads(CORES)
    total = torch.zeros(family.latent_shape)
    begin, first = 0.0, 8
    for number, (frames,) in enumerate(DataLoader(clips, batch_size=1, num_workers=CORES, timeout=120)):
        if number == first:
            begin = time.perf_counter()
        known = Clip(f"what somebody said of video {number // VIEWS}")
        pixels = frames.permute(0, 2, 3, 1).round().to(torch.uint8)[None]
        total += family.encode(pixels, [known])["latents"][0]
    return (len(clips) - first) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main(__doc__, measure)
