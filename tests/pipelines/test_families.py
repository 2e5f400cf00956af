"""Every family but toy walks the road from published weights, tiny: two ranks that are interrupted, exports, videos.

Through Ray from end to end DynamiCrafter walks it in test_table_of_the_paper.py.
"""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from in_process import Here, instead_of_ray
from processes import until
from published import told_of, write_published
from ranks import Interrupted, attempts, train
from torch.multiprocessing import ProcessExitedException

from pipelines import checkpoints
from pipelines.artifact import read_manifest
from pipelines.cache import build_cache
from pipelines.config import Config
from pipelines.export import export
from pipelines.finetune import finetune
from pipelines.generate import generate
from pipelines.initial_noise import make_initial_noise
from pipelines.models import family_of
from pipelines.score import score

pytestmark = pytest.mark.slow

PROFILES = {
    "dynamicrafter": "zero-1",
    "videocrafter1": "zero-2-offload",
    "svd": "zero-3",
    "i2vgenxl": "zero-3-offload",
}
*_, KILLED = PROFILES  # one rank of its training, the last; the others' are interrupted by themselves
STUDY = (
    *("family.frames=4", "family.height=32", "family.width=48", "cache.stride=1"),
    *("finetune.row.batch=4", "finetune.row.samples=12", "finetune.row.warmup=0", "finetune.row.ema=0.5"),
    *("finetune.log_every=4", "finetune.checkpoint_every=8", "export.row=base", "export.checkpoint=8"),
    *("finetune.row.conditioning.kind=timenoise", "finetune.row.drop.both=0.2", "finetune.row.lr=1e-4"),
    *("generate.clips=2", "generate.reference=2", "generate.clips_per_part=2", "generate.steps=2"),
    *("generate.rows.raw={weights: base, ema: false}", "generate.rows.before={weights: published}"),
    *("score.feature_steps=2", "score.leakage=2"),
)
OWN = {  # what else is chosen, each for one family
    "dynamicrafter": (),
    "videocrafter1": ("family.latents=sample",),
    "svd": ("family.precision=bfloat16",),
    "i2vgenxl": ("family.clip_features=true", "family.precision=bfloat16"),
}
KINDS = ("raw", "ema")


def meanwhile(trainer) -> bool:
    """What is disturbed ends after its first checkpoint."""
    if trainer.config.tracking.experiment == "disturbed" and trainer.samples == 8:
        trainer.writer.wait()
        until(lambda: checkpoints.found(trainer.folder), 60)  # rank 0 writes its manifest
        if (trainer.config.family.name, trainer.rank) == (KILLED, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        raise Interrupted
    return False


@pytest.fixture(scope="module")
def configs(settings, tmp_path_factory) -> dict[tuple[str, str], Config]:
    """Of every family one training that is left alone and one that is disturbed, from its published weights."""
    made = {}
    for name in PROFILES:
        weights = write_published(name, tmp_path_factory.mktemp(name))
        M = 100 if name == "svd" else 940
        analytic = f"generate.rows.tuned={{weights: base, guidance: 2, start: analytic, M: {M}}}"
        outs = [tmp_path_factory.mktemp(name) for _ in range(2)]
        for out, experiment in zip(outs, ("whole", "disturbed"), strict=True):
            named = (f"family.name={name}", f"family.weights={weights}", f"tracking.experiment={experiment}", analytic)
            made[name, experiment] = settings(out, *STUDY, *OWN[name], *named)
        with pytest.MonkeyPatch.context() as patched:
            instead_of_ray(patched)
            build_cache(made[name, "whole"])
        shutil.copytree(outs[0] / "cache", outs[1] / "cache")
    return made


@pytest.fixture(scope="module")
def trained(configs) -> dict[tuple[str, str], Config]:
    jobs = {key: (config.model_dump(), PROFILES[key[0]]) for key, config in configs.items()}
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        attempts(2, [jobs[name, "disturbed"] for name in PROFILES], meanwhile=meanwhile)
    seen = zip(jobs, train(2, list(jobs.values())), strict=True)
    assert {(experiment, len(samples)) for (_, experiment), samples in seen} == {("whole", 12), ("disturbed", 4)}
    return configs


def weights(config: Config, folder: str) -> dict[str, torch.Tensor]:
    family = family_of(config)
    return {
        f"{kind}/{name}": tensor
        for kind in KINDS
        for name, tensor in family.restore(Path(config.out, folder, kind)).items()
    }


@pytest.mark.parametrize("name", PROFILES)
def test_an_interrupted_training_of_a_family_ends_with_the_same_bits(trained, name):
    whole, other = (weights(trained[name, experiment], "weights/base") for experiment in ("whole", "disturbed"))
    assert whole.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in whole.items())

    # Trained from the published weights, and both kinds are written as they are published.
    family = family_of(trained[name, "whole"])
    before = family.restore(Path(trained[name, "whole"].family.weights))
    assert {f"{kind}/{key}" for kind in KINDS for key in before} == whole.keys()
    moved = [float((whole[f"raw/{key}"] - tensor).abs().max()) for key, tensor in before.items()]
    assert 0 < max(moved) < 5e-3  # three steps of at most 1e-4 or so, and some weight decay
    assert any(not torch.equal(whole[f"raw/{key}"], whole[f"ema/{key}"]) for key in before)


@pytest.mark.parametrize("name", PROFILES)
def test_a_checkpoint_of_a_family_is_exported_as_its_weights_are_published(trained, name):
    for experiment in ("whole", "disturbed"):
        export(trained[name, experiment])
    folder = "exports/base/000000008"
    whole, other = (weights(trained[name, experiment], folder) for experiment in ("whole", "disturbed"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in whole.items())
    last = weights(trained[name, "whole"], "weights/base")
    assert {key: tensor.shape for key, tensor in last.items()} == {key: tensor.shape for key, tensor in whole.items()}
    assert any(not torch.equal(tensor, last[key]) for key, tensor in whole.items())


def walk(config: Config, capsys: pytest.CaptureFixture) -> None:
    for station in (build_cache, make_initial_noise, finetune, generate, score):
        station(config)
    assert "weights: base are finished; nothing to do" in capsys.readouterr().out  # on the ranks they were trained


@pytest.mark.parametrize("name", PROFILES)
def test_a_trained_family_makes_videos_that_are_scored_and_nothing_knows_where_its_weights_were(
    trained, name, here: Here, capsys
):
    config = trained[name, "disturbed"]
    walk(config, capsys)
    assert "cache" not in here.told  # it is there
    rows = {
        row: {f.name: f.read_bytes() for f in Path(config.out, "videos", row).glob("*.mp4")} for row in config.arms()
    }
    assert rows.keys() >= {"tuned", "raw", "before"}
    assert all(len(videos) == 2 for videos in rows.values())
    assert len({str(sorted(videos.items())) for videos in rows.values()}) == len(rows)
    for row in rows:
        assert read_manifest(f"{config.out}/scores/{row}", "scores").counts["videos"] == 2

    # Elsewhere the weights are the same, and nothing is made again.
    published = Path(config.family.weights)
    assert told_of(published, config) == []
    made = len(here.made)
    elsewhere = published.rename(published.with_name(f"elsewhere{published.suffix}"))
    try:
        family = config.family.model_copy(update={"weights": str(elsewhere)})
        walk(config.model_copy(update={"family": family}), capsys)
    finally:
        elsewhere.rename(published)
    assert len(here.made) == made
