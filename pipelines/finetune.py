"""Fine-tuning (or pre-training, where no weights are given): Ray Train drives DeepSpeed ZeRO over the rows of a study.

One group of workers trains the rows in turn. Each row has its own weights, MLflow run and checkpoints; the same command
again goes on from the last checkpoint of the row that was interrupted.
"""

import json
import math
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cil import CleanCondition, ConstantNoise, Draws, Drops, Objective, TimeNoise, diagnose
from cil.conditioning import ConditioningNoise
from cil.families import Family
from cil.objectives import Losses
from pipelines import cluster, storage
from pipelines.artifact import Artifact, Identity, Manifest
from pipelines.cache import Cache, read_cache, refuse_other_encoder
from pipelines.config import ConditioningConfig, Config, RowConfig, TrainingRow
from pipelines.curve import Curve
from pipelines.errors import Unfinished, UserError
from pipelines.models import counted_of, family_of
from pipelines.progress import Progress
from pipelines.reader import BalancedOrder, ClipReader, SampleOrder, lanes
from pipelines.tracking import Run, refuse_unreachable, store_uri
from pipelines.weights import KIND, network_of, plan_weights, uri_of, write_weights


def finetune(config: Config) -> dict[str, Manifest]:
    """Every row of the study trained; answers their weights."""
    cache, family = read_cache(config), family_of(config)
    refuse_other_encoder(cache, family)
    rows = config.training_rows()
    made: dict[str, Artifact] = {}
    for name, row in rows.items():
        made[name] = plan_weights(config, family, name, row, cache, made)
        clips = ClipReader(cache, "train", row.settings.where)
        if not len(clips):
            raise UserError(f"finetune.rows.{name}: no training clip in {cache.uri} has {row.settings.where}")
        if row.settings.balance:
            clips.values(row.settings.balance)  # or it says that the cache has no such scores
        if row.settings.unmarked:
            counted_of(config, family)
    missing = [name for name in rows if not made[name].finished]
    if not missing:
        print(f"weights: {', '.join(rows)} are finished; nothing to do")
        return {name: each.manifest() for name, each in made.items()}
    refuse_unreachable(config)
    cluster.connect()
    cluster.refuse_unplaceable(config.finetune.workers, config.finetune.gpu)
    cluster.refuse_unshared(config.out)
    cluster.refuse_local_store(store_uri(config))
    for name in missing:
        if described := describe_noise(rows[name].settings.conditioning, family):
            print(f"finetune {name}: {described}")
        made[name].begin(config.model_dump_json(indent=1))
    _fit(config, missing, {name: each.identity for name, each in made.items()})
    return {name: each.manifest() for name, each in made.items()}


