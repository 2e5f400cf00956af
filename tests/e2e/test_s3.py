"""The same jobs on s3:// URIs, against a real S3 endpoint that the test starts."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from cil import InitialNoise
from pipelines import storage
from pipelines.initial_noise import FILE
from pipelines.make_shapes import make_shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-nobody-may-see",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=settings["AWS_ENDPOINT_URL"]).create_bucket(Bucket="webvid")
        yield settings["AWS_ENDPOINT_URL"]
    server.stop()


def job(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"jobs.{name}", "--config", "tests/smallest.yaml", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_files_are_written_listed_and_read(endpoint):
    storage.write("s3://webvid/a/b.bin", b"12")
    assert storage.exists("s3://webvid/a/b.bin")
    assert not storage.exists("s3://webvid/a/c.bin")
    assert storage.names("s3://webvid/a") == {"b.bin"}
    storage.write("s3://webvid/a/c.bin", b"")
    assert storage.names("s3://webvid/a") == {"b.bin", "c.bin"}
    assert storage.names("s3://webvid/nowhere") == set()
    assert storage.read("s3://webvid/a/b.bin") == b"12"


def test_weights_are_copied_once_for_each_version_of_them(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage.write("s3://webvid/model/unet/a.safetensors", b"1")
    storage.write("s3://webvid/model/vae/b.safetensors", b"2")
    storage.write("s3://webvid/model.ckpt", b"3")
    folder = storage.kept_copy("s3://webvid/model")
    assert {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()} == {
        "unet/a.safetensors": b"1",
        "vae/b.safetensors": b"2",
    }
    file = storage.kept_copy("s3://webvid/model.ckpt")
    assert (file.name, file.read_bytes()) == ("model.ckpt", b"3")
    (folder / "mark").touch()
    assert (storage.kept_copy("s3://webvid/model") / "mark").exists()  # not copied again
    storage.write("s3://webvid/model/unet/a.safetensors", b"4")
    assert (storage.kept_copy("s3://webvid/model") / "unet/a.safetensors").read_bytes() == b"4"
    assert not list((tmp_path / "cil").glob(".unfinished-*"))
    storage.write("s3://webvid/model.ckpt", b"5" * 10**6)
    read = "from pipelines.storage import kept_copy; print(kept_copy('s3://webvid/model.ckpt').stat())"
    several = [subprocess.Popen([sys.executable, "-c", read], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate(timeout=60)[0] for process in several}) == 1  # one file, written once
    with pytest.raises(FileNotFoundError, match="there is nothing"):
        storage.kept_copy("s3://webvid/none")


def test_a_file_is_put_whole(endpoint, tmp_path):
    (tmp_path / "local").write_bytes(b"weights")
    storage.put(tmp_path / "local", "s3://webvid/weights/unet/model.safetensors")
    assert storage.read("s3://webvid/weights/unet/model.safetensors") == b"weights"


def test_a_cache_and_its_initial_noise_on_s3_are_those_of_a_disk(endpoint, road, smallest, tmp_path):
    """Videos, cache and noise are on S3, and every byte of them is as on a disk."""
    make_shapes(smallest(tmp_path))
    for path in (tmp_path / "shapes").rglob("*"):
        if path.is_file():
            storage.write(f"s3://webvid/data/{path.relative_to(tmp_path / 'shapes')}", path.read_bytes())
    where = ["out=s3://webvid/out", "catalog.csv=s3://webvid/data/videos.csv", "catalog.videos=s3://webvid/data/videos"]
    for name in ("build_cache", "initial_noise"):
        done = job(name, *where)
        assert done.returncode == 0, done.stderr
    for part in sorted(Path(road.out, "cache/parts").iterdir()):
        assert storage.read(f"s3://webvid/out/cache/parts/{part.name}") == part.read_bytes()
    ours, theirs = (
        InitialNoise.from_bytes(storage.read(f"{out}/initial_noise/{FILE}")) for out in ("s3://webvid/out", road.out)
    )
    assert torch.equal(ours.mean, theirs.mean)
    assert ours.variance == theirs.variance
    for name in ("plan.json", "manifest.json"):
        assert b"a-secret-nobody-may-see" not in storage.read(f"s3://webvid/out/cache/{name}")

    again = job("build_cache", *where)
    assert "nothing to do" in again.stdout


def test_a_store_that_cannot_be_shared_is_refused_with_artifacts_on_s3(endpoint):
    done = job("finetune", "out=s3://webvid/out")
    assert done.returncode == 2
    assert "tracking.uri: with out=s3://webvid/out name an MLflow server" in done.stderr


def test_an_endpoint_that_nobody_answers_at_is_one_line(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = job("initial_noise", "out=s3://webvid/out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "http://127.0.0.1:9" in done.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.stderr
