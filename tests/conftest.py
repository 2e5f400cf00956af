"""What several tests start from: the smallest configuration, and one undisturbed run of it."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer
from xdist.scheduler import LoadFileScheduling

from jobs import paper
from pipelines import storage
from pipelines.config import Config, load

os.environ.setdefault("RAY_worker_niceness", "0")  # else a test beside one of Ray's leaves it no core

SMALLEST = Path(__file__).with_name("smallest.yaml")
ROOT = Path(__file__).parents[1]
USED = ("cil", "pipelines", "jobs", "infra/deepspeed")


class Together(LoadFileScheduling):
    """Of two processes of pytest one has tests/e2e, one after the other: they are about what happens in time, and wait
    more than they compute. Of the others each file stays together, and each of COMPUTING, which are chosen so that both
    processes end at about the same time.
    """

    COMPUTING = ("test_kills.py", "test_s3.py", "test_scoring.py")

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "e2e" if "tests/e2e/" in file and not file.endswith(self.COMPUTING) else file


@pytest.hookimpl(optionalhook=True)  # unknown with -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together | None:
    return Together(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Networks here are so small that threads waiting for each other cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smallest() -> Callable[..., Config]:
    """smallest(out, "key=value", ...) -> the smallest configuration under that folder."""
    return lambda out, *overrides: load(SMALLEST, [f"out={out}", *overrides])


@pytest.fixture(scope="session")
def road(smallest: Callable[..., Config], request: pytest.FixtureRequest) -> Config:
    """The whole road walked once, undisturbed. Tests read its artifacts and leave them as they are.

    It is kept for later tests of the same code, as long as no file of it changes: pytest's --cache-clear walks it anew.
    """
    folder = request.config.cache.mkdir(f"road-{_code()}")
    made, walked = folder / "made.json", folder / "out"
    config = smallest(walked)
    with (folder / "lock").open("w") as lock:  # several workers of pytest want it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or json.loads(made.read_text()) != _files(walked):
            made.unlink(missing_ok=True)
            shutil.rmtree(walked, ignore_errors=True)
            paper.run(config)
            storage.write(str(made), json.dumps(_files(walked)).encode())
    return config


def _code() -> str:
    """Of whatever the road depends on, and which Python runs it."""
    files = [SMALLEST, ROOT / "constraints.txt"]
    files += [file for name in USED for file in (ROOT / name).rglob("*") if file.is_file() and file.suffix != ".pyc"]
    told = [(str(file.relative_to(ROOT)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in sorted(files)]
    return hashlib.sha256(json.dumps([sys.executable, told]).encode()).hexdigest()[:16]


def _files(folder: Path) -> dict[str, list[int]]:
    found = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in sorted(found.items())}


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    """For jobs whose number of workers does not matter: Ray has one CPU, and starts half the processes."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 1}')
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server with an empty bucket `webvid`, which this process and its children find by the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    url = "http://{}:{}".format(*server.get_host_and_port())
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-nobody-may-see",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("kept")),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # they remember the endpoint of another module's tests
        boto3.client("s3").create_bucket(Bucket="webvid")
        yield url
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    server.stop()
