"""What a build of a latent cache would be: how much of what, and how long by a sample of it."""

import os
import time

import numpy as np
import torch

from cil.families.base import Clip
from pipelines import storage
from pipelines.cache import encoding_of, part_names, plan_of, refuse_lost
from pipelines.catalog import Catalog, read_catalog
from pipelines.clips import PartMaker
from pipelines.config import Config
from pipelines.models import device_of, family_of
from pipelines.progress import clock
from pipelines.video import BadVideo

SAMPLE = 8  # videos that are decoded and encoded


def estimate(config: Config) -> str:
    catalog, family = read_catalog(config.catalog, storage.join(config.out, "shapes")), family_of(config)
    encoding_of(config, family)  # reads the weights, or says what is wrong with them
    folder, views = storage.join(config.out, "cache"), config.cache.views_per_video
    plan = plan_of(folder, catalog, config.cache.videos_per_part)
    names, there = part_names(plan), storage.names(storage.join(folder, "parts"))
    done = np.isin(plan["part"].to_numpy(), [i for i, name in enumerate(names) if f"{name}.index" in there])
    refuse_lost(catalog, done)
    problems = catalog.problems()
    frames = torch.zeros(1, family.frames, family.height, family.width, 3, dtype=torch.uint8)
    sizes = {name: t.nbytes for name, t in family.encode(frames, [Clip()]).items()}
    clip, clips = sum(sizes.values()), (len(catalog) - problems.total()) * views
    lines = [
        f"catalog     {len(catalog):,} videos of {catalog.source}",
        f"rejected    {problems.total():,} of them unseen" + "".join(f", {n:,} {name}" for name, n in problems.items()),
        f"clips       {clips:,} of {family.frames} x {family.height} x {family.width}, in {len(names):,} parts",
        f"done        {int(done.sum()) * views:,} of them",
        f"bytes       about {clips * clip:,}, {clip:,} a clip: " + ", ".join(f"{n} {b:,}" for n, b in sizes.items()),
    ]
    todo = np.flatnonzero(~done)
    if len(todo):
        seconds, encoding, made, rejected = _sampled(config, catalog, todo)
        rate = max(made, 1) / seconds
        left, cores = len(todo) * views / rate, os.cpu_count() or 1
        gpu = " and a GPU" if device_of(config) == "cuda" else ""
        lines.append(
            f"sample      {made} clips, {rejected} videos rejected; {rate:.3g} clips/s on one core{gpu} here, "
            f"{encoding:.0%} of it encoding"
        )
        several = "" if gpu else f"; {clock(left / cores)} on {cores}"
        lines.append(f"time        {clock(left)} (h:mm:ss) of such a core{gpu}{several}")
    return "\n".join(lines)


def _sampled(config: Config, catalog: Catalog, rows: np.ndarray) -> tuple[float, float, int, int]:
    """Seconds, the share of them that is the encoder's, clips made and videos rejected."""
    torch.set_num_threads(1)
    chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int)]
    maker = PartMaker(config.model_dump(), "", catalog)
    with maker.decoders:
        return _timed(maker, catalog, [chosen[0], *chosen])  # the first one again, for what is loaded once


def _timed(maker: PartMaker, catalog: Catalog, rows: list[int]) -> tuple[float, float, int, int]:
    seconds, encoding, made, rejected = 0.0, 0.0, 0, 0
    for i, row in enumerate(rows):
        begin = time.perf_counter()
        (video,) = catalog.videos(int(row), int(row) + 1)
        try:
            clips = maker.decode(video)
            before = time.perf_counter()
            done = len([maker.encode(video, number, *clip) for number, clip in enumerate(clips)])
        except (BadVideo, OSError):
            before, done = time.perf_counter(), 0
        if i:
            seconds += time.perf_counter() - begin
            encoding += time.perf_counter() - before
            made, rejected = made + done, rejected + (not done)
    return seconds, encoding / seconds, made, rejected
