"""A build of a latent cache that is disturbed goes on, or the same command does, to the same bytes."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from faulty_store import Fault, FaultyStore
from processes import begun, below, files, finished, one_line, run, until

from pipelines.cache import read_cache
from pipelines.card import orphans
from pipelines.reader import ClipReader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_cpu")]


@pytest.fixture
def arguments(road, tmp_path) -> list[str]:
    """Of a job that makes the road's cache again, in a folder of its own."""
    shapes = f"{road.out}/shapes"
    catalog = [f"catalog.csv={shapes}/videos.csv", f"catalog.videos={shapes}/videos"]
    return ["--config", "tests/smallest.yaml", f"out={tmp_path}", *catalog]


def assert_same(cache: Path, road) -> None:
    mine, theirs = files(cache), files(Path(road.out, "cache"))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


# -- processes -------------------------------------------------------------------------------------------------------


def test_a_video_whose_decoding_process_is_killed_is_not_lost(arguments, road, tmp_path):
    with begun("build_cache", *arguments) as build:
        until(lambda: any(tmp_path.glob("cache/parts/*.index")))
        victim = below(build, "pipelines.decoding")[0]
        victim.suspend()
        time.sleep(0.5)  # its worker has come to wait for it, with a video
        victim.kill()
        finished(build)
    assert_same(tmp_path / "cache", road)


def test_several_builders_on_one_cache_share_the_work(arguments, road, tmp_path):
    with begun("build_cache", *arguments) as one, begun("build_cache", *arguments) as other:
        finished(one)
        finished(other)
    assert_same(tmp_path / "cache", road)


# -- stores ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for two or three of the six parts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_said_in_one_line_and_with_room_the_build_goes_on(arguments, full_disk, road):
    arguments = [*arguments, f"out={full_disk}"]
    done = run("build_cache", *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "No space left on device" in one_line(done.stderr)
    assert "the same command goes on" in done.stderr
    # The job ends its workers: one may have been writing just then, under another name. And rows are for the next run.
    mine = files(full_disk / "cache").items()
    there = {name: data for name, data in mine if ".unfinished-" not in name and "/rows-" not in name}
    assert there.items() <= files(Path(road.out, "cache")).items()  # each file is whole
    assert not any(name.endswith("manifest.json") for name in there)
    assert 0 < sum(name.endswith(".index") for name in there) < 6

    subprocess.run(["mount", "-o", "remount,size=64m", full_disk], check=True)
    again = run("build_cache", *arguments)
    assert again.returncode == 0, again.stderr
    assert "clips are there already" in again.stdout
    for uri in orphans(f"{full_disk}/cache"):
        assert ".unfinished-" in uri
        os.unlink(uri)
    assert_same(full_disk / "cache", road)


@pytest.fixture(scope="module")
def endpoint(endpoint, road) -> str:
    """With the road's videos in it."""
    s3, shapes = boto3.client("s3"), Path(road.out, "shapes")
    for file in shapes.rglob("*"):
        if file.is_file():
            s3.put_object(Bucket="webvid", Key=str(file.relative_to(shapes)), Body=file.read_bytes())
    return endpoint


def stored(endpoint: str, prefix: str) -> dict[str, bytes]:
    s3 = boto3.client("s3", endpoint_url=endpoint)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="webvid", Prefix=prefix)
    keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
    return {
        key.removeprefix(prefix): s3.get_object(Bucket="webvid", Key=key)["Body"].read()
        for key in keys
        if not key.endswith(("config.json", "build.json"))
    }


S3 = ("--config", "tests/smallest.yaml", "catalog.csv=s3://webvid/videos.csv", "catalog.videos=s3://webvid/videos")


