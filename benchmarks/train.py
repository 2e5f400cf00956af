"""A step of the whole stack against a bare PyTorch loop: toy `small`, batch 16, one worker with one thread.

    python -m benchmarks.train

The stack is that of jobs.finetune: Ray Train, DeepSpeed ZeRO-1, the latent cache, draws of each sample's own, averaged
weights, and MLflow in SQLite; its times are the points that it logs, but for the first ones. Checkpoints are left out.
The bare loop has the same network, objective, optimiser and clipping, and its batches in memory. Fits and loops run in
turn, and both are timed over as many samples at a time.
"""

import os
import tempfile
import time
from statistics import median

import torch
from torch import nn

from benchmarks import Row, main, paired
from cil import Draws, Objective, families
from pipelines import tracking
from pipelines.cache import build_cache, read_cache
from pipelines.config import Config, load
from pipelines.finetune import finetune
from pipelines.make_shapes import make_shapes
from pipelines.reader import ClipReader

WARM_UP = 2  # points


def measure(quick: bool) -> list[Row]:
    import ray

    stack, bare = [], []  # ms a step, the median of each fit
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        os.environ |= {"RAY_ADDRESS": "local", "RAY_TMPDIR": folder}  # a Ray of our own, whatever else runs here
        try:
            make_shapes(_config(folder, "data", quick))
            build_cache(_config(folder, "data", quick))
            for fit in range(1 if quick else 4):
                config = _config(folder, f"fit-{fit}", quick)
                finetune(config)
                stack.append(median(_logged(config)))
                bare.append(median(_bare(config, len(_logged(config)))))
                print(f"stack {stack[-1]:.1f}, bare {bare[-1]:.1f} ms a step")
        finally:
            ray.shutdown()
    return [Row("train: bare PyTorch", median(stack), median(bare), None, "ms a step", paired(bare, stack), 0.95)]


def _config(out: str, row: str, quick: bool) -> Config:
    samples = 640 if quick else 1600
    small = ["shapes.videos=200", "shapes.damaged=0", "family.preset=small", "finetune.workers=1"]
    fit = [f"finetune.rows={{{row}: {{samples: {samples}}}}}", f"finetune.checkpoint_every={samples}"]
    return load(None, [f"out={out}", *small, *fit])


def _logged(config: Config) -> list[float]:
    """Milliseconds a step of the newest run, from its points."""
    client, _ = tracking.open_study(config)
    points = client.get_metric_history(tracking.runs(config, "train")[0].info.run_id, "samples_per_second")
    batch = config.finetune.row.batch
    return [1000 * batch / point.value for point in sorted(points, key=lambda point: point.step)[WARM_UP:]]


def _bare(config: Config, points: int) -> list[float]:
    """Milliseconds a step of a plain loop."""
    torch.set_num_threads(1)
    row, family = config.finetune.row, families.load(**config.family.model_dump())
    clips = ClipReader(read_cache(config), "train")
    batches = [clips.batch([(i + k) % len(clips) for k in range(row.batch)]) for i in range(0, len(clips), row.batch)]
    draws = Draws([(0, k) for k in range(row.batch)])
    net, objective = family.network(seed=0), Objective()
    optimizer = torch.optim.AdamW(net.parameters(), lr=row.lr)
    steps = config.finetune.log_every // row.batch
    found = []
    for point in range(WARM_UP + points):
        begin = time.perf_counter()
        for step in range(steps):
            batch = batches[(point * steps + step) % len(batches)]
            objective(family, net, batch, draws).loss.mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), row.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        found.append(1000 * (time.perf_counter() - begin) / steps)
    return found[WARM_UP:]


if __name__ == "__main__":
    main(__doc__, measure)
