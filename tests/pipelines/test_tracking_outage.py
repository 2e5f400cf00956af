"""A tracking server that goes away and comes back while a training runs: no step waits, and no point is lost."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from processes import free_port, until
from ranks import attempts, train
from torch.multiprocessing import ProcessExitedException
from tracking_server import Server

from pipelines import checkpoints
from pipelines.config import Config
from pipelines.tracking import runs, store_uri

pytestmark = pytest.mark.slow

ROW = (
    *("finetune.row.batch=8", "finetune.row.samples=64", "finetune.row.warmup=0", "finetune.workers=1"),
    *("finetune.log_every=8", "finetune.checkpoint_every=16", "finetune.keep=9"),
)
MEASURED = ("samples_per_second", "tflops", "data_wait", "memory_gib_rank0", "system/")  # another time each time


def meanwhile(trainer) -> bool:
    """Waits for the test at two points, and may be killed at the second one."""
    name, out, samples = trainer.config.tracking.experiment, Path(trainer.config.out), trainer.samples
    if name in ("away", "killed") and samples in (16, 32):
        (out / f"at-{samples}").touch()
        until((out / f"go-{samples}").exists)
        if (name, samples) == ("killed", 32):
            trainer.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"), free_port())
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def configs(settings, _built, server, tmp_path_factory) -> dict[str, Config]:
    made = {}
    for name in ("away", "killed", "undisturbed"):
        out = tmp_path_factory.mktemp(name)
        (out / "cache").symlink_to(_built / "cache")
        made[name] = settings(out, *ROW, f"tracking.uri={server.uri}", f"tracking.experiment={name}")
    return made


@pytest.fixture(scope="module")
def unsent(configs, server) -> dict[str, list[int]]:
    """Both trainings disturbed; answers of which steps their checkpoints say that the server does not know them."""
    ended: list[BaseException] = []

    def both() -> None:
        try:
            attempts(1, [(configs[name].model_dump(), "zero-1") for name in ("away", "killed")], meanwhile=meanwhile)
        except ProcessExitedException as error:
            ended.append(error)

    training = threading.Thread(target=both)
    training.start()
    for name in ("away", "killed"):
        out = Path(configs[name].out)
        until((out / "at-16").exists)
        server.kill()
        (out / "go-16").touch()
        until((out / "at-32").exists)  # it trains on
        if name == "killed":
            (out / "go-32").touch()
            training.join()
        server.start()
        (out / "go-32").touch()
    assert "SIGKILL" in str(ended[0])
    folders = {name: next(Path(configs[name].out, "training").iterdir()) for name in ("away", "killed")}
    found = {name: checkpoints.found(str(folder)) for name, folder in folders.items()}
    assert len(found["killed"]) == 2
    train(1, [(configs[name].model_dump(), "zero-1") for name in ("killed", "undisturbed")])
    return {name: [step for _, step, _ in checkpoints.manifest(each[1])["unsent"]] for name, each in found.items()}


def curves(config: Config) -> dict[str, list[tuple[int, float]]]:
    client, (run,) = MlflowClient(store_uri(config)), runs(config, "train")
    assert run.info.status == "FINISHED"
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }


@pytest.mark.parametrize("name", ["away", "killed"])
def test_the_curve_has_every_point_once(configs, unsent, name):
    assert unsent[name][-2:] == [24, 32]
    found, undisturbed = curves(configs[name]), curves(configs["undisturbed"])
    assert [step for step, _ in undisturbed["loss"]] == [*range(8, 65, 8)]
    assert found.keys() == undisturbed.keys()
    for metric, points in undisturbed.items():
        if metric.startswith(MEASURED):
            assert [step for step, _ in found[metric]] == [step for step, _ in points]
        else:
            assert found[metric] == points, metric


def test_the_weights_of_a_disturbed_training_are_registered_once(configs, unsent, server):
    for name, config in configs.items():
        (version,) = MlflowClient(server.uri).search_model_versions(f"name = '{name}.base'")
        assert version.tags["cil.uri"] == f"{config.out}/weights/base"
