"""A catalog of 200,000 videos: planned by a build that is then killed, taken up again, finished; in time that grows
with it and no faster, and in the memory of some numbers a video.

Nearly all parts are written by benchmarks.catalog, faster than any network encodes; the last ones by the job itself, of
links to one tiny video.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, begun, command, end, until

from benchmarks import catalog
from pipelines import storage
from pipelines.cache import INDEX, REJECTS, opened
from pipelines.video import encode

pytestmark = pytest.mark.slow

ROWS = 200_000
LEFT = 2  # parts that are left to the job
DRIVER = 1.3e9  # bytes, of which 0.6 are imported and some mapped


def arguments(folder: Path) -> list[str]:
    place = [f"out={folder}/out", f"catalog.csv={folder}/videos.csv", f"catalog.videos={folder}/videos"]
    return [*place, *catalog.SETTINGS, "cache.decoders=1"]


def tiny_video(folder: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (4, 2, 2, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    (folder / "tiny.mp4").write_bytes(encode(frames, 8))
    return folder / "tiny.mp4"


def test_a_build_of_200000_videos_that_is_killed_goes_on_and_ends_in_little_memory(tmp_path):
    catalog.write_csv(tmp_path / "load", ROWS)
    folder, tiny = tmp_path / "load", tiny_video(tmp_path)
    (folder / "videos").mkdir()
    with begun("build_cache", *arguments(folder)) as build:
        until(lambda: any(folder.glob("out/cache/snapshots/*/plan.arrow")), 120)
        end(build)
    left = catalog.write_parts(catalog.config_of(folder), LEFT)
    for video in left.videos(0, len(left)):
        (folder / "videos" / f"{video.videoid}.mp4").symlink_to(tiny)

    again = subprocess.Popen(command("build_cache", *arguments(folder)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = again.stdout.read()
    _, status, used = os.wait4(again.pid, 0)
    assert status == 0, said
    assert f"{ROWS - len(left)} of {ROWS} clips are there already" in said
    assert used.ru_maxrss * 1024 < DRIVER

    (snapshot,) = (folder / "out/cache/snapshots").iterdir()
    counts = json.loads((snapshot / "manifest.json").read_text())["counts"]
    rejected = sum(-(-rows // catalog.REJECTED) for rows in [300] * ((ROWS - len(left)) // 300))
    assert counts["planned"] == ROWS == counts["clips"] + counts["rejected"]
    assert counts["rejected"] == rejected == len(storage.read_rows(str(snapshot / REJECTS)))
    ids = opened(str(snapshot / INDEX)).read_all()["videoid"].to_pylist()
    assert len(set(ids)) == len(ids) == counts["clips"]

    begin = time.monotonic()
    done = subprocess.run(command("build_cache", *arguments(folder)), cwd=ROOT, capture_output=True, text=True)
    assert "is finished; nothing to do" in done.stdout, done.stderr
    assert time.monotonic() - begin < 60


def test_four_times_the_videos_take_four_times_the_seconds_and_the_memory_of_some_numbers_each(tmp_path):
    """6 to 77 and 171 to 404 bytes a row, of which much is what an allocator keeps: 144 and 140 of the system's."""
    few, many = (catalog.stages(tmp_path / str(rows), rows) for rows in (ROWS // 2, 2 * ROWS))
    for stage, most in {"plan": 380, "finish": 700}.items():  # with tables in memory 434 and 1,099
        assert many[stage]["seconds"] < 6 * few[stage]["seconds"], stage
        assert catalog.a_row(few[stage]["peak"], many[stage]["peak"], 2 * ROWS) < most, stage
