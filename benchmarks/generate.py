"""Generation over Ray in steady state, two workers, against two bare processes that sample the same share.

    python -m benchmarks.generate

toy `small`, 25 steps with guidance, images encoded and videos written as mp4, four in a part. The bare processes are a
multiprocessing pool of two that calls the same sampler for the same parts, before and after Ray with half of them each.
Rates are of the time in which both workers were busy and started: from when as many parts were finished as there are
workers, to the last part but one, by the times of the parts' files.
"""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks import Row, main
from benchmarks.build import CORES, make_here
from cil import families
from pipelines import generate
from pipelines.config import Config, load

A_PART = 4


def measure(quick: bool) -> list[Row]:
    import ray

    images = 128 if quick else 512
    # The pool as Ray's workers: one thread each; and they as the pool: not behind whatever else runs here.
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_ADDRESS": "local"}
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        os.environ["RAY_TMPDIR"] = folder  # a Ray of our own, whatever else runs here
        given = [f"generate.images={drawn(Path(folder, 'all'), images)}", *made_up(Path(folder, "weights"))]
        half = [f"generate.images={drawn(Path(folder, 'half'), images // 2)}", *given[1:]]
        pools = [by_pool(load(None, [f"out={folder}/before", *half]))]
        ours = steady(load(None, [f"out={folder}/ray", *given]))
        ray.shutdown()
        pools.append(by_pool(load(None, [f"out={folder}/after", *half])))
    print(f"the pool's rates: {pools}")
    bare = float(np.mean(pools))
    return [Row("generate: two bare processes", ours, bare, None, "clips/s", ours / bare, 0.9)]


def drawn(folder: Path, images: int) -> Path:
    folder.mkdir()
    for number in range(images):
        coarse = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48)).save(folder / f"{number:04d}.png")
    return folder


def made_up(folder: Path) -> list[str]:
    """A row of random weights."""
    family, random = families.load("toy", preset="small"), torch.Generator().manual_seed(1)
    folder.mkdir()
    state = family.network(0).state_dict()
    family.export({name: t + 0.05 * torch.randn(t.shape, generator=random) for name, t in state.items()}, folder)
    row = f"generate.rows={{row: {{weights: {folder}, guidance: 2, steps: 25}}}}"
    return ["family.preset=small", row, f"generate.clips_per_part={A_PART}"]


def by_pool(config: Config) -> float:
    with ExitStack() as patched:
        patched.enter_context(mock.patch("pipelines.cluster.connect"))
        patched.enter_context(mock.patch("pipelines.cluster.refuse_unseen"))
        patched.enter_context(mock.patch.object(generate, "make_parts", make_here))
        return steady(config)


def steady(config: Config) -> float:
    made = generate.generate(config)["row"]
    done = sorted(part.stat().st_mtime for part in Path(made.uri, "parts").iterdir())
    assert len(done) > 2 * CORES
    assert made.counts["videos"] == A_PART * len(done)
    return A_PART * len(done[CORES:-1]) / (done[-2] - done[CORES - 1])


if __name__ == "__main__":
    main(__doc__, measure)
