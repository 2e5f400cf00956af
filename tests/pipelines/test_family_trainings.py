"""Every family but toy, tiny: two ranks killed in the middle of a training, taken up again, and exported."""

import os
import signal
from pathlib import Path

import pytest
import torch
from in_process import instead_of_ray
from published import write_published
from ranks import attempts, train
from torch.multiprocessing import ProcessExitedException

from pipelines.cache import build_cache
from pipelines.config import Config
from pipelines.export import export
from pipelines.models import family_of

pytestmark = pytest.mark.slow

PROFILES = {
    "dynamicrafter": "zero-1",
    "videocrafter1": "zero-2-offload",
    "svd": "zero-3",
    "i2vgenxl": "zero-3-offload",
}
ROW = (
    *("family.frames=4", "family.height=32", "family.width=48", "finetune.row.batch=4", "finetune.row.samples=12"),
    *("finetune.row.warmup=0", "finetune.log_every=4", "finetune.checkpoint_every=8", "finetune.row.ema=0.5"),
    *("finetune.row.conditioning.kind=timenoise", "finetune.row.drop.both=0.2", "finetune.row.lr=1e-4"),
    *("cache.stride=1", "export.row=base", "export.checkpoint=8"),
)
KINDS = ("raw", "ema")


def meanwhile(trainer) -> bool:
    """One rank of what is disturbed is killed after its first checkpoint."""
    if trainer.config.tracking.experiment == "killed" and (trainer.rank, trainer.samples) == (1, 8):
        trainer.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return False


@pytest.fixture(scope="module")
def configs(settings, tmp_path_factory) -> dict[tuple[str, str], Config]:
    """Of every family one training that is left alone and one that is killed, from its published weights."""
    made = {}
    for name in PROFILES:
        weights = write_published(name, tmp_path_factory.mktemp(name))
        outs = [tmp_path_factory.mktemp(name) for _ in range(2)]
        for out, experiment in zip(outs, ("whole", "killed"), strict=True):
            named = (f"family.name={name}", f"family.weights={weights}", f"tracking.experiment={experiment}")
            made[name, experiment] = settings(out, *ROW, *named)
        with pytest.MonkeyPatch.context() as patched:
            instead_of_ray(patched)
            build_cache(made[name, "whole"])
        (outs[1] / "cache").symlink_to(outs[0] / "cache")
    return made


@pytest.fixture(scope="module")
def trained(configs) -> dict[tuple[str, str], Config]:
    jobs = {key: (config.model_dump(), PROFILES[key[0]]) for key, config in configs.items()}
    for name in PROFILES:
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            attempts(2, [jobs[name, "killed"]], meanwhile=meanwhile)
    train(2, list(jobs.values()))
    return configs


def weights(config: Config, folder: str) -> dict[str, torch.Tensor]:
    family = family_of(config)
    return {
        f"{kind}/{name}": tensor
        for kind in KINDS
        for name, tensor in family.restore(Path(config.out, folder, kind)).items()
    }


@pytest.mark.parametrize("name", PROFILES)
def test_a_killed_training_of_a_family_ends_with_the_same_bits(trained, name):
    whole, killed = (weights(trained[name, experiment], "weights/base") for experiment in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[key]) for key, tensor in whole.items())
    before = family_of(trained[name, "whole"]).network(0).state_dict()
    assert any(not torch.equal(tensor, whole[f"raw/{key}"]) for key, tensor in before.items())


@pytest.mark.parametrize("name", PROFILES)
def test_a_checkpoint_of_a_family_is_exported_as_its_weights_are_published(trained, name):
    for experiment in ("whole", "killed"):
        export(trained[name, experiment])
    whole, killed = (weights(trained[name, experiment], "exports/base/000000008") for experiment in ("whole", "killed"))
    assert all(torch.equal(tensor, killed[key]) for key, tensor in whole.items())
    last = weights(trained[name, "whole"], "weights/base")
    assert {key: tensor.shape for key, tensor in last.items()} == {key: tensor.shape for key, tensor in whole.items()}
    assert any(not torch.equal(tensor, last[key]) for key, tensor in whole.items())
