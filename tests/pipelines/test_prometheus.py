"""What jobs tell while they run, as a node of Ray's tells it to Prometheus; and that nobody misses Ray."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cache import read_cache
from pipelines.metrics import COUNTED, METRICS

ROOT = Path(__file__).parents[2]
ALONE = """
import sys
from pipelines.metrics import METRICS, count

for metric in METRICS:
    metric(1.0, "of nobody")
count("cache", {"clips": 3})
print("ray" in sys.modules)
import ray
for metric in METRICS:
    metric(1.0, "of nobody")
print(ray.is_initialized())
"""

RUN = r"""
import os, socket, sys, threading, time, urllib.request
from contextlib import suppress
from pipelines import zero

zero.import_deepspeed(gpu=False)
import ray
import torch.distributed as dist
from pipelines.cache import build_cache
from pipelines.config import load
from pipelines.metrics import METRICS
from pipelines.models import family_of
from pipelines.trainer import RowTrainer
from pipelines.weights import plan_weights


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def scrape():
    while True:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            told.update(line.decode().rsplit(" ", 1) for line in answer if line.startswith(b"ray_"))
        time.sleep(0.2)


config, port, told = load(sys.argv[1]), free_port(), {}
often = {"metrics_report_interval_ms": 1000}
ray.init("local", num_cpus=2, _metrics_export_port=port, _system_config=often, log_to_driver=False)
threading.Thread(target=scrape, daemon=True).start()
cache = build_cache(config)

alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
os.environ |= {name: str(value) for name, value in alone.items()}
dist.init_process_group("gloo")
row = config.training_rows()["base"]
made = plan_weights(config, family_of(config), "base", row, cache, {})
made.begin("{}")
RowTrainer(config, "base", row, made, cache, zero.profile_of("zero-1"), lambda *told: None).train()

deadline = time.monotonic() + 60
while True:
    found = list(told.items())
    steps = any("cil_step_seconds_count" in name and float(value) == 4 for name, value in found)
    if steps and all(any(metric.name in name for name, _ in found) for metric in METRICS):
        break
    assert time.monotonic() < deadline, found
    time.sleep(0.1)
print(*(f"{name} {value}" for name, value in found), sep="\n")
"""


def test_without_ray_nothing_is_told_and_nothing_is_imported():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.slow
def test_a_node_of_ray_tells_prometheus_what_its_jobs_tell(settings, tmp_path):
    """Its port asks for no token: infra/kubernetes/services/network.yaml says who may reach it."""
    config = settings(
        tmp_path,
        "finetune.rows={base: {weights: null, samples: 32, batch: 8, warmup: 0}}",
        *("finetune.workers=1", "finetune.log_every=8", "finetune.checkpoint_every=16"),
    )
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", RUN, file], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = {}
    for name, labels, value in re.findall(r"^ray_(cil_\w+)\{(.*)\} (\S+)$", done.stdout, re.MULTILINE):
        own = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        (metric,) = (each for each in METRICS if name.startswith(each.name))
        if own.get("le", "+Inf") == "+Inf":
            told[name, own[metric.label]] = float(value)
    cache = read_cache(config)
    assert {name: told[f"cil_{name}_total", "cache"] for name in COUNTED} == {
        "videos": cache.counts["planned"] / config.cache.views_per_video,
        "clips": cache.counts["clips"],
        "rejected_videos": cache.counts["rejected_videos"],
        "bytes": sum(part["bytes"] for part in cache.parts),
    }
    assert told["cil_rejected_videos_total", "cache"] > 0
    assert told["cil_step_seconds_count", "base"] == told["cil_step_seconds_bucket", "base"] == 32 / 8
    assert told["cil_progress", "cache"] == 1
    assert told["cil_loss", "base"] > 0
    assert told["cil_samples_per_second", "base"] > 0
    assert 0 <= told["cil_data_wait", "base"] < 1
    assert told["cil_checkpoint_seconds", "base"] > 0
    assert 0 < told["cil_busy", "encoding"] <= 1
    assert "ray_node_cpu_utilization{" in done.stdout  # Ray's own, which the dashboard asks for too
