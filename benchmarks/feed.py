"""Clips trained a second from a latent cache, against the reference's way: decord, VAE and CLIP within the loop.

    python -m benchmarks.feed

videocrafter1 `tiny`, the clips and the reference's way of benchmarks.build, batches of 2 and two cores (of which the
reference's two DataLoader workers take what they get). Both take the same step of plain PyTorch. The limit takes one
batch again and again.
"""

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import Row, alternately, main, paired
from benchmarks.build import CORES, GPU, SETTINGS, Clips, by_loop, linked
from cil import Draws, Objective, TimeNoise
from cil.families import Clip
from pipelines.cache import read_cache
from pipelines.config import load
from pipelines.models import family_of
from pipelines.reader import ClipReader, SampleOrder

BATCH = 2
Batch = dict[str, Tensor]


def measure(quick: bool) -> list[Row]:
    steps, rounds = (8, 2) if quick else (24, 3)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers that build the cache
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        linked(Path(folder, "videos"), 48)
        config = load(None, [f"out={folder}/out", f"catalog.folder={folder}/videos", *SETTINGS, "cache.test=0"])
        by_loop(config)
        torch.set_num_threads(CORES)
        device = "cuda" if GPU else "cpu"
        family = family_of(config).to(device)
        clips = ClipReader(read_cache(config), "train")
        order = SampleOrder(len(clips), seed=0)
        net = family.network(0).to(device).train()
        objective, optimizer = Objective(TimeNoise(1.0)), torch.optim.AdamW(net.parameters(), lr=1e-5)

        def train(batches: Iterable[Batch]) -> float:
            """Clips a second, from the second batch on."""
            coming = iter(batches)
            for step in range(steps + 1):
                if step == 1:
                    begin = time.perf_counter()
                batch = {name: tensor.to(device) for name, tensor in next(coming).items()}
                draws = Draws([(0, BATCH * step + k) for k in range(BATCH)], device)
                objective(family, net, batch, draws).loss.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            return BATCH * steps / (time.perf_counter() - begin)

        def cached() -> Iterator[Batch]:
            yield from clips.ahead([order(BATCH * i + k) for k in range(BATCH)] for i in range(steps + 3))

        spawned = {"multiprocessing_context": "spawn", "persistent_workers": True, "num_workers": CORES}
        loader: Any = DataLoader(Clips(config), batch_size=BATCH, shuffle=True, timeout=120, **spawned)

        def in_the_loop() -> Iterator[Batch]:
            for frames in islice(cycle(loader), steps + 1):
                pixels = frames.permute(0, 1, 3, 4, 2).round().to(torch.uint8)
                yield family.encode(pixels, [Clip("what somebody said")] * BATCH)

        rates: dict[str, list[float]] = {"cached": [], "in_the_loop": [], "one": []}
        one = next(cached())
        feeds = {"cached": cached, "in_the_loop": in_the_loop, "one": lambda: cycle([one])}
        alternately(*(lambda name=name: rates[name].append(train(feeds[name]())) for name in feeds), rounds=rounds)
    ours, theirs, limit = (sorted(rates[name][1:])[len(rates[name][1:]) // 2] for name in feeds)
    return [
        Row(
            "feed: decord, VAE and CLIP in the loop",
            ours,
            theirs,
            limit,
            "clips/s",
            paired(rates["cached"][1:], rates["in_the_loop"][1:]),
            1.0,
        )
    ]


if __name__ == "__main__":
    main(__doc__, measure)
