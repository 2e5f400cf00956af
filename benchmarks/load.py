"""Memory and time to load a DynamiCrafter checkpoint of the published size, against the plain way to do it.

    python -m benchmarks.load

The file has all names and shapes of the published one, in fp16, so that the plain way, which holds it twice, fits into
the memory of an ordinary machine; it is written to the folder for temporary files (5 GB, TMPDIR moves it) and deleted.
The plain way is torch.load into memory and load_state_dict into a network that was initialised. Each runs in a process
of its own and then uses every weight. Memory is the largest that the process ever held, with 0.25 GiB that torch itself
takes; the file is in the page cache. With --quick a tenth of the names, without goals: torch outweighs them.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import Row, alternately, main, paired
from cil.checkpoints import load_into, read, write_lvdm

ROOT = Path(__file__).parents[1]
NAMES = ROOT / "tests" / "cil" / "golden" / "dynamicrafter_checkpoint_full_keys.json"
LIMIT = 1.15  # times the file


def shapes(every: int) -> dict[str, list[int]]:
    return dict(list(json.loads(NAMES.read_text()).items())[::every])


def network(shapes: dict[str, list[int]]) -> nn.Module:
    """Modules nested as the names say, initialised as linear layers are, unless on the meta device."""
    net = nn.Module()
    for name, shape in shapes.items():
        *parents, last = name.split(".")
        place = net
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=torch.float16)))
        if not place.get_parameter(last).is_meta:
            nn.init.uniform_(place.get_parameter(last), -0.02, 0.02)
    return net


def write(path: Path, shapes: dict[str, list[int]]) -> None:
    """Each tensor is a part of one block of memory, and so is written as one of its own."""
    block = torch.rand(max(map(math.prod, shapes.values())) + 1, generator=torch.Generator().manual_seed(0)).half()
    state = {name: block[: math.prod(shape)].reshape(shape) for name, shape in shapes.items()}
    write_lvdm(path, state)


def ours(path: str, every: int) -> nn.Module:
    with torch.device("meta"):
        net = network(shapes(every))
    load_into(net, read(path))
    return net


def plain(path: str, every: int) -> nn.Module:
    net = network(shapes(every))
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return net


def used(net: nn.Module) -> float:
    def total(weights: Tensor) -> float:
        return float(weights.detach().flatten()[::1024].float().sum())  # of each page of memory

    return sum(map(total, net.parameters()))


def load(way: str, path: str, every: str) -> None:
    """In a process of its own: seconds and the peak of memory."""
    begin = time.perf_counter()
    checked = used({"ours": ours, "plain": plain}[way](path, int(every)))
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": peak, "sum": checked}))


def measure(quick: bool) -> list[Row]:
    every = 10 if quick else 1
    found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}

    def run(way: str, path: Path) -> None:
        program = f"import sys; from benchmarks.load import load; load({way!r}, *sys.argv[1:])"
        command = [sys.executable, "-c", program, str(path), str(every)]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[way].append(json.loads(answer.stdout))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        write(path, shapes(every))
        size = path.stat().st_size / 2**30
        alternately(lambda: run("ours", path), lambda: run("plain", path), rounds=1 if quick else 3)
    assert len({run["sum"] for runs in found.values() for run in runs}) == 1, "the two ways loaded different weights"
    seconds, peaks = ([[run[what] for run in found[way][1:]] for way in found] for what in ("seconds", "peak"))
    mine, theirs = (max(peak) / 2**30 for peak in peaks)
    fast, slow = (sorted(times)[len(times) // 2] for times in seconds)
    goals = [None, None, None] if quick else [1 / LIMIT, 1.0, 1.0]
    return [
        Row("load: the file itself, peak memory", mine, size, size, "GiB", size / mine, goals[0]),
        Row("load: torch.load, peak memory", mine, theirs, size, "GiB", theirs / mine, goals[1]),
        Row("load: torch.load, time", fast, slow, None, "s", paired(seconds[1], seconds[0]), goals[2]),
    ]


if __name__ == "__main__":
    main(__doc__, measure)
