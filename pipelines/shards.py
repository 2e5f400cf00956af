"""What this rank holds of a training state under DeepSpeed: of every parameter, by its name, a range of its elements.

Each range has four flat float32 tensors: the weights, both moments of Adam, and the average of the weights. Ranges say
nothing of ranks or stages, so what one world size and ZeRO stage has saved, any other takes up.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines import storage

WEIGHTS, AVERAGE = "weights", "average"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Range:
    """Elements `start` to `start + numel` of a parameter, flat."""

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]  # by kind, each [numel]: views of what is trained
    mine: bool = True  # to be saved by this rank: without ZeRO all ranks hold the same


class Shards:
    """Of one engine, in its order of parameters. Made before its first step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.stage: int = engine.zero_optimization_stage()
        self._optimizer = engine.optimizer.optimizer if self.stage else engine.optimizer
        self._counts = "AdamW" not in type(self._optimizer).__name__  # DeepSpeed's for CPUs has an int, not a tensor
        self._make_moments()
        self.ranges = list(self._found())
        self._averages, self._weights = ([r.tensors[kind] for r in self.ranges] for kind in (AVERAGE, WEIGHTS))

    @torch.no_grad()
    def average(self, decay: float) -> None:
        if self.ranges:  # of a small network a rank may hold nothing
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    def restore(self, read: Callable[[str, str, int, int], Tensor], steps: int) -> None:
        """`read(kind, name, start, stop)`. The network itself must have been made with these weights already."""

        def fill(one: Range) -> None:
            with torch.no_grad():  # which is each thread's own
                for kind, tensor in one.tensors.items():
                    tensor.copy_(read(kind, one.name, one.start, one.start + one.numel))

        with ThreadPoolExecutor(storage.AT_ONCE) as pool:
            list(pool.map(fill, self.ranges))
        self._count(steps)

    @torch.no_grad()
    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """In full precision, where DeepSpeed has made its float32 weights of rounded ones."""
        for one in self.ranges:
            for kind in (WEIGHTS, AVERAGE):
                one.tensors[kind].copy_(weights[one.name].view(-1)[one.start : one.start + one.numel])

    @torch.no_grad()
    def exchange(self) -> None:
        """Puts the averages where the weights are, and the weights where the averages are: twice is nothing."""
        for one in self.ranges:
            weights, average = one.tensors[WEIGHTS], one.tensors[AVERAGE]
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        optimizer = self.engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer._partition_all_parameters()  # or what it has gathered to use again would stay as it was
            for low, high in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                low.data.copy_(high.data)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _found(self) -> Any:
        rank, world = dist.get_rank(), dist.get_world_size()
        trained = [(name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad]
        for number, (name, parameter) in enumerate(trained):
            if self.stage == 3:
                start = parameter.ds_tensor.ds_numel * rank
                numel = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))  # without padding
                flat = {
                    kind: self.engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)[0][:numel]
                    for kind, key in ((WEIGHTS, None), *((moment, moment) for moment in MOMENTS))
                }
            elif self.stage:
                if (mapped := parameter._hp_mapping) is None:  # all of it is another rank's
                    continue
                start, numel = mapped.lp_fragment_address.start, mapped.lp_fragment_address.numel
                flat = {WEIGHTS: mapped.hp_fragment} | {m: mapped.get_optim_state_fragment(m) for m in MOMENTS}
            else:
                start, numel = 0, parameter.numel()
                state = self._optimizer.state[parameter]
                flat = {WEIGHTS: parameter.data.view(-1)} | {m: state[m].view(-1) for m in MOMENTS}
            if numel:
                mine = bool(self.stage) or number % world == rank
                yield Range(name, start, numel, flat | {AVERAGE: flat[WEIGHTS].clone()}, mine)

    def _make_moments(self) -> None:
        """Which an optimiser would make at its first step."""
        for flat in self._flats():
            step = 0 if self._counts else torch.zeros((), device=flat.device)
            self._optimizer.state[flat] = {"step": step, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _count(self, steps: int) -> None:
        """So many steps has the optimiser taken."""
        for flat in self._flats():
            state = self._optimizer.state[flat]
            state["step"] = steps if self._counts else torch.full_like(state["step"], steps)
        if self._counts:
            # Its powers of the betas are products of one factor a step: raised at once they would be rounded otherwise.
            (group, *_), nothing = self._optimizer.param_groups, [torch.zeros(1) for _ in range(4)]
            for step in range(1, steps + 1):
                self._optimizer.ds_opt_adam.adam_update(
                    self._optimizer.opt_id, step, 0.0, *group["betas"], 1.0, 0.0, True, *nothing
                )

    def _flats(self) -> list[Tensor]:
        """What the optimiser believes to be its parameters."""
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        if self.stage:
            return list(self.engine.optimizer.single_partition_of_fp32_groups)
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
