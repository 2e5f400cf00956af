"""What a network in training does with held-out clips: its loss at fixed times, how much its one-step prediction moves
at each of them (where leakage shows), and clips that it samples from the same noise each time.

All ranks take part, each with its own clips. The conditional image is clean, as when sampling.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cil import CleanCondition, Draws, InitialNoise, sample
from cil.families import Family
from cil.metrics.leakage import one_step
from pipelines.cache import Cache
from pipelines.config import Config
from pipelines.reader import ClipReader, SampleOrder
from pipelines.video import encode, sheet

TIMES = 10
SEED = 0x0FF  # of keys of three numbers, where those of training have two
FPS = 8


class Validation:
    def __init__(self, config: Config, family: Family, cache: Cache) -> None:
        self.family, self.settings = family, config.finetune.validation
        self.clips = ClipReader(cache, "validation")
        order = SampleOrder(len(self.clips), SEED)
        self.numbers = [order(i) for i in range(min(len(self.clips), self.settings.clips))]
        self.times = family.process.times(TIMES).flip(0)  # rising

    @torch.no_grad()
    def __call__(self, net: Any, device: torch.device) -> tuple[dict[str, float], dict[str, bytes]]:
        """Figures, the same on all ranks, and on rank 0 files to look at."""
        rank, world = dist.get_rank(), dist.get_world_size()
        sums = torch.zeros(3, TIMES + 1, dtype=torch.float64)  # loss, motion, count; last the truth's
        for i in range(0, len(self.numbers), world):
            # ZeRO 3 calls the network on all ranks together: who has no clip left takes the last one, uncounted.
            number = self.numbers[min(i + rank, len(self.numbers) - 1)]
            sums += self.measured(net, number, device) * (i + rank < len(self.numbers))
        gathered = [torch.zeros_like(sums) for _ in range(world)]
        dist.all_gather_object(gathered, sums)
        loss, motion, count = torch.stack(gathered).sum(0)
        values = {"validation/motion_true": float(motion[-1] / count[-1])}
        for k, t in enumerate(self.family.process.unit_time(self.times).tolist()):
            values[f"validation/loss_t{1000 * t:03.0f}"] = float(loss[k] / count[k])
            values[f"validation/motion_t{1000 * t:03.0f}"] = float(motion[k] / count[k])
        values["validation/loss"] = float(loss[:-1].sum() / count[:-1].sum())
        return values, self.media(net, device)

    def measured(self, net: Any, number: int, device: torch.device) -> Tensor:
        batch = {name: tensor.to(device) for name, tensor in self.clips.batch([number]).items()}
        found = one_step(self.family, net, batch, self.times, (SEED, number))
        rows = [*found.loss, 0.0], [*found.motion, found.truth], [1.0] * (TIMES + 1)
        return torch.tensor(rows, dtype=torch.float64)

    def media(self, net: Any, device: torch.device) -> dict[str, bytes]:
        """Sampled clips: a video of each, and a sheet of their first, middle and last frames."""
        numbers = self.numbers[: self.settings.samples]
        if not numbers:
            return {}
        family = self.family
        batch = {name: tensor.to(device) for name, tensor in self.clips.batch(numbers).items()}
        condition, _ = family.condition(batch, CleanCondition(), torch.zeros(len(numbers), device=device), None)
        times = family.process.times(self.settings.steps)
        draws = Draws([(SEED, number, TIMES) for number in numbers], device)
        x = InitialNoise.standard(family.latent_shape).sample(family.process, times[0], len(numbers), draws)
        latents = sample(
            lambda x_t, t: family.denoise(net, x_t, t, condition), x, family.process, times, family.prediction
        )
        if dist.get_rank():
            return {}
        clips = family.decode(latents).cpu()
        return {"sheet.png": sheet(list(clips))} | {f"{i}.mp4": encode(clip, FPS) for i, clip in enumerate(clips)}
