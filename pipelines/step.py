"""What shapes a row's weights: a batch on one rank, from its clips to the optimiser's step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cil import Draws, Objective
from cil.families import Family
from pipelines import zero
from pipelines.config import RowConfig
from pipelines.rows import learning_rate


@dataclass(frozen=True)
class Step:
    family: Family
    objective: Objective
    row: RowConfig
    seed: int
    micro_batch: int

    def __call__(
        self, engine: Any, samples: int, positions: list[int], batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        """The losses of these positions of the stream, their times, and the norm of all gradients.

        `samples`: clips seen before.
        """
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.row, samples)
        losses, times, norm = [], [], 0.0
        for begin in range(0, len(positions), self.micro_batch):
            some = slice(begin, begin + self.micro_batch)
            micro = {name: tensor[some].to(engine.device) for name, tensor in batch.items()}
            draws = Draws([(self.seed, p) for p in positions[some]], engine.device)
            loss, t, _ = self.objective(self.family, engine, micro, draws)
            norm = zero.step(engine, loss.mean(), self.row.clip_norm)
            losses.append(loss.detach())
            times.append(t)
        return torch.cat(losses), torch.cat(times), norm
