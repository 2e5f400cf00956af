"""What goes wrong in a training, on real ranks: NaN in the cache, kills while a checkpoint is written, a full disk."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from mlflow import MlflowClient
from ranks import Attempt, Interrupted, attempts, train
from torch.multiprocessing import ProcessExitedException

from pipelines import checkpoints
from pipelines.artifact import read_manifest
from pipelines.cache import read_cache
from pipelines.config import Config
from pipelines.reader import ClipReader, SampleOrder
from pipelines.tracking import runs, store_uri
from pipelines.weights import KIND

pytestmark = pytest.mark.slow

ROW = (
    *("finetune.row.batch=4", "finetune.row.samples=24", "finetune.row.warmup=0", "finetune.log_every=4"),
    *("finetune.checkpoint_every=8", "finetune.keep=9", "finetune.row.ema=0.5"),
)
DAMAGED = 13  # the position whose clip is NaN: the second rank's, in the batch after 12 samples


@pytest.fixture(scope="module")
def configured(settings, _built, tmp_path_factory) -> Callable[..., Config]:
    """configured(experiment, "key=value", ...) -> a configuration with a copy of the cache."""
    store = tmp_path_factory.mktemp("store")

    def of(experiment: str, *overrides: str) -> Config:
        out = tmp_path_factory.mktemp("training")
        shutil.copytree(_built / "cache", out / "cache")
        tracked = (f"tracking.uri=sqlite:///{store}/mlflow.db", f"tracking.experiment={experiment}")
        return settings(out, *ROW, *tracked, *overrides)

    return of


def damage(config: Config) -> str:
    """NaN in the latents of one clip, in its part's file; answers its id."""
    cache = read_cache(config)
    clips = ClipReader(cache, "train")
    order = SampleOrder(len(clips), 0)
    number = order(DAMAGED)
    assert number not in [order(position) for position in range(24) if position != DAMAGED]
    known = clips.known(number)
    part = cache.parts[known["part"]]
    told = part["tensors"]["latents"]
    with open(cache.path(part["name"]), "r+b") as file:
        file.seek(told["offset"] + known["row"] * 2 * int(np.prod(told["shape"])))
        file.write(np.float16(np.nan).tobytes())
    assert clips.batch([number])["latents"].isnan().sum() == 1
    return known["clip_id"]


def folder_of(config: Config) -> Path:
    (folder,) = Path(config.out, "training").iterdir()
    return folder


def there(config: Config) -> list[int]:
    return [int(Path(folder).name) for folder in checkpoints.found(str(folder_of(config)))]


def weights(config: Config) -> dict[str, bytes]:
    return {kind: Path(config.out, "weights/base", kind, "toy.safetensors").read_bytes() for kind in ("raw", "ema")}


def meanwhile(trainer) -> bool:
    """What happens to one of several trainings, which is known by its experiment."""
    name, rank, samples = trainer.config.tracking.experiment, trainer.rank, trainer.samples
    if (name, samples) == ("skip", 20):
        raise Interrupted
    if name in ("shard", "leaving") and samples == 12:
        trainer.writer.wait()  # or what is still written of the checkpoint before would count
    if (name, rank, samples) == ("shard", 1, 12):
        kill_at_fsync(1)  # of its shard of the next checkpoint
    if (name, rank, samples) == ("leaving", 0, 12):
        kill_at_fsync(4)  # a shard and a manifest, which the notice is for; of the next checkpoint only a shard
    if (name, samples) == ("full", 12):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return (name, samples) == ("leaving", 12)


def kill_at_fsync(number: int) -> None:
    """This process at its so many-th one, before a file has its name."""
    fsync, left = os.fsync, [number]

    def counted(file: int) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = counted


DISTURBED = ("shard", "leaving", "full")


@pytest.fixture(scope="module")
def configs(configured) -> dict[str, Config]:
    nan = {on_nan: configured(on_nan, f"finetune.on_nan={on_nan}") for on_nan in ("stop", "skip")}
    return nan | {name: configured(name) for name in ("whole", *DISTURBED)}


@pytest.fixture(scope="module")
def clip(configs) -> str:
    (one,) = {damage(configs[on_nan]) for on_nan in ("stop", "skip")}
    return one


@pytest.fixture(scope="module")
def first(configs, clip) -> dict[str, Attempt]:
    """Two ranks: NaN stops one training; another one leaves that out, and is then interrupted; one ends well."""
    names = ("stop", "skip", "whole", "full")
    made = attempts(2, [(configs[name].model_dump(), "zero-1") for name in names], meanwhile=meanwhile)
    for name in ("shard", "leaving"):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            attempts(2, [(configs[name].model_dump(), "zero-1")], meanwhile=meanwhile)
    return dict(zip(names, made, strict=True))