def _fit(config: Config, missing: list[str], identities: dict[str, Identity]) -> None:
    import ray.train.torch
    from ray.util.queue import Queue

    settings = config.finetune
    news = Queue()
    listener = threading.Thread(target=_print_progress, args=(news,), daemon=True)
    listener.start()
    trainer = ray.train.torch.TorchTrainer(
        train_rows,
        train_loop_config={"config": config.model_dump(), "identities": identities, "news": news},
        scaling_config=ray.train.ScalingConfig(num_workers=settings.workers, use_gpu=settings.gpu),
        run_config=ray.train.RunConfig(
            # Shards fit the number of workers and the stage that wrote them: another one begins its row anew.
            name=f"{settings.workers}-workers-zero-{settings.zero_stage}",
            storage_path=storage.join(config.out, "training"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        if "FloatingPointError" in reason or "UserError" in reason:  # would come again
            raise UserError(f"training of {', '.join(missing)} stopped: {reason}") from error
        raise Unfinished(
            f"training of {', '.join(missing)} stopped: {reason}. The same command goes on from here"
        ) from error
    finally:
        news.put(None)
        listener.join()
        news.shutdown()


def train_rows(loop: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train
    import torch.distributed as dist

    config = Config.model_validate(loop["config"])
    _prepare_deepspeed(config.finetune.gpu)
    rank = ray.train.get_context().get_world_rank()
    cache, rows = read_cache(config), config.training_rows()
    made = {name: Artifact(uri_of(config, name), KIND, identity) for name, identity in loop["identities"].items()}
    # Rank 0's word, because another rank might look a moment later.
    finished = [[name for name in rows if made[name].finished]]
    dist.broadcast_object_list(finished)
    for name, row in rows.items():
        if name not in finished[0]:
            RowTrainer(config, name, row, made[name], cache, rank, loop["news"]).train()
            dist.barrier()  # the next row may start from these weights


class RowTrainer:
    """One row on one worker."""

    def __init__(
        self, config: Config, name: str, row: TrainingRow, made: Artifact, cache: Cache, rank: int, news: Any
    ) -> None:
        import torch.distributed as dist

        self.config, self.name, self.made = config, name, made
        self.row, self.seed = row.settings, row.seed
        self.rank, self.world, self.news = rank, dist.get_world_size(), news
        self.family = family_of(config)
        self.clips = ClipReader(cache, "train", self.row.where)
        self.order = order_of(self.clips, self.row, self.seed)
        counted = counted_of(config, self.family) if self.row.unmarked else None
        noise = conditioning_noise(self.row.conditioning, self.family)
        self.objective = Objective(noise, Drops(both=self.row.drop), counted)
        self.samples = 0  # seen so far, which is also the position in the stream

        net = network_of(config, self.family, self.row.weights, self.seed)
        self.engine = _deepspeed(net, config, self.row, self.world)
        self.device = self.engine.device
        self.ema = {key: value.detach().clone() for key, value in self.engine.module.state_dict().items()}
        self.curve = Curve(self.device)
        self.restore()
        self.run = self.open_run() if rank == 0 else None

    def train(self) -> None:
        row, settings = self.row, self.config.finetune
        steps = [lanes(s, row.batch, self.rank, self.world) for s in range(self.samples, row.samples, row.batch)]
        batches = self.clips.ahead([self.order(p) for p in positions] for positions in steps)
        for positions, batch in zip(steps, batches, strict=True):
            losses = self.step(positions, batch)
            self.samples += row.batch
            self.curve.add(losses.loss, self.family.process.unit_time(losses.t))
            if self.samples % settings.log_every == 0 or self.samples == row.samples:
                self.log()
            if self.samples % settings.checkpoint_every == 0 and self.samples < row.samples:
                self.checkpoint()
        self.finish()

    def step(self, positions: list[int], batch: dict[str, torch.Tensor]) -> Losses:
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        draws = Draws([(self.seed, p) for p in positions], self.device)
        losses = self.objective(self.family, self.engine, batch, draws)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.row, self.samples)
        self.engine.backward(losses.loss.mean())
        self.engine.step()
        self.average()
        return losses

    @torch.no_grad()
    def average(self) -> None:
        now = self.engine.module.state_dict()
        torch._foreach_lerp_(list(self.ema.values()), [now[key] for key in self.ema], 1 - self.row.ema)

    def log(self) -> None:
        values = self.curve.take()
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"row {self.name}: the loss is {values['loss']} after {self.samples} samples; lower lr={self.row.lr}"
            )
        if self.run:
            values["lr"] = learning_rate(self.row, self.samples - self.row.batch)
            self.run.metrics(values, self.samples)
            self.news.put((self.name, self.samples, self.row.samples, values["loss"]))

    def checkpoint(self) -> None:
        """Every rank's share of the optimiser, and once the weights, their average and the position."""
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            position = {"row": self.made.fingerprint, "samples": self.samples}
            self.engine.save_checkpoint(folder, tag="deepspeed", client_state=position)
            if self.rank == 0:
                torch.save(self.ema, Path(folder, "ema.pt"))
                Path(folder, "position.json").write_text(json.dumps(position))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"samples": self.samples}, checkpoint=checkpoint)

    def restore(self) -> None:
        import ray.train
        import torch.distributed as dist

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            position = json.loads(Path(folder, "position.json").read_text())
            if position["row"] == self.made.fingerprint:
                loaded, _ = self.engine.load_checkpoint(folder, tag="deepspeed")
                assert loaded, f"DeepSpeed found nothing to load in {folder}"
                self.ema = torch.load(Path(folder, "ema.pt"), map_location=self.device, weights_only=True)
                self.samples = position["samples"]
            dist.barrier()  # no rank may remove the folder while another reads it

    def open_run(self) -> Run:
        run = Run(self.config, self.name, "train", self.made.fingerprint)
        told = {key: value for key, value in self.made.identity.items() if key != "code"}
        run.parameters(told)
        settings = self.config.finetune
        run.tags({"weights": self.made.uri, "world_size": self.world, "zero_stage": settings.zero_stage})
        run.text("config.json", self.config.model_dump_json(indent=1))
        return run

    def finish(self) -> None:
        if self.run:
            self.run.finish()
            counts, raw = {"samples": self.samples}, self.engine.module.state_dict()
            write_weights(self.made, self.family, self.ema, raw, counts, clips=len(self.clips))


def order_of(clips: ClipReader, row: RowConfig, seed: int) -> SampleOrder | BalancedOrder:
    return BalancedOrder(clips.values(row.balance), seed) if row.balance else SampleOrder(len(clips), seed)


def conditioning_noise(config: ConditioningConfig, family: Family) -> ConditioningNoise:
    if config.kind == "none":
        return CleanCondition()
    told = config.filled(family.timenoise)
    assert told.beta_m is not None
    assert told.a is not None
    timenoise = TimeNoise(told.beta_m, told.a)
    if config.kind == "timenoise":
        return timenoise
    return ConstantNoise(timenoise.mean_level() if config.level is None else config.level)


def describe_noise(config: ConditioningConfig, family: Family) -> str:
    """What TimeNoise does over the training times, and whether that depends on time at all."""
    noise, process = conditioning_noise(config, family), family.process
    if not isinstance(noise, TimeNoise):
        return ""
    return f"TimeNoise with {diagnose(noise, process.unit_time(process.training_times()))}"


def learning_rate(row: RowConfig, samples: int) -> float:
    """Rises over the warm-up, then falls as a cosine to 0 at the end."""
    if samples < row.warmup:
        return row.lr * (samples + row.batch) / row.warmup
    return row.lr * 0.5 * (1 + math.cos(math.pi * (samples - row.warmup) / max(row.samples - row.warmup, 1)))


def _deepspeed(net: nn.Module, config: Config, row: RowConfig, world: int):  # noqa: ANN202 - a DeepSpeedEngine
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": row.batch // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": row.clip_norm,
        # Copies gradients into one buffer, which spares a GPU fragmentation and costs a CPU 2 % of a step.
        "zero_optimization": {"stage": config.finetune.zero_stage, "contiguous_gradients": config.finetune.gpu},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=row.lr)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    return engine


def _prepare_deepspeed(gpu: bool) -> None:
    """Before deepspeed is imported."""
    import logging

    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed looks for ninja on the PATH, and pip has put it beside this Python.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _print_progress(news: Any) -> None:
    bars: dict[str, Progress] = {}
    while (item := news.get()) is not None:
        name, samples, total, loss = item
        if name in bars:
            bars[name].advance(samples - bars[name].done, f"loss {loss:.4f}")
        else:
            bars[name] = Progress(f"finetune {name}", "samples", total, samples)
