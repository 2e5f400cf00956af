"""One part of a cache, made in this process."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cil.moments import Moments
from pipelines.artifact import Manifest
from pipelines.cache import PartMaker
from pipelines.catalog import Video
from pipelines.config import load
from pipelines.reader import ClipReader
from pipelines.video import encode

CAPTIONS = ["a dog", "a cat", "a dog"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., Manifest]:
    """made("key=value", ...) -> a cache of one part: three videos of noise, two of them with one caption."""
    folder = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    videos = [Video(str(i), caption, (str(folder / f"{i}.mp4"),)) for i, caption in enumerate(CAPTIONS)]
    for video in videos:
        coarse = random.integers(0, 255, (8, 4, 4, 3), dtype=np.uint8)
        Path(*video.sources).write_bytes(encode(coarse.repeat(8, 1).repeat(8, 2), 8))

    def make(*overrides: str) -> Manifest:
        out = tmp_path_factory.mktemp("cache")
        size = ("family.preset=tiny", "family.frames=2", "cache.validation=0", "cache.test=0")
        config = load(None, [f"out={out}", *size, *overrides])
        data, problem = PartMaker(config.model_dump())([asdict(video) for video in videos])
        assert not problem
        (out / "parts").mkdir()
        (out / "parts" / "part").write_bytes(data)
        return Manifest(str(out), "latent cache", "", {}, {}, {"parts": [{"name": "part"}]})

    return make


def table(cache: Manifest) -> pa.Table:
    return pa.ipc.open_file(Path(cache.uri, "parts", "part").read_bytes()).read_all()


def moments(cache: Manifest) -> Moments:
    return Moments.from_bytes(table(cache).schema.metadata[b"moments"])


def test_a_caption_is_kept_once_and_its_clips_share_it(made):
    cache = made("family.name=i2vgenxl")
    texts = table(cache)["text"].combine_chunks()
    assert len(texts) == 6
    assert len(texts.dictionary) == 2
    reader = ClipReader(cache, "train")
    of = {reader.ids[i]: reader.batch([i])["text"] for i in range(6)}
    assert torch.equal(of["0:0"], of["0:1"])
    assert torch.equal(of["0:0"], of["2:1"])
    assert not torch.equal(of["0:0"], of["1:0"])
    from cil import families

    wanted = families.load("i2vgenxl", 2).encode_captions(["a cat"])["text"]
    assert torch.equal(of["1:0"], wanted)


def test_moments_are_of_the_whole_posterior_where_its_deviation_is_kept(made):
    mode, both = (made("family.name=videocrafter1", f"family.latents={kind}") for kind in ("mode", "mean_std"))
    assert torch.equal(moments(mode).mean, moments(both).mean)
    reader = ClipReader(both, "train")
    std = reader.batch(range(6))["latents_std"].double()
    added = moments(both).variance - moments(mode).variance
    torch.testing.assert_close(added, (std**2).mean(0))
    assert float(added.min()) > 0


def test_samples_of_the_posterior_are_a_function_of_seed_and_clip(made):
    one, again, other = (
        ClipReader(made("family.name=svd", "family.latents=sample", f"seed={seed}"), "train").batch(range(6))["latents"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    mode = ClipReader(made("family.name=svd"), "train").batch(range(6))["latents"]
    assert not torch.equal(one, mode)
    assert not torch.equal(one, other)


def test_clip_features_take_the_place_of_the_image_where_they_are_asked_for(made):
    images, features = made("family.name=svd"), made("family.name=svd", "family.clip_features=true")
    assert {"image", "latents", "rate"} == set(ClipReader(images, "train").batch([0]))
    assert {"clip", "latents", "rate"} == set(ClipReader(features, "train").batch([0]))
