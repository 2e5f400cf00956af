"""What the words of a training row mean: its objective, the noise on its conditional image, its order, its pace."""

import math

from cil import CDM, CleanCondition, ConstantNoise, Drops, Objective, TimeNoise
from cil.conditioning import ConditioningNoise
from cil.families import Family
from pipelines.config import ConditioningConfig, Config, RowConfig
from pipelines.models import counted_of
from pipelines.reader import BalancedOrder, ClipReader, SampleOrder


def objective_of(config: Config, family: Family, row: RowConfig) -> Objective:
    counted = counted_of(config, family) if row.unmarked else None
    return Objective(conditioning_noise(row.conditioning, family), Drops(**row.drop.model_dump()), counted)


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
    level = config.level
    if config.kind == "constant":
        return ConstantNoise(timenoise.mean_level() if level is None else level)
    return CDM(2 * timenoise.mean_level() if level is None else level)


def learning_rate(row: RowConfig, samples: int) -> float:
    """Rises over the warm-up, then falls to 0 at the end, or does not."""
    if samples < row.warmup:
        return row.lr * (samples + row.batch) / row.warmup
    gone = (samples - row.warmup) / max(row.samples - row.warmup, 1)
    shares = {"cosine": 0.5 * (1 + math.cos(math.pi * gone)), "linear": 1 - gone, "constant": 1.0}
    return row.lr * shares[row.schedule]
