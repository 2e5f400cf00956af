"""Training on real ranks with real DeepSpeed: every ZeRO stage, interrupted and taken up by another one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from ranks import train

from pipelines.config import Config

pytestmark = pytest.mark.slow

BATCH, SAMPLES, INTERRUPTED = 8, 96, 32
ROW = (
    *(f"finetune.row.batch={BATCH}", f"finetune.row.samples={SAMPLES}", "finetune.row.warmup=16"),
    *(f"finetune.log_every={BATCH}", "finetune.checkpoint_every=32", "finetune.keep=9"),
    *("finetune.row.ema=0.9", "finetune.row.lr=1e-3", "finetune.row.conditioning.kind=timenoise"),
)
STAGES = ("zero-0", "zero-1", "zero-2", "zero-3")


@pytest.fixture(scope="module")
def configured(settings, _built, tmp_path_factory) -> Callable[..., Config]:
    """configured("key=value", ...) -> a configuration under a folder of its own, with the same cache."""

    def of(*overrides: str) -> Config:
        out = tmp_path_factory.mktemp("training")
        (out / "cache").symlink_to(_built / "cache")
        return settings(out, *ROW, *overrides)

    return of


def weights(config: Config, kind: str) -> dict:
    return safetensors.torch.load_file(Path(config.out, "weights/base", kind, "toy.safetensors"))


def furthest(a: Config, b: Config) -> float:
    return max(
        float((x - weights(b, kind)[name]).abs().max())
        for kind in ("raw", "ema")
        for name, x in weights(a, kind).items()
    )


@pytest.fixture(scope="module")
def whole(configured) -> dict:
    """Of every stage a training on two ranks that nothing disturbs."""
    configs = {stage: configured() for stage in STAGES}
    seen = train(2, [(config.model_dump(), stage) for stage, config in configs.items()])
    return {stage: (configs[stage], steps) for stage, steps in zip(STAGES, seen, strict=True)}


@pytest.fixture(scope="module")
def begun(configured) -> dict:
    """Of every stage one on two ranks that is interrupted; how it went on there, and on one rank by another stage."""
    configs = {stage: (configured(), configured()) for stage in STAGES}
    train(2, [(config.model_dump(), stage) for stage, each in configs.items() for config in each], until=INTERRUPTED)
    same = train(2, [(configs[stage][0].model_dump(), stage) for stage in STAGES])
    after = dict(zip(STAGES, STAGES[1:] + STAGES[:1], strict=True))
    other = train(1, [(configs[stage][1].model_dump(), after[stage]) for stage in STAGES])
    return {stage: (*configs[stage], same[i], other[i]) for i, stage in enumerate(STAGES)}


def test_all_stages_train_the_same_weights(whole):
    config, steps = whole["zero-0"]
    assert len(steps) == SAMPLES
    for other, losses in (whole[stage] for stage in STAGES[1:]):
        assert furthest(config, other) < 1e-4
        assert losses == [[p, clip, pytest.approx(loss, abs=1e-5)] for p, clip, loss in steps]


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_that_was_interrupted_ends_with_the_same_bits(stage, whole, begun):
    config, steps = whole[stage]
    same, _, seen, _ = begun[stage]
    assert seen == steps[INTERRUPTED:]
    assert furthest(config, same) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_ranks_and_another_stage_go_on_with_the_same_clips_draws_and_losses(stage, whole, begun):
    config, steps = whole[stage]
    _, other, _, seen = begun[stage]
    assert [s[:2] for s in seen] == [s[:2] for s in steps[INTERRUPTED:]]
    assert len(seen) == SAMPLES - INTERRUPTED
    assert max(abs(a[2] - b[2]) for a, b in zip(seen, steps[INTERRUPTED:], strict=True)) < 1e-4
    assert furthest(config, other) < 1e-4
