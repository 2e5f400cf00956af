"""Fine-tuning (or pre-training, where no weights are given): Ray Train drives DeepSpeed ZeRO over the rows of a study.

One group of workers trains the rows in turn. Each row has its own weights, MLflow run and checkpoints; the same command
again goes on from the last checkpoint of the row that was interrupted, whatever the number of workers is now.
"""

import threading
from contextlib import suppress
from typing import Any

from cil import TimeNoise, diagnose
from cil.families import Family
from pipelines import cluster, memory, storage, zero
from pipelines.artifact import Artifact, Identity, Manifest
from pipelines.cache import pinned, read_cache, refuse_other_encoder
from pipelines.config import ConditioningConfig, Config, TrainingRow
from pipelines.errors import Unfinished, UserError
from pipelines.models import counted_of, family_of
from pipelines.progress import Progress
from pipelines.reader import ClipReader
from pipelines.rows import conditioning_noise
from pipelines.tracking import refuse_unreachable, store_uri
from pipelines.trainer import NotFinite, RowTrainer, agreed
from pipelines.weights import KIND, plan_weights, uri_of

PATIENCE = 7200  # seconds that ranks wait for rank 0, which exports, and waits for a tracking server that has gone
QUIET = 30  # seconds without a word from the workers, after which it is looked whether they have a place at all


def finetune(config: Config) -> dict[str, Manifest]:
    """Every row of the study trained, or those that are asked for; answers their weights."""
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
    if config.finetune.validate_every and not len(ClipReader(cache, "validation")):
        unseen = f"no clip in {cache.uri} is for validation (cache.validation={config.cache.validation})"
        raise UserError(f"finetune.validate_every: {unseen}; `null` trains without a look at any")
    chosen = {name: row for name, row in rows.items() if {name, row.arm, row.key} & {*(config.finetune.only or rows)}}
    missing = {name: row for name, row in chosen.items() if not made[name].finished}
    if not missing:
        print(f"weights: {', '.join(chosen)} are finished; nothing to do")
        return {name: made[name].manifest() for name in chosen}
    for name, row in missing.items():
        parent = row.settings.weights
        if parent in made and parent not in missing and not made[parent].finished:
            raise UserError(
                f"finetune.only: {name} begins from {parent}, whose weights are not finished: train it first"
            )
    refuse_impossible(config, family, missing)
    refuse_unreachable(config)
    cluster.connect()
    gpu = cluster.gpus() > 0 if config.finetune.gpu is None else config.finetune.gpu
    cluster.refuse_unplaceable(config.finetune.workers, gpu)
    cluster.refuse_unshared(config.out)
    cluster.refuse_local_store(store_uri(config))
    profile = choose_profile(config, family, missing, gpu)
    for name in missing:
        if rows[name].settings.weights is None and family.options.weights is None:
            print(f"finetune {name}: begins with random weights, as family.weights names none")
        if described := describe_noise(rows[name].settings.conditioning, family):
            print(f"finetune {name}: {described}")
        made[name].begin(config.model_dump_json(indent=1))
    _fit(pinned(config, cache), {name: made[name].identity for name in missing}, profile, gpu)
    return {name: made[name].manifest() for name in chosen}


def refuse_impossible(config: Config, family: Family, rows: dict[str, TrainingRow]) -> None:
    """What no cluster could train."""
    settings = config.finetune
    if settings.deepspeed != "auto" and not zero.stage_of(zero.profile_of(settings.deepspeed)):
        for name, row in rows.items():
            if row.settings.precision != "float32":
                wanted = f"finetune.rows.{name}.precision={row.settings.precision}"
                raise UserError(f"finetune.deepspeed={settings.deepspeed}: ZeRO 0 trains float32 alone, not {wanted}")
    if settings.recompute:
        try:
            family.recompute(memory.network_of(family))
        except ValueError as error:
            raise UserError(f"finetune.recompute: {error}") from None


def choose_profile(config: Config, family: Family, rows: dict[str, TrainingRow], gpu: bool) -> zero.Profile:
    """One for all rows, as the largest of them needs it; refuses what this cluster cannot train."""
    settings = config.finetune
    for named, row in rows.items():
        if row.settings.precision == "float16" and not gpu:
            raise UserError(f"finetune.rows.{named}.precision=float16: needs a GPU; bfloat16 works on CPUs too")
    if settings.deepspeed != "auto":
        return zero.profile_of(settings.deepspeed)
    device = cluster.gpu_memory() if gpu else None
    name, why = memory.choose(family, [row.settings for row in rows.values()], settings.workers, device)
    print(f"finetune: DeepSpeed profile {name} (infra/deepspeed): {why}")
    return zero.profile_of(name)


