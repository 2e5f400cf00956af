"""The training loss of a batch: one draw of t, noise and conditioning noise for each sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from cil.conditioning import CleanCondition, ConditioningNoise
from cil.draws import Draws
from cil.families.base import Dropped, Family


class Losses(NamedTuple):
    loss: Tensor  # [B], weighted
    t: Tensor  # [B]
    level: Tensor  # [B], of the conditioning noise


@dataclass(frozen=True)
class Drops:
    """Shares of samples that are trained without their text, without their image, and without both, for guidance."""

    text: float = 0.0
    image: float = 0.0
    both: float = 0.0

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: a share in 0..1")
        if self.text + self.image + self.both > 1 + 1e-9:
            raise ValueError(f"text={self.text} + image={self.image} + both={self.both}: at most 1 in all")

    def __call__(self, draws: Draws) -> Dropped:
        """Each sample for itself, by one draw: text only, then both, then image only."""
        r = draws.uniform()
        until_both = self.text + self.both
        return Dropped(text=r < until_both, image=(r >= self.text) & (r < until_both + self.image))


@dataclass(frozen=True)
class Objective:
    """Conditioning noise and guidance drops; the process, prediction and weight are the family's."""

    conditioning: ConditioningNoise = field(default_factory=CleanCondition)
    drops: Drops = field(default_factory=Drops)
    counted: Tensor | None = None  # [h, w], 1 where a latent counts in the loss and 0 where it does not; none: all

    def __post_init__(self) -> None:
        if self.counted is not None and not self.counted.any():
            raise ValueError("counted: nothing is left")

    def __call__(self, family: Family, net: nn.Module, batch: Mapping[str, Tensor], draws: Draws) -> Losses:
        process = family.process
        x0 = batch["latents"].float()
        if "latents_std" in batch:
            x0 = x0 + batch["latents_std"].float() * draws.normal(*x0.shape[1:])
        # What all kinds of conditioning noise share is drawn first: arms of a study differ in nothing else.
        t = process.draw_times(draws)
        eps = draws.normal(*x0.shape[1:])
        dropped = self.drops(draws)
        condition, level = family.condition(batch, self.conditioning, process.unit_time(t), draws)
        condition = family.drop(condition, dropped)
        answer = family.denoise(net, process.add_noise(x0, eps, t), t, condition)
        error = (answer - process.target(family.prediction, x0, eps, t)) ** 2
        if self.counted is not None:
            counted = self.counted.to(error)
            error = error * counted / counted.mean()
        return Losses(family.loss_weight(t) * error.flatten(1).mean(1), t, level)


def edm_weight(sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """EDM's loss weight (Karras et al. 2022, table 1) for networks that answer v, as SVD's does.

    It is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the squared error of x_0, which is the error of v times
    sigma / sqrt(sigma^2 + 1). With sigma_data = 1 nothing remains: the loss is the squared error of v.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data={sigma_data}: above 0")
    return (sigma**2 + sigma_data**2) / ((sigma**2 + 1) * sigma_data**2)
