"""One row of a study on one worker: the step, the curve, checkpoints, and what is done about a loss that is not finite.

Nothing here asks how many workers there are or which ZeRO stage it is, but for the lanes of a batch: every draw is a
function of (seed, position in the stream), and checkpoints keep ranges of parameters by their names.
"""

import contextlib
import gc
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cil.flops import of_next_call
from pipelines import checkpoints, metrics, storage, zero
from pipelines.artifact import Artifact, commit, versions
from pipelines.cache import Cache
from pipelines.checkpoints import Stored, training_of
from pipelines.config import Config, TrainingRow
from pipelines.curve import Curve
from pipelines.errors import Unfinished, UserError
from pipelines.models import family_of
from pipelines.reader import ClipReader, lanes
from pipelines.rows import learning_rate, objective_of, order_of
from pipelines.shards import Shards
from pipelines.step import Step
from pipelines.tracking import Feed, SystemMetrics
from pipelines.validation import Validation
from pipelines.weights import counts_of, trained_network, write_stored

SKIPPED = "skipped.json"  # the batches that were left out, by the samples before them
MOST = 10  # of them
LAST_WORDS = 60  # seconds that a training which has failed waits for a tracking server


class NotFinite(UserError):
    """A loss or a gradient of this step is NaN or infinite; raised on all ranks together."""


