"""What a dry run says of a build is what the build then does."""

import re
from math import prod
from pathlib import Path

import numpy as np
import pytest

from pipelines.cache import build_cache
from pipelines.estimate import estimate


def said(config) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in estimate(config).splitlines())


def number(text: str, after: str = "") -> int:
    return int(re.search(rf"{after}([\d,]+)", text)[1].replace(",", ""))


def tensor_bytes(cache) -> int:
    """Of all clips, each caption's as often as it is used."""
    sizes = [
        sum(prod(told["shape"]) * np.dtype(told["dtype"]).itemsize for told in part["tensors"].values())
        for part in cache.parts
    ]
    return sum(part["clips"] * size for part, size in zip(cache.parts, sizes, strict=True))


@pytest.fixture
def csv(tmp_path, ids) -> Path:
    """Five videos, and three rows that are rejected unseen."""
    good = [ids[name] for name in ("a0", "a1", "b0", "c0", "d1")]
    file = tmp_path / "some.csv"
    rows = [*good, good[0], "../b1", "c:2"]
    file.write_text("videoid,name\n" + "".join(f"{row},caption {i}\n" for i, row in enumerate(rows)))
    return file


@pytest.mark.parametrize("views", [1, 2])
def test_counts_and_bytes_are_those_of_the_build(settings, here, tmp_path, csv, views):
    config = settings(tmp_path, f"catalog.csv={csv}", f"cache.views_per_video={views}")
    told = said(config)
    assert number(told["catalog"]) == 8
    assert told["rejected"] == "3 of them unseen, 2 unsafe_name, 1 duplicate_id"
    assert number(told["done"]) == 0
    assert re.match(rf"{5 * views} clips|\d+ clips, [0-3] videos rejected", told["sample"])

    cache = build_cache(config)
    assert number(told["clips"]) == cache.counts["clips"] == 5 * views
    assert number(told["clips"], "in ") == len(cache.parts) == len(here.made)
    assert cache.counts["rejected_videos"] == 3
    assert number(told["bytes"]) == tensor_bytes(cache)
    assert number(told["bytes"], ", ") * 5 * views == tensor_bytes(cache)


def test_what_cannot_be_known_unseen_makes_it_a_most(settings, here, tmp_path):
    told, cache = said(config := settings(tmp_path)), build_cache(config)
    assert number(told["clips"]) == cache.counts["planned"] > cache.counts["clips"]
    assert number(told["bytes"]) > tensor_bytes(cache)
    assert re.search(r"\d+ clips, [1-4] videos rejected", told["sample"])


def test_a_dry_run_writes_nothing(settings, tmp_path):
    said(settings(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_done_and_needs_no_sample(built, settings):
    told = said(settings(built))
    assert number(told["done"]) == number(told["clips"])
    assert "sample" not in told
    assert "time" not in told


def test_of_a_cache_that_is_half_made_or_grows_the_rest_is_told(built, settings, here, cache):
    Path(cache.path(cache.parts[1]["name"], "index")).unlink()
    (Path(cache.manifest.uri) / "manifest.json").unlink()
    config = settings(built, csv="longer")
    told = said(config)
    assert number(told["catalog"]) == 19
    assert number(told["done"]) == (17 - 3) * 2

    longer = build_cache(config)
    assert number(told["clips"], "in ") == len(longer.parts)
    assert len(here.made) == 2  # what was lost, and the part of the two new videos
    assert number(said(config)["done"]) == number(told["clips"])
