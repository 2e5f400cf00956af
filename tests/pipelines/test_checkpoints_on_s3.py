"""A training whose cache, checkpoints and weights are on S3, on real ranks; interrupted, and one that S3 fails."""

import re
from collections.abc import Callable

import pytest
from faulty_store import FaultyStore
from ranks import Interrupted, attempts, train

from pipelines import checkpoints, storage
from pipelines.config import Config

pytestmark = pytest.mark.slow

ROW = (
    *("finetune.row.batch=8", "finetune.row.samples=24", "finetune.row.warmup=0", "finetune.log_every=8"),
    *("finetune.checkpoint_every=8", "finetune.keep=2"),
)
BROKEN = re.compile(r"^PUT /webvid/broken/training/base-\w+/000000016/rank-1-of-2\.safetensors")


@pytest.fixture(scope="module")
def configured(endpoint, settings, _built, tmp_path_factory) -> Callable[[str, str], Config]:
    """configured(experiment, out) -> a configuration with a copy of the cache there."""
    store = tmp_path_factory.mktemp("store")

    def of(experiment: str, out: str) -> Config:
        for file in (_built / "cache").rglob("*"):
            if file.is_file():
                storage.put(file, f"{out}/cache/{file.relative_to(_built / 'cache')}")
        return settings(out, *ROW, f"tracking.uri=sqlite:///{store}/mlflow.db", f"tracking.experiment={experiment}")

    return of


def meanwhile(trainer) -> bool:
    if (trainer.config.tracking.experiment, trainer.samples) == ("interrupted", 16):
        trainer.writer.wait()
        raise Interrupted
    return False


@pytest.fixture(scope="module")
def configs(configured, tmp_path_factory) -> dict[str, Config]:
    there = {name: configured(name, f"s3://webvid/{name}") for name in ("interrupted", "broken")}
    return there | {"here": configured("here", str(tmp_path_factory.mktemp("here")))}


@pytest.fixture(scope="module")
def first(configs, endpoint) -> dict[str, str]:
    """How each ends, behind an endpoint that does not take one shard of one training."""

    def fault(method: str, path: str, times: int) -> str | None:
        return "500" if BROKEN.match(f"{method} {path}") else None

    store = FaultyStore(endpoint, fault)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", store.url)
        made = attempts(2, [(config.model_dump(), "zero-1") for config in configs.values()], meanwhile=meanwhile)
    store.close()
    assert store.faults["500"] >= 3  # botocore has tried again
    return {name: attempt.error for name, attempt in zip(configs, made, strict=True)}


@pytest.fixture(scope="module")
def left(configs, first) -> dict[str, list[str]]:
    return {
        name: [folder.rsplit("/", 1)[1] for folder in checkpoints.found(folder_of(c))] for name, c in configs.items()
    }


@pytest.fixture(scope="module")
def again(configs, left) -> dict[str, list]:
    names = ("interrupted", "broken")
    seen = train(2, [(configs[name].model_dump(), "zero-1") for name in names])
    return dict(zip(names, seen, strict=True))


def folder_of(config: Config) -> str:
    training = f"{config.out}/training"
    return f"{training}/{storage.files_below(training)[0].split('/')[0]}"


def test_an_endpoint_that_fails_is_said_and_the_checkpoint_before_is_whole(first, left):
    said = r"the checkpoint at s3://webvid/broken/training/base-\w{8}/000000016 could not be written: rank 1: .*"
    assert re.match(said, first["broken"]), first["broken"]
    assert left["broken"] == ["000000008"]
    assert first["interrupted"] == first["here"] == ""


def test_the_same_command_ends_with_the_bits_of_a_training_on_a_disk(configs, left, again):
    assert left["interrupted"] == ["000000008", "000000016"]
    assert [seen[0][0] for seen in again.values()] == [16, 8]
    for name in ("interrupted", "broken"):
        for kind in ("raw", "ema"):
            file = f"weights/base/{kind}/toy.safetensors"
            assert storage.read(f"{configs[name].out}/{file}") == storage.read(f"{configs['here'].out}/{file}")


def test_old_checkpoints_are_removed_from_s3(configs, again):
    for name in ("interrupted", "broken"):
        there = {file.split("/")[0] for file in storage.files_below(folder_of(configs[name]))}
        assert there == {"000000016", "000000024"}