def _fit(config: Config, missing: dict[str, Identity], profile: zero.Profile, gpu: bool) -> None:
    import ray.train.torch
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipelines.rendezvous import OnRaysNetwork

    settings = config.finetune
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # neither lost with a node nor waited for
    stopped = list[str]()
    listener = threading.Thread(target=_listen, args=(news, stopped, settings.workers, gpu), daemon=True)
    listener.start()
    loop = {"config": config.model_dump(), "missing": missing, "profile": profile, "gpu": gpu, "news": news}
    trainer = ray.train.torch.TorchTrainer(
        train_rows,
        train_loop_config=loop,
        torch_config=OnRaysNetwork(backend="nccl" if gpu else "gloo", timeout_s=PATIENCE),
        scaling_config=ray.train.ScalingConfig(num_workers=settings.workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=storage.join(config.out, "training"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "UserError" in line), lines[-1])
        if "UserError" in reason:  # it would come again
            raise UserError(f"training of {', '.join(missing)} stopped: {reason}") from error
        raise Unfinished(
            f"training of {', '.join(missing)} stopped: {reason}. The same command goes on from here"
        ) from error
    finally:
        with suppress(Exception):  # the queue's actor may have died
            news.put(None)
            listener.join()
            news.shutdown()
    if stopped:
        raise UserError(f"training of {', '.join(missing)} stopped: {stopped[0]}")


def train_rows(loop: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    zero.import_deepspeed(loop["gpu"])
    import ray.train
    import torch.distributed as dist

    config = Config.model_validate(loop["config"])
    cache, rows = read_cache(config), config.training_rows()
    made = {name: Artifact(uri_of(config, name), KIND, identity) for name, identity in loop["missing"].items()}
    finished = agreed(lambda: [name for name in made if made[name].finished])
    for name in made:
        if name not in finished:
            trainer = RowTrainer(
                config,
                name,
                rows[name],
                made[name],
                cache,
                loop["profile"],
                lambda *told: _tell(loop["news"], told),
                lambda: ray.train.get_preemption_info() is not None,
            )
            try:
                trainer.train()
            except NotFinite as error:  # it would come again, and Ray would try it again
                if dist.get_rank() == 0:
                    _tell(loop["news"], str(error))
                return
            dist.barrier()  # the next row may start from these weights


def _tell(news: Any, told: Any) -> None:
    with suppress(Exception):  # a line of progress is not worth a training
        news.put(told)


def describe_noise(config: ConditioningConfig, family: Family) -> str:
    """What TimeNoise does over the training times, and whether that depends on time at all."""
    noise, process = conditioning_noise(config, family), family.process
    if not isinstance(noise, TimeNoise):
        return ""
    return f"TimeNoise with {diagnose(noise, process.unit_time(process.training_times()))}"


def _next(news: Any, workers: int, gpu: bool) -> Any:
    """What is told next. Where it is long in coming, says which workers have no place."""
    from ray.util.queue import Empty

    try:
        while True:
            with suppress(Empty):
                return news.get(timeout=QUIET)
            waits = ""
            with suppress(Exception):  # the cluster may not answer now; what is told must be listened to
                waits = cluster.unplaced(workers, gpu)
            if waits:
                print(f"finetune: waits for {waits}; add nodes, or set finetune.workers", flush=True)
    except Exception:  # its actor has died
        return None


def _listen(news: Any, stopped: list[str], workers: int, gpu: bool) -> None:
    bars: dict[str, Progress] = {}
    while (item := _next(news, workers, gpu)) is not None:
        if isinstance(item, str):
            stopped.append(item)
            continue
        if len(item) == 1:
            print(f"finetune: {item[0]}", flush=True)
            continue
        name, samples, total, loss = item
        if loss is not None and name in bars:
            bars[name].advance(samples - bars[name].done, f"loss {loss:.4f}")
            continue
        bars[name] = Progress(f"finetune {name}", "samples", total, samples)
        if samples:
            print(f"finetune {name}: goes on from the checkpoint at {samples} samples", flush=True)
