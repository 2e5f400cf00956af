"""A step of the whole stack against a bare PyTorch loop: toy `small`, batch 24, one worker with one thread;
and the share of a step that it waits for data.

    python -m benchmarks.train

The stack is that of jobs.finetune: Ray Train, DeepSpeed ZeRO-1, the latent cache, draws of each sample's own, averaged
weights, and MLflow in SQLite; its times are the points that it logs, but for the first ones. Checkpoints are left out.
The bare loop has the same network, objective, optimiser and clipping, and its batches in memory. It takes as many steps
in the same worker after each point, so that both see the same machine.
"""

import os
import tempfile
import time
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks import Row, main, paired
from cil import Draws, Objective
from pipelines import finetune, tracking, trainer
from pipelines.cache import build_cache
from pipelines.config import load
from pipelines.make_shapes import make_shapes

WARM_UP = 2  # points


def measure(quick: bool) -> list[Row]:
    import ray

    samples = 672 if quick else 2400
    settings = ["shapes.videos=200", "shapes.damaged=0", "family.preset=small", "finetune.workers=1"]
    settings += ["finetune.row.batch=24", "finetune.row.warmup=0", "finetune.log_every=96"]  # a step of .2 s or more
    settings += [f"finetune.row.samples={samples}", f"finetune.checkpoint_every={samples}"]
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        config = load(None, [f"out={folder}", *settings])
        os.environ |= {"RAY_ADDRESS": "local", "RAY_TMPDIR": folder}  # a Ray of our own, whatever else runs here
        try:
            make_shapes(config)
            build_cache(config)
            with mock.patch.object(finetune, "train_rows", train_in_turn):
                finetune.finetune(config)
        finally:
            ray.shutdown()
        client, _ = tracking.open_study(config)
        run = tracking.runs(config, "train")[0].info.run_id
        stack, bare = (_ms_a_step(client.get_metric_history(run, name), config.finetune.row.batch) for name in RATES)
        waited = 100 * median(point.value for point in client.get_metric_history(run, "data_wait"))
    return [
        Row("train: bare PyTorch", median(stack), median(bare), None, "ms a step", paired(bare, stack), 0.95),
        Row("train: waiting for data", waited, 2, None, "% of a step", 2 / waited, 1.0),
    ]


RATES = ("samples_per_second", "bare_samples_per_second")


def _ms_a_step(points: list[Any], batch: int) -> list[float]:
    return [1000 * batch / point.value for point in sorted(points, key=lambda point: point.step)[WARM_UP:]]


def train_in_turn(loop: dict[str, Any]) -> None:
    """What the Ray Train worker runs: jobs.finetune's loop, and after each point of its curves the bare one."""
    with mock.patch.object(finetune, "RowTrainer", WithBare):
        finetune.train_rows(loop)


class WithBare(trainer.RowTrainer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bare = Bare(self)

    def log(self) -> None:
        super().log()
        begin = time.perf_counter()
        rate = self.bare.samples_per_second(self.config.finetune.log_every)
        self.run.metrics({RATES[1]: rate}, self.samples)
        self.curve.left_out(time.perf_counter() - begin)  # none of this is the stack's


class Bare:
    """A plain loop."""

    def __init__(self, stack: trainer.RowTrainer) -> None:
        self.row, self.family = stack.row, stack.family
        clips = [
            list(range(i, i + self.row.batch)) for i in range(0, len(stack.clips) - self.row.batch, self.row.batch)
        ]
        self.batches = [stack.clips.batch(numbers) for numbers in clips]
        self.draws = Draws([(stack.seed, k) for k in range(self.row.batch)])
        self.net, self.objective = self.family.network(stack.seed), Objective()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.row.lr)

    def samples_per_second(self, samples: int) -> float:
        begin = time.perf_counter()
        for step in range(samples // self.row.batch):
            batch = self.batches[step % len(self.batches)]
            self.objective(self.family, self.net, batch, self.draws).loss.mean().backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), self.row.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return samples / (time.perf_counter() - begin)


if __name__ == "__main__":
    main(__doc__, measure)
