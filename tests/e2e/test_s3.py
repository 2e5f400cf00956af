"""The same jobs on s3:// URIs, against a real S3 endpoint that the test starts."""

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from in_process import run_job
from processes import ROOT, telling

from cil import InitialNoise
from pipelines import storage
from pipelines.cache import read_cache
from pipelines.catalog import read_catalog
from pipelines.config import CatalogConfig, load
from pipelines.errors import UserError
from pipelines.initial_noise import FILE
from pipelines.make_shapes import make_shapes
from pipelines.reader import ClipReader

pytestmark = pytest.mark.slow

SMALLEST = str(ROOT / "tests/smallest.yaml")


def ended(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"jobs.{name}", "--config", SMALLEST, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module", autouse=True)
def _ray_of_its_own(endpoint) -> Iterator[None]:
    """Whose workers find the endpoint."""
    ray.shutdown()
    yield
    ray.shutdown()


def test_files_are_written_listed_and_read(endpoint):
    storage.write("s3://webvid/a/b.bin", b"12")
    assert storage.exists("s3://webvid/a/b.bin")
    assert not storage.exists("s3://webvid/a/c.bin")
    assert storage.names("s3://webvid/a") == {"b.bin"}
    storage.write("s3://webvid/a/c.bin", b"")
    assert storage.names("s3://webvid/a") == {"b.bin", "c.bin"}
    assert storage.names("s3://webvid/nowhere") == set()
    assert storage.read("s3://webvid/a/b.bin") == b"12"


def test_ranges_are_read_and_there_is_nothing_behind_the_end(endpoint):
    storage.write("s3://webvid/r/digits", b"0123456789")
    storage.write("s3://webvid/r/empty", b"")
    with storage.ranges("s3://webvid/r/digits") as read_at:
        found = [read_at(*place) for place in ((0, 3), (3, 99), (7, -1), (10, 5), (99, 5), (2, 0))]
    assert found == [b"012", b"3456789", b"789", b"", b"", b""]
    assert storage.read_range("s3://webvid/r/digits", 4, 2) == b"45"
    assert storage.read_range("s3://webvid/r/empty", 0, 5) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_range("s3://webvid/r/none", 0, 5)


def test_files_are_found_by_pattern_and_below_a_folder(endpoint):
    for name in ("b.tar", "a.tar", "sub/c.tar", "sub/d.txt", "[a].tar"):
        storage.write(f"s3://webvid/glob/{name}", b"x")
    found = {
        pattern: [uri.removeprefix("s3://webvid/glob/") for uri in storage.glob(f"s3://webvid/glob/{pattern}")]
        for pattern in ("*.tar", "**/*.tar", "*", "[a].tar", "[b].tar", "a.tar", "none.tar", "none/*.tar")
    }
    assert found == {
        "*.tar": ["[a].tar", "a.tar", "b.tar"],
        "**/*.tar": ["[a].tar", "a.tar", "b.tar", "sub/c.tar"],
        "*": ["[a].tar", "a.tar", "b.tar"],
        "[a].tar": ["[a].tar"],
        "[b].tar": ["b.tar"],
        "a.tar": ["a.tar"],
        "none.tar": [],
        "none/*.tar": [],
    }
    for folder in ("s3://webvid/glob", "s3://webvid/glob/"):
        assert storage.files_below(folder) == ["[a].tar", "a.tar", "b.tar", "sub/c.tar", "sub/d.txt"]
    assert storage.files_below("s3://webvid/none") == []


class Requests(logging.Handler):
    """What the S3 endpoint says it answered."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def requests(endpoint):
    handler, logger = Requests(), logging.getLogger("werkzeug")
    before = logger.level
    logger.setLevel(logging.INFO)  # other tests make it silent
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def shard(keys: list[str]) -> bytes:
    """As video2dataset writes them: videos of more than one read."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for key in keys:
            about = json.dumps({"videoid": key, "url": "https://example.org/" + "x" * 2000}).encode()
            for name, content in (
                (f"{key}.mp4", key.encode() * 20_000),
                (f"{key}.txt", f"of {key}".encode()),
                (f"{key}.json", about),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_a_file_is_read_by_one_request(endpoint, requests):
    storage.write("s3://webvid/one/file", b"12")
    requests.clear()
    assert storage.read("s3://webvid/one/file") == b"12"
    assert len([line for line in requests if "/webvid/one/file" in line]) == 1


def test_tars_are_indexed_with_a_request_a_sample_and_without_their_videos(endpoint, requests, tmp_path):
    keys = {f"{i:05d}.tar": [f"{i:05d}{j:04d}" for j in range(12)] for i in range(5)}
    whole = 0
    for name, inside in keys.items():
        data = shard(inside)
        whole += len(data)
        storage.write(f"s3://webvid/shards/{name}", data)
        (tmp_path / name).write_bytes(data)
    requests.clear()
    catalog = read_catalog(CatalogConfig(tars="s3://webvid/shards/*.tar"), "")
    gets = {name: sum(f"GET /webvid/shards/{name} " in line for line in requests) for name in keys}
    assert set(gets.values()) == {12 + 1}, gets  # the first header, and then one for each sample
    assert len(catalog) == 60
    assert catalog.digest == read_catalog(CatalogConfig(tars=f"{tmp_path}/*.tar"), "").digest
    for video in catalog.videos(0, 60):
        name, key = video.videoid.split("~")
        assert (video.sources, video.caption) == ((f"s3://webvid/shards/{name}.tar",), f"of {key}")
        assert storage.read_range(*video.sources, video.offset, video.size) == key.encode() * 20_000


def test_a_tar_is_indexed_once_for_each_version_of_it(endpoint, requests, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = CatalogConfig(tars="s3://webvid/again/*.tar")
    for name in ("a", "b"):
        storage.write(f"s3://webvid/again/{name}.tar", shard([f"{i:09d}" for i in range(12)]))

    def asked() -> tuple[str, list[int]]:
        requests.clear()
        digest = read_catalog(config, "").digest
        return digest, [sum(f"GET /webvid/again/{name}.tar " in line for line in requests) for name in ("a", "b")]

    first, gets = asked()
    assert gets == [13, 13]
    assert asked() == (first, [0, 0])
    storage.write("s3://webvid/again/b.tar", shard([f"{i:09d}" for i in range(1, 13)]))  # as many bytes
    other, gets = asked()
    assert other != first
    assert gets == [0, 13]
    monkeypatch.setattr("pipelines.catalog.code", lambda module: "another parser")
    assert asked() == (other, [13, 13])


def test_a_cut_tar_on_s3_is_what_it_is_on_a_disk(endpoint, tmp_path):
    data = shard(["a", "b", "c"])
    for cut in (512, 20_000, 30_000, 70_000, len(data) - 10_240):
        (tmp_path / "t.tar").write_bytes(data[:cut])
        storage.write("s3://webvid/cut/t.tar", data[:cut])
        there, here = (
            read_catalog(CatalogConfig(tars=f"{folder}/t.tar"), "") for folder in ("s3://webvid/cut", tmp_path)
        )
        assert there.digest == here.digest
        assert "damaged_tar" in [video.problem for video in there.videos(0, 9)]
    storage.write("s3://webvid/cut/html.tar", b"<html>")
    storage.write("s3://webvid/cut/none.tar", b"")
    for name in ("html", "none"):
        with pytest.raises(UserError, match=rf"catalog\.tars=s3://webvid/cut/{name}\.tar: is no tar"):
            read_catalog(CatalogConfig(tars=f"s3://webvid/cut/{name}.tar"), "")


def test_csvs_tars_and_folders_of_disk_and_s3_are_one_catalog(endpoint, tmp_path):
    (tmp_path / "a.csv").write_text("videoid,name\n1,here\n")
    storage.write("s3://webvid/mixed/b.csv", "videoid,name,page_dir\n2,café,p\n".encode())
    storage.write("s3://webvid/mixed/set/sub/3.mp4", b"v")
    storage.write("s3://webvid/mixed/set/sub/3.txt", b"there\n")
    storage.write("s3://webvid/mixed/set/sub/notes.pdf", b"x")
    (tmp_path / "t.tar").write_bytes(shard(["k"]))
    config = CatalogConfig(
        csv=[f"{tmp_path}/a.csv", "s3://webvid/mixed/*.csv"],
        videos=[str(tmp_path), "s3://webvid/v"],
        tars=f"{tmp_path}/t.tar",
        folder="s3://webvid/mixed/set/",
    )
    catalog = read_catalog(config, "")
    assert [(v.videoid, v.caption, v.sources) for v in catalog.videos(0, len(catalog))] == [
        ("1", "here", (f"{tmp_path}/1.mp4", "s3://webvid/v/1.mp4")),
        (
            "2",
            "café",
            (f"{tmp_path}/p/2.mp4", f"{tmp_path}/2.mp4", "s3://webvid/v/p/2.mp4", "s3://webvid/v/2.mp4"),
        ),
        ("sub~3", "there", ("s3://webvid/mixed/set/sub/3.mp4",)),
        ("t~k", "of k", (f"{tmp_path}/t.tar",)),
    ]
    for key in ("csv", "tars", "folder"):
        with pytest.raises(UserError, match=rf"catalog\.{key}=s3://nobucket/x"):
            read_catalog(CatalogConfig(**{key: "s3://nobucket/x"}), "")


def test_a_cache_is_made_of_tars_on_s3(endpoint, smallest, tmp_path):
    config = smallest(tmp_path)
    make_shapes(config)
    files = sorted((tmp_path / "shapes/videos").rglob("*.mp4"))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for file in files:
            tar.add(file, file.name)
    storage.write("s3://webvid/packed/0.tar", data.getvalue())
    run_job("build_cache", "--config", SMALLEST, f"out={tmp_path}", "catalog.tars=s3://webvid/packed/*.tar")
    (manifest,) = tmp_path.glob("cache/snapshots/*/manifest.json")
    counts = json.loads(manifest.read_text())["counts"]
    assert counts["clips"] == config.shapes.videos * config.cache.views_per_video
    assert counts["rejected_videos"] == len(files) - config.shapes.videos


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


def test_a_cache_and_its_initial_noise_on_s3_are_those_of_a_disk(endpoint, road, smallest, tmp_path, capsys):
    """Videos, cache and noise are on S3, and every byte of them is as on a disk."""
    make_shapes(smallest(tmp_path))
    for path in (tmp_path / "shapes").rglob("*"):
        if path.is_file():
            storage.write(f"s3://webvid/data/{path.relative_to(tmp_path / 'shapes')}", path.read_bytes())
    where = ["--config", SMALLEST, "out=s3://webvid/out"]
    where += ["catalog.csv=s3://webvid/data/videos.csv", "catalog.videos=s3://webvid/data/videos"]
    for name in ("build_cache", "initial_noise"):
        run_job(name, *where)
    for part in sorted(Path(road.out, "cache/parts").iterdir()):
        assert storage.read(f"s3://webvid/out/cache/parts/{part.name}") == part.read_bytes()
    ours, theirs = (
        InitialNoise.from_bytes(storage.read(f"{out}/initial_noise/{FILE}")) for out in ("s3://webvid/out", road.out)
    )
    assert torch.equal(ours.mean, theirs.mean)
    assert ours.variance == theirs.variance
    for name in storage.files_below("s3://webvid/out"):
        assert b"a-secret-nobody-may-see" not in storage.read(f"s3://webvid/out/{name}"), name
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    assert telling("a-secret-nobody-may-see", logs) == []
    reader = ClipReader(read_cache(load(None, ["out=s3://webvid/out", "family.frames=8", "family.height=24"])), "train")
    beside = ClipReader(read_cache(road), "train")
    wanted = [[5, 1], [0], [2, 3], [1, 5, 4]]
    batches = [[batch["latents"] for batch in each.ahead(iter(wanted))] for each in (reader, beside)]
    assert [len(latents) for latents in batches[0]] == [2, 1, 2, 3]
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))

    capsys.readouterr()
    run_job("build_cache", *where)
    assert "nothing to do" in capsys.readouterr().out

    base = road.finetune.rows["base"]
    run_job(
        "finetune",
        *where,
        *(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "generate.rows={}", "compare.claims=[]"),
        f"finetune.rows={json.dumps({'base': base})}",
    )
    for kind in ("raw", "ema"):
        file = f"weights/base/{kind}/toy.safetensors"
        assert storage.read(f"s3://webvid/out/{file}") == Path(road.out, file).read_bytes()


def test_a_store_that_cannot_be_shared_is_refused_with_artifacts_on_s3(endpoint):
    done = ended("finetune", "out=s3://webvid/out")
    assert done.returncode == 2
    assert "tracking.uri: with out=s3://webvid/out name an MLflow server" in done.stderr


def test_an_endpoint_that_nobody_answers_at_is_one_line(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = ended("initial_noise", "out=s3://webvid/out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "http://127.0.0.1:9" in done.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.stderr