class RowTrainer:
    def __init__(
        self,
        config: Config,
        name: str,
        row: TrainingRow,
        made: Artifact,
        cache: Cache,
        profile: zero.Profile,
        news: Callable[..., None],
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """`news` is told where rank 0 begins, how far it is, what it left out; `leaving`: is a node to go?

        All ranks ask that together, and are answered alike.
        """
        self.config, self.settings, self.name, self.made, self.cache = config, config.finetune, name, made, cache
        self.row, self.seed, self.profile, self.news, self.leaving = row.settings, row.seed, profile, news, leaving
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.family = family_of(config)
        self.clips = ClipReader(cache, "train", self.row.where)
        self.order = order_of(self.clips, self.row, self.seed)
        self.folder = training_of(config, name, made)
        self.micro_batch = self.settings.micro_batch or self.row.batch // self.world
        objective = objective_of(config, self.family, self.row)
        self.one_step = Step(self.family, objective, self.row, self.seed, self.micro_batch)
        self.validation = Validation(config, self.family, cache) if self.settings.validate_every else None
        self.run = self.open_run() if self.rank == 0 else None
        self.system = SystemMetrics() if self.rank == 0 else None
        self.left = False

    def train(self) -> None:
        """To the end; again from the last checkpoint where a batch is to be left out."""
        while True:
            self.begin()
            try:
                self.loop()
                break
            except NotFinite as error:
                self.writer.wait()
                self.leave_out(error)
        self.finish()
        self.close()

    def begin(self) -> None:
        """The network, its optimiser and the position, as the last checkpoint has them."""
        last = agreed(lambda: checkpoints.found(self.folder)[-1:])
        stored = Stored(last[0]) if last else None
        self.samples = 0  # clips seen, which is also the position in the stream
        self.steps = 0  # of the optimiser
        self.validated: tuple[int, float] | None = None  # the samples at which it was measured, and the loss
        net = trained_network(self.config, self.family, self.row, self.seed, stored)
        if self.settings.recompute:
            self.family.recompute(net)
        trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        rounds = stored is None and self.row.precision != "float32"
        whole = {name: parameter.detach().clone() for name, parameter in trained.items()} if rounds else {}
        self.engine = zero.engine_of(net, self.profile, self.row, self.micro_batch, self.world)
        self.device = self.engine.device
        self.family.to(self.device)  # what is frozen: CLIP's tower looks at the image in each step
        self.shards = Shards(self.engine)
        if stored:
            self.samples, self.steps = stored.told["samples"], stored.told["steps"]
            if self.run:
                self.run.again(stored.told["unsent"])
            self.shards.restore(stored.read, self.steps)
            zero.set_loss_scale(self.engine, stored.told["loss_scale"])
        elif whole:
            self.shards.begin_with(whole)
        self.saved, self.steps_before = self.samples, self.steps
        self.writer = checkpoints.Writer(self.folder, self.shards, self.settings.keep)
        self.skipped = agreed(lambda: _skipped(self.folder))
        if self.run:
            self.news(self.name, self.samples, self.row.samples, None)
        flops = of_next_call(self.engine.module)
        self.curve = Curve(self.device, lambda: flops() / self.micro_batch)

    def loop(self) -> None:
        row, every = self.row, self.settings
        starts = [s for s in range(self.samples, row.samples, row.batch) if s not in self.skipped]
        steps = [lanes(s, row.batch, self.rank, self.world) for s in starts]
        batches = self.clips.ahead([self.order(p) for p in positions] for positions in steps)
        for start, positions in zip(starts, steps, strict=True):
            before = time.perf_counter()
            batch = next(batches)
            self.curve.waited += time.perf_counter() - before
            since, self.samples = self.samples, start
            begin = time.perf_counter()
            self.step(positions, batch)
            if self.rank == 0:
                metrics.STEP_SECONDS(time.perf_counter() - begin, self.name)
            self.samples = start + row.batch
            last = start == starts[-1]
            if due(every.log_every, since, self.samples) or last:
                self.log()
            if self.validation and (due(every.validate_every, since, self.samples) or last):
                self.validate()
            if due(every.checkpoint_every, since, self.samples) or last:
                self.checkpoint()
            if not self.left and due(every.log_every, since, self.samples) and self.leaving():
                self.left = True  # it stays so until the node goes: one checkpoint more is enough
                self.checkpoint()
                self.writer.wait()

    def step(self, positions: list[int], batch: Mapping[str, Tensor]) -> None:
        losses, times, norm = self.one_step(self.engine, self.samples, positions, batch)
        self.curve.add(losses, self.family.process.unit_time(times), norm)
        self.refuse_not_finite(positions, losses, norm)
        steps = self.steps_before + self.engine.global_steps - self.engine.skipped_steps
        if steps > self.steps:  # or float16's gradients were too large, and nothing has moved
            self.shards.average(self.row.ema)
        self.steps = steps

    def refuse_not_finite(self, positions: list[int], losses: Tensor, norm: float) -> None:
        """On all ranks together, and with the ids of the clips."""
        bad = torch.tensor(float(not torch.isfinite(losses).all()), device=self.device)
        if self.row.precision != "float16":  # whose scale falls until gradients are finite
            bad += not math.isfinite(norm)
        dist.all_reduce(bad)
        if bad:
            mine = [p for p, loss in zip(positions, losses.tolist(), strict=True) if not math.isfinite(loss)]
            everybodys: list[list[int]] = [[]] * self.world
            dist.all_gather_object(everybodys, mine)
            positions = sorted(p for each in everybodys for p in each)
            what = "the loss" if positions else "a gradient"
            positions = positions or list(range(self.samples, self.samples + self.row.batch))
            ids = ", ".join(self.clips.known(self.order(p))["clip_id"] for p in positions[:20])
            raise NotFinite(f"row {self.name}: {what} is not finite after {self.samples} samples, with the clips {ids}")

    def leave_out(self, error: NotFinite) -> None:
        last = checkpoints.found(self.folder)[-1:]
        good = f"The last good checkpoint is {last[0]}" if last else "There is no checkpoint yet"
        if self.settings.on_nan == "stop" or len(self.skipped) >= MOST:
            stop = self.settings.on_nan == "stop"
            advice = (
                "leave such batches out by finetune.on_nan=skip" if stop else f"{MOST} batches are left out already"
            )
            said = (
                f"{error}. {good}; lower lr={self.row.lr}; {advice}. "
                "jobs.show_cache show_cache.verify=true finds out whether the cache is damaged"
            )
            if self.run:
                self.run.tags({"stopped": said})
                self.run.finish("FAILED")
                with contextlib.suppress(Unfinished):
                    self.run.flush(LAST_WORDS)
            raise NotFinite(said)
        if self.run:
            self.news(f"{error}; that batch is left out. {good}")
            self.run.tags({f"left_out.{self.samples}": str(error)})
            rest = json.dumps(sorted([*self.skipped, self.samples])).encode()
            storage.write(storage.join(self.folder, SKIPPED), rest)
        self.close()
        dist.barrier()

    def log(self) -> None:
        values = self.curve.take()
        values["lr"] = learning_rate(self.row, self.samples - self.row.batch)
        values["skipped_batches"] = float(len(self.skipped))
        if self.run:
            assert self.system is not None
            self.run.metrics(values | self.system.take(), self.samples)
            self.news(self.name, self.samples, self.row.samples, values["loss"])
            metrics.LOSS(values["loss"], self.name)
            metrics.SAMPLES_PER_SECOND(values["samples_per_second"], self.name)
            metrics.DATA_WAIT(values["data_wait"], self.name)

    def validate(self) -> None:
        """Of the averaged weights, by all ranks together."""
        assert self.validation is not None
        begin = time.perf_counter()
        self.shards.exchange()
        self.engine.eval()
        values, media = self.validation(self.engine, self.device)
        self.engine.train()
        self.shards.exchange()
        self.validated = (self.samples, values["validation/loss"])
        if self.run:
            self.run.metrics(values | {"validation/seconds": time.perf_counter() - begin}, self.samples)
            for name, data in media.items():
                self.run.file(f"validation/{self.samples:09d}/{name}", data)
        self.curve.left_out(time.perf_counter() - begin)

    def checkpoint(self) -> None:
        if self.saved == self.samples:
            return
        begin = time.perf_counter()
        self.writer.save(self.samples, self.told())
        self.saved = self.samples
        seconds = time.perf_counter() - begin
        self.curve.left_out(seconds)
        if self.rank == 0:
            metrics.CHECKPOINT_SECONDS(seconds, self.name)

    def told(self) -> dict[str, Any]:
        """Beside what the shards hold."""
        return {
            "row": self.name,
            "weights": self.made.fingerprint,
            "steps": self.steps,
            "clips": len(self.clips),
            "skipped_batches": len(self.skipped),
            "validation_loss": self.validated[1] if self.validated and self.validated[0] == self.samples else None,
            "loss_scale": zero.loss_scale(self.engine),
            "shapes": zero.shapes_of(self.engine.module),
            "world": self.world,
            "deepspeed": self.profile,
            "config": self.config.model_dump(mode="json"),
            "unsent": self.run.unsent() if self.run else [],
        }

    def finish(self) -> None:
        """The last checkpoint becomes the row's weights."""
        self.samples = self.row.samples  # also where the last batch was left out
        self.checkpoint()
        self.writer.wait()
        if self.run:
            stored = Stored(checkpoints.found(self.folder)[-1])
            files = write_stored(self.config, self.family, self.row, self.seed, stored, self.made)
            name = f"{self.config.tracking.experiment}.{self.name}"
            self.run.register(name, self.made, counts_of(stored) | {"files": files})
            self.run.finish()
            self.run.flush()  # before the row is finished: another run of the job would not come back to it
            self.made.finish(counts_of(stored), files=files)

    def close(self) -> None:
        """What the next row, or the same one again, is to have room for."""
        self.writer.close()
        self.engine.destroy()
        del self.engine, self.shards, self.writer
        gc.collect()

    def open_run(self) -> Feed:
        run = Feed(self.config, self.name, "train", self.made.fingerprint)
        run.parameters({key: value for key, value in self.made.identity.items() if key != "code"})
        tags = {"weights": self.made.uri, "world_size": self.world, "zero_stage": zero.stage_of(self.profile)}
        tags |= {"cache": self.cache.fingerprint, "code": self.made.identity["code"], "stopped": ""}
        run.tags(tags | commit() | versions())
        run.file("config.json", self.config.model_dump_json(indent=1).encode())
        return run


def due(every: int | None, since: int, samples: int) -> bool:
    """Also where the batch that would have ended there was left out."""
    return every is not None and samples // every > since // every


def agreed(look: Callable[[], Any]) -> Any:
    """What rank 0 finds, because another rank might look a moment later."""
    said = [look() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]


def _skipped(folder: str) -> list[int]:
    uri = storage.join(folder, SKIPPED)
    return json.loads(storage.read(uri)) if storage.exists(uri) else []
