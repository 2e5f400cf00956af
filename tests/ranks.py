"""Training on several ranks without Ray: each rank a process of its own, as under Ray Train."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from processes import free_port

from pipelines import zero
from pipelines.config import Config
from pipelines.errors import UserError

Job = tuple[dict[str, Any], str]  # a configuration, and the DeepSpeed profile of its training
Meanwhile = Callable[[Any], bool]  # what is done at each point of the curve, told the trainer: is its node leaving?


class Interrupted(Exception):
    pass


class Attempt(NamedTuple):
    seen: list[Any]  # position, number of the clip, loss
    error: str  # that ended it


def train(world: int, jobs: list[Job], until: int | None = None) -> list[list[Any]]:
    """The row `base` of each job in turn; answers what was seen of each. `until`: to be interrupted after so many."""
    made = attempts(world, jobs, until)
    assert not [each.error for each in made if each.error]
    return [each.seen for each in made]


def attempts(
    world: int, jobs: list[Job], until: int | None = None, meanwhile: Meanwhile | None = None
) -> list[Attempt]:
    """`meanwhile`: a function of a module, as another process has to find it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, free_port(), jobs, until, meanwhile, folder), world, start_method="spawn")
        return [Attempt(*json.loads(Path(folder, str(i)).read_text())) for i in range(len(jobs))]


def _rank(
    rank: int, world: int, port: int, jobs: list[Job], until: int | None, meanwhile: Meanwhile | None, folder: str
) -> None:
    told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    torch.set_num_threads(1)
    zero.import_deepspeed(gpu=False)
    import torch.distributed as dist

    dist.init_process_group("gloo")
    from pipelines.cache import read_cache
    from pipelines.models import family_of
    from pipelines.trainer import RowTrainer
    from pipelines.weights import plan_weights

    class Seen(RowTrainer):
        """Keeps what each step had and gave."""

        seen: list[Any]

        def refuse_not_finite(self, positions: list[int], losses: torch.Tensor, norm: float) -> None:
            everybodys: list[Any] = [None] * self.world
            mine = [(p, self.order(p), float(loss)) for p, loss in zip(positions, losses, strict=True)]
            dist.all_gather_object(everybodys, mine)
            self.seen += sorted(one for each in everybodys for one in each)
            super().refuse_not_finite(positions, losses, norm)

        def leave(self) -> bool:
            leaving = bool(meanwhile and meanwhile(self))
            if until and self.samples >= until:
                self.writer.wait()
                raise Interrupted
            return leaving

    for i, (dumped, profile) in enumerate(jobs):
        config = Config.model_validate(dumped)
        cache, row = read_cache(config), config.training_rows()["base"]
        made = plan_weights(config, family_of(config), "base", row, cache, {})
        made.begin("{}")
        trainer = Seen(config, "base", row, made, cache, zero.profile_of(profile), lambda *_: None)
        trainer.seen, trainer.leaving, error = [], trainer.leave, ""
        try:
            trainer.train()
        except Interrupted:
            pass
        except (UserError, OSError) as raised:
            error = str(raised)
        if hasattr(trainer, "writer"):  # one that has come to its end is closed
            trainer.close()
        if rank == 0:
            Path(folder, str(i)).write_text(json.dumps([trainer.seen, error]))
        dist.barrier()
    dist.destroy_process_group()