def test_a_store_that_fails_now_and_then_costs_nothing_and_what_always_fails_is_tried_by_the_next_run(
    endpoint, road, tmp_path
):
    broken = min(Path(road.out, "shapes/videos").rglob("*.mp4"))

    def fault(method: str, path: str, times: int) -> Fault:
        """A third of the requests fail the first time, in every way. One video always breaks off."""
        if broken.name in path and method == "GET":
            return "broken"
        number, chosen = divmod(zlib.crc32(f"{method} {path}".encode()), 3)
        if times or chosen:
            return None
        if method == "GET" and path.endswith(".mp4"):
            return ("stalled", *("500", "503", "reset", "broken") * 5)[number % 21]
        return ("500", "503", "reset")[number % 3]

    store = FaultyStore(endpoint, fault)
    out = "out=s3://webvid/out"
    first = run("build_cache", *S3, out, AWS_ENDPOINT_URL=store.url, XDG_CACHE_HOME=str(tmp_path))
    store.close()
    assert store.faults.keys() == {"none", "500", "503", "reset", "broken", "stalled"}
    assert first.returncode == 1, first.stdout + first.stderr
    told = f"1 parts wait for videos that could not be read for passing reasons ({broken.stem}: "
    assert told in one_line(first.stderr)
    assert "Run the same command again" in first.stderr

    again = run("build_cache", *S3, out, AWS_ENDPOINT_URL=endpoint, XDG_CACHE_HOME=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert stored(endpoint, "out/cache/") == files(Path(road.out, "cache"))


class Silent(threading.Thread):
    """An endpoint that accepts and never answers."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.asked: list[tuple[float, socket.socket]] = []
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.listening.accept()
                self.asked.append((time.monotonic(), connection))


@pytest.fixture
def silent() -> Iterator[Silent]:
    endpoint = Silent()
    yield endpoint
    endpoint.listening.close()
    for _, connection in endpoint.asked:
        connection.close()


SECONDS = 20


def test_a_catalog_at_an_endpoint_that_never_answers_is_one_line_in_20_seconds(arguments, endpoint, silent, tmp_path):
    place = {"AWS_ENDPOINT_URL": silent.url, "XDG_CACHE_HOME": str(tmp_path)}
    done = run("build_cache", *arguments, "catalog.csv=s3://webvid/videos.csv", **place)
    assert time.monotonic() - silent.asked[0][0] < SECONDS
    assert done.returncode == 1
    assert "catalog.csv=s3://webvid/videos.csv" in one_line(done.stderr)
    assert silent.url in done.stderr
    assert len(silent.asked) > 1  # tried again


def test_videos_at_an_endpoint_that_never_answers_are_told_in_20_seconds_and_end_the_build(
    arguments, endpoint, silent, tmp_path
):
    place = {"AWS_ENDPOINT_URL": silent.url, "XDG_CACHE_HOME": str(tmp_path)}
    videos = "catalog.videos=s3://webvid/videos"
    done = run("build_cache", *arguments, videos, **place)
    assert time.monotonic() - silent.asked[0][0] < SECONDS
    assert done.returncode == 1
    assert silent.url in one_line(done.stderr)

    made = run("build_cache", *arguments, videos, "catalog.limit=20", XDG_CACHE_HOME=str(tmp_path))
    assert made.returncode == 0, made.stderr
    silent.asked.clear()
    with begun("build_cache", *arguments, "catalog.limit=60", videos, **place) as build:
        said = ""
        while "tried again by the next run" not in said:
            said = build.stdout.readline()
            assert said, build.stderr.read()
        assert time.monotonic() - silent.asked[0][0] < SECONDS
        assert silent.url in said
        error = build.communicate(timeout=60)[1]
    assert build.returncode == 1
    assert "2 parts wait for videos that could not be read for passing reasons" in one_line(error)


# -- damage ----------------------------------------------------------------------------------------------------------


def test_what_is_said_of_damaged_parts_mends_them(arguments, road, smallest, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(Path(road.out, "cache"), cache)
    flipped, cut, *_ = sorted(cache.glob("parts/*.arrow"))
    data = bytearray(flipped.read_bytes())
    data[-1000] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, cut.stat().st_size // 2)

    reader = ClipReader(read_cache(smallest(tmp_path)), None)
    with pytest.raises(OSError, match=rf"{cut} is shorter than its index says; jobs\.show_cache show_cache\.verify"):
        reader.batch(range(len(reader)))
    done = run("show_cache", *arguments, "show_cache.verify=true")
    assert done.returncode == 1
    said = one_line(done.stderr)
    assert f"{flipped} has other bytes" in said
    assert f"{cut} has other bytes" in said
    assert "remove those parts' three files and manifest.json of this snapshot, and run jobs.build_cache again" in said

    for part in (flipped, cut):
        for ending in (".arrow", ".moments", ".index"):
            part.with_suffix(ending).unlink()
    (manifest,) = cache.glob("snapshots/*/manifest.json")
    manifest.unlink()
    mended = run("build_cache", *arguments)
    assert mended.returncode == 0, mended.stderr
    assert_same(cache, road)
    assert run("show_cache", *arguments, "show_cache.verify=true").returncode == 0
