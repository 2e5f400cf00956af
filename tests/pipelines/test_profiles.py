"""infra/deepspeed: DeepSpeed takes every profile as it stands, and what it needs of memory is what the docs say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from processes import free_port
from torch import nn

from pipelines import memory, zero
from pipelines.config import RowConfig

NAMES = sorted(path.stem for path in zero.PROFILES.glob("*.json"))
PAGE = Path(__file__).parents[2] / "docs/training.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of a small net after three steps by each profile, on one rank, which loads no compiler for them."""
    folder = tmp_path_factory.mktemp("profiles")
    mp.start_processes(_train, (free_port(), str(folder)), 1, start_method="spawn")
    return {name: torch.load(folder / f"{name}.pt") for name in NAMES}


def _train(rank: int, port: int, folder: str) -> None:
    told = {"RANK": rank, "WORLD_SIZE": 1, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    torch.set_num_threads(1)
    zero.import_deepspeed(gpu=False)
    import torch.distributed as dist

    from pipelines.shards import WEIGHTS, Shards

    dist.init_process_group("gloo")
    row = RowConfig(batch=4, lr=1e-2, clip_norm=0.1)
    for name in NAMES:
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)), torch.randn(4, 8)
        engine = zero.engine_of(net, zero.profile_of(name), row, 4, 1)
        shards = Shards(engine)
        for _ in range(3):
            zero.step(engine, (engine(x) - x).square().mean(), row.clip_norm)
        state = {one.name: one.tensors[WEIGHTS].clone() for one in shards.ranges}
        torch.save(state, Path(folder, f"{name}.pt"))
        engine.destroy()
    dist.destroy_process_group()
    assert "torch._inductor.compile_fx" not in sys.modules


def test_deepspeed_does_not_wait_for_mlflow_which_is_there_afterwards():
    code = (
        "import sys; from importlib.util import find_spec; from pipelines import zero; zero.import_deepspeed(gpu=False)"
    )
    code += "; print('deepspeed' in sys.modules, 'mlflow' in sys.modules, find_spec('mlflow') is not None)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "True False True"


def test_there_is_a_profile_of_each_stage_and_each_is_tried_by_default():
    assert {zero.stage_of(zero.profile_of(name)) for name in NAMES} == {0, 1, 2, 3}
    assert {"zero-0", *memory.BY_DEFAULT} == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_takes_every_profile_and_trains_the_same_weights_by_it(name, trained):
    """Offload has another Adam, of DeepSpeed's own."""
    torch.manual_seed(0)
    before = dict(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)).named_parameters())
    assert trained[name].keys() == before.keys()
    for key, weights in trained[name].items():
        assert float((weights - before[key].detach().view(-1)).abs().max()) > 1e-2
        torch.testing.assert_close(weights, trained["zero-0"][key], rtol=1e-4, atol=1e-5)


def test_the_table_of_the_page_is_the_one_that_is_computed():
    """`python -m pipelines.memory` prints it."""
    assert memory.table() in PAGE.read_text()


def test_a_rank_needs_what_its_stage_leaves_it():
    """16 bytes a parameter in float32 are Adam's moments, the average and the weights themselves; gradients are 4."""

    def bytes_of(name: str, world: int, precision: str, frozen: int = 0) -> float:
        return memory.bytes_a_rank(zero.profile_of(name), 1000, frozen, world, precision)

    assert bytes_of("zero-0", 4, "float32") == 20 * 1000
    # A float32 copy of the weights beside the weights, though both are float32.
    assert bytes_of("zero-1", 4, "float32") == 8 * 1000 + 16 * 250
    assert bytes_of("zero-1", 4, "bfloat16") == 4 * 1000 + 16 * 250
    assert bytes_of("zero-2", 4, "bfloat16") == 2 * 1000 + 18 * 250
    assert bytes_of("zero-3", 4, "bfloat16", frozen=400) == 2 * 350 + 18 * 250
    assert bytes_of("zero-2-offload", 4, "bfloat16") == 2 * 1000 + 2 * 250
    assert bytes_of("zero-3-offload", 4, "bfloat16", frozen=400) == 2 * 250
