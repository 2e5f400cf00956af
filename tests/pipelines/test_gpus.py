"""cache.gpus: what decides where a cache is encoded."""

import subprocess
import sys

import pytest
import torch

from pipelines.cache import build_cache, read_cache
from pipelines.reader import ClipReader

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_a_worker_takes_a_gpu_if_it_has_a_share_of_one_and_never_else(tmp_path, settings, here, monkeypatch, cache):
    """Where PyTorch says that there is one, and fails if it is asked for it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    family = ("family.name=svd", "family.height=32", "family.width=32")
    build_cache(settings(tmp_path / "cpu", *family, "cache.gpus=0"))
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        build_cache(settings(tmp_path / "gpu", *family, "cache.gpus=0.5"))


@no_gpu
@pytest.mark.slow
def test_more_gpus_than_the_cluster_has_are_one_line_and_exit_2(tmp_path, videos):
    sizes = ("family.preset=tiny", "family.frames=2", "family.height=16", "family.width=16")
    told = (f"out={tmp_path}", f"catalog.folder={videos}", *sizes, "cache.gpus=1")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.build_cache", *told], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    wanted = "build_cache: cache.gpus=1.0: the cluster has 0 GPUs; 0 encodes on CPUs"
    assert done.stderr.strip().splitlines()[-1] == wanted
    assert "Traceback" not in done.stderr


CLUSTER = """
import sys
import ray
from pipelines import cluster
from pipelines.cache import build_cache
from pipelines.config import load
from pipelines.errors import UserError

ray.init("local", num_cpus=4, num_gpus=3, log_to_driver=False)
try:
    build_cache(load(sys.argv[1]))
except UserError as error:
    print("refused:", error)
cluster._sees_gpu = lambda: True
print("workers:", *(cluster.workers(gpus) for gpus in (0, 0.7, 1, 0.3)))
build_cache(load(sys.argv[1]))
"""


@no_gpu
@pytest.mark.slow
def test_gpus_that_ray_has_and_pytorch_does_not_see_are_refused_and_shares_of_them_are_workers(
    tmp_path, settings, cache
):
    """A cluster that only says it has three."""
    config, file = settings(tmp_path / "gpu", "cache.gpus=0.7"), tmp_path / "config.yaml"
    file.write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, file], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("refused: cache.gpus=0.7: PyTorch sees no GPU where Ray has one")
    assert said[1] == "workers: 4 3 3 4"  # none has parts of two GPUs, and each has a CPU
    assert read_cache(config).fingerprint == cache.fingerprint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["dynamicrafter", "svd", "i2vgenxl"])
def test_a_cache_made_on_a_gpu_is_that_of_a_cpu_but_for_rounding(name, tmp_path, settings, here):
    family = (f"family.name={name}", "family.height=32", "family.width=32")
    one, other, again = (
        build_cache(settings(tmp_path / folder, *family, f"cache.gpus={gpus}"))
        for folder, gpus in (("cpu", 0), ("gpu", 1), ("again", 1))
    )
    assert again.fingerprint == other.fingerprint  # the same bytes on the same kind of device
    readers = [ClipReader(cache, None) for cache in (one, other)]
    wanted, found = (reader.batch(range(len(reader)))["latents"].double() for reader in readers)
    assert (found - wanted).abs().max() < 0.03 * wanted.std() + 1e-3  # tests/cil/test_devices.py says why
