"""The training loss of a batch: one draw of t, noise and conditioning noise for each sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from cil.conditioning import CleanCondition, ConditioningNoise
from cil.draws import Draws
from cil.families.base import Family


class Losses(NamedTuple):
    loss: Tensor  # [B], weighted
    t: Tensor  # [B]
    level: Tensor  # [B], of the conditioning noise


@dataclass(frozen=True)
class Objective:
    """Conditioning noise and guidance drop; the process, prediction and weight are the family's."""

    conditioning: ConditioningNoise = field(default_factory=CleanCondition)
    drop: float = 0.0  # share of samples that are trained without their condition, for guidance

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop={self.drop}: in 0..1")

    def __call__(self, family: Family, net: nn.Module, batch: Mapping[str, Tensor], draws: Draws) -> Losses:
        process = family.process
        x0 = batch["latents"].float()
        # What all kinds of conditioning noise share is drawn first: arms of a study differ in nothing else.
        t = draws.integers(process.steps)
        eps = draws.normal(*x0.shape[1:])
        dropped = draws.uniform() < self.drop
        condition, level = family.condition(batch, self.conditioning, process.unit_time(t), draws)
        condition = family.drop(condition, dropped)
        answer = family.denoise(net, process.add_noise(x0, eps, t), t, condition)
        error = (answer - process.target(family.prediction, x0, eps, t)) ** 2
        return Losses(family.loss_weight(t) * error.flatten(1).mean(1), t, level)