@pytest.fixture(scope="module")
def left(configs, first) -> dict[str, list[str]]:
    """Of each training that was disturbed, its checkpoints and what else there is."""
    return {name: [str(there(configs[name])), *unfinished(configs[name])] for name in DISTURBED}


def unfinished(config: Config) -> list[str]:
    whole = {f"{samples:09d}" for samples in there(config)}
    files = (file for folder in folder_of(config).iterdir() if folder.is_dir() for file in folder.iterdir())
    return sorted(f"{f.parent.name}/{f.name[:12]}" for f in files if f.parent.name not in whole)


@pytest.fixture(scope="module")
def again(configs, left) -> dict[str, list]:
    """The same commands again."""
    names = ("skip", *DISTURBED)
    seen = train(2, [(configs[name].model_dump(), "zero-1") for name in names])
    return dict(zip(names, seen, strict=True))


def positions(seen: list) -> list[int]:
    return [position for position, *_ in seen]


def test_a_nan_in_the_cache_stops_the_training_with_the_clip_and_the_last_good_checkpoint(configs, first, clip):
    said = rf"row base: the loss is not finite after 12 samples, with the clips {clip}\. "
    said += r"The last good checkpoint is /.*/training/base-\w{8}/000000008; lower lr=0\.0005; .*on_nan=skip\. .*"
    assert re.fullmatch(said, first["stop"].error), first["stop"].error
    assert positions(first["stop"].seen) == [*range(16)]
    assert there(configs["stop"]) == [8]
    (run,) = runs(configs["stop"], "train")
    assert run.info.status == "FAILED"
    assert run.data.tags["cil.stopped"] == first["stop"].error
    assert not Path(configs["stop"].out, "weights/base/manifest.json").exists()


def test_a_batch_with_a_nan_is_left_out_and_the_training_goes_on_from_the_last_checkpoint(configs, first, again, clip):
    assert first["skip"].error == ""
    assert positions(first["skip"].seen) == [*range(16), *range(8, 12), *range(16, 20)]
    assert first["skip"].seen[8:12] == first["skip"].seen[16:20]

    config = configs["skip"]
    assert there(config) == [8, 20, 24]  # the one that was due after the batch which is left out comes after the next
    assert positions(again["skip"]) == [*range(20, 24)]
    assert read_manifest(f"{config.out}/weights/base", KIND).counts["skipped_batches"] == 1
    assert checkpoints.manifest(checkpoints.found(str(folder_of(config)))[-1])["skipped_batches"] == 1
    assert all(t.isfinite().all() for t in safetensors.torch.load(weights(config)["ema"]).values())
    (run,) = runs(config, "train")
    assert clip in run.data.tags["cil.left_out.12"]
    history = MlflowClient(store_uri(config)).get_metric_history(run.info.run_id, "skipped_batches")
    assert [(m.step, m.value) for m in history] == [(4, 0), (8, 0), (12, 0), (20, 1), (24, 1)]


def test_what_was_being_written_when_a_rank_was_killed_is_nothing(left):
    assert left["shard"] == ["[8]", "000000016/.unfinished-", *left["shard"][2:]]
    assert len(left["shard"]) <= 3  # and the other rank's shard, or not yet
    assert left["leaving"] == ["[8, 12]", "000000016/.unfinished-", *["000000016/rank-0-of-2."], *left["leaving"][3:]]


def test_a_node_that_is_about_to_leave_gives_a_checkpoint_at_once(left, again):
    assert left["leaving"][0] == "[8, 12]"
    assert positions(again["leaving"]) == [*range(12, 24)]


def test_a_full_disk_is_said_and_what_was_there_stays(first, left, configs):
    said = r"the checkpoint at .*/000000016 could not be written: rank 0: .*; rank 1: .*too large"
    assert re.search(said, first["full"].error), first["full"].error
    assert left["full"] == ["[8]"]


@pytest.mark.parametrize("name", DISTURBED)
def test_the_same_command_ends_with_the_same_bits(configs, again, name):
    assert weights(configs[name]) == weights(configs["whole"])
    assert there(configs[name])[-2:] == [16, 24]


def test_a_lock_that_a_killed_process_left_on_an_operator_stops_nobody(tmp_path):
    """PyTorch would wait for it without an end."""
    load = "from pipelines import zero; zero.import_deepspeed(gpu=False); zero.load_operator('ShareMemCommBuilder')"
    kept = {name: value for name, value in os.environ.items() if name != "TORCH_EXTENSIONS_DIR"}
    subprocess.run([sys.executable, "-c", load], env=kept | {"HOME": str(tmp_path)}, check=True)
    built = Path(sys.prefix, "torch_extensions", "deepspeed_shm_comm")  # whatever the home
    shutil.copytree(built, tmp_path / built.name)
    (tmp_path / built.name / "lock").touch()
    there = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", load], env=kept | there, check=True, timeout=120)
    assert not (tmp_path / built.name / "lock").exists()
