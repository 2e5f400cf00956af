"""Training on several ranks without Ray: each rank a process of its own, as under Ray Train."""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from pipelines import zero
from pipelines.config import Config

Job = tuple[dict[str, Any], str]  # a configuration, and the DeepSpeed profile of its training


class Interrupted(Exception):
    pass


def train(world: int, jobs: list[Job], until: int | None = None) -> list[dict[str, list[Any]]]:
    """The row `base` of each job in turn; answers what was seen of each. `until`: to be interrupted after so many."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (world, port, jobs, until), world, start_method="spawn")
    return [json.loads(Path(config["out"], f"seen-{world}.json").read_text()) for config, _ in jobs]


def _rank(rank: int, world: int, port: int, jobs: list[Job], until: int | None) -> None:
    told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    torch.set_num_threads(1)
    zero.prepare(gpu=False)
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
            if until and self.samples >= until:
                self.writer.wait()
                raise Interrupted
            return False

    for dumped, profile in jobs:
        config = Config.model_validate(dumped)
        cache, row = read_cache(config), config.training_rows()["base"]
        made = plan_weights(config, family_of(config), "base", row, cache, {})
        made.begin("{}")
        trainer = Seen(config, "base", row, made, cache, zero.profile_of(profile), lambda *_: None)
        trainer.seen, trainer.leaving = [], trainer.leave
        with contextlib.suppress(Interrupted):
            trainer.train()
        if rank == 0:
            Path(config.out, f"seen-{world}.json").write_text(json.dumps(trainer.seen))
        dist.barrier()
    dist.destroy_process_group()
