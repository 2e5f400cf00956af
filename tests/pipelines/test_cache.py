"""One part of a cache, made in this process."""

import json
from collections.abc import Callable, Iterator

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from in_process import DecodeHere

from cil.moments import Moments
from pipelines import storage
from pipelines.cache import Cache, _examples, build_cache, hashes_of, opened, part_names, plan_parts, refuse_lost
from pipelines.catalog import read_catalog
from pipelines.clips import PartMaker
from pipelines.config import load
from pipelines.errors import UserError
from pipelines.estimate import estimate
from pipelines.reader import ClipReader
from pipelines.video import encode

CAPTIONS = ["a dog", "a cat", "a dog"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Callable[..., Cache]]:
    """made("key=value", ...) -> a cache of one part: three videos of noise, two of them with one caption."""
    folder = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        coarse = random.integers(0, 255, (8, 4, 4, 3), dtype=np.uint8)
        (folder / f"{i}.mp4").write_bytes(encode(coarse.repeat(8, 1).repeat(8, 2), 8))
    rows = "".join(f"{i},{caption},{'' if i else 'PT1S'}\n" for i, caption in enumerate(CAPTIONS))
    (folder / "videos.csv").write_text(f"videoid,name,duration\n{rows}")

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("pipelines.clips.DecodePool", DecodeHere)

    def make(*overrides: str) -> Cache:
        out = tmp_path_factory.mktemp("cache")
        size = ("family.preset=tiny", "family.frames=2", "cache.validation=0", "cache.test=0")
        videos = (f"catalog.csv={folder}/videos.csv", f"catalog.videos={folder}")
        config = load(None, [f"out={out}", *size, *videos, *overrides])
        catalog, parts = read_catalog(config.catalog, ""), str(out / "cache/parts")
        (name,) = part_names(plan_parts(hashes_of(catalog), None, 100))
        maker = PartMaker(config.model_dump(), parts, catalog)
        storage.write(f"{parts}/{name}.index", maker({"name": name, "start": 0, "stop": len(catalog)}).data)
        return build_cache(config)  # which finds it

    yield make
    monkeypatch.undo()


def table(cache: Cache) -> pa.Table:
    (part,) = cache.parts
    return opened(cache.path(part["name"])).read_all()


def moments(cache: Cache) -> Moments:
    (part,) = cache.parts
    return Moments.from_bytes(storage.read(cache.path(part["name"], "moments")))


def test_a_caption_is_kept_once_and_its_clips_share_it(made):
    cache = made("family.name=i2vgenxl")
    texts = table(cache)["text"].combine_chunks()
    assert len(texts) == 6
    assert len(texts.dictionary) == 2
    reader = ClipReader(cache, "train")
    of = {reader.known(i)["clip_id"]: reader.batch([i])["text"] for i in range(6)}
    assert torch.equal(of["0:0"], of["0:1"])
    assert torch.equal(of["0:0"], of["2:1"])
    assert not torch.equal(of["0:0"], of["1:0"])
    from cil import families

    wanted = families.load("i2vgenxl", 2).encode_captions(["a cat"])["text"]
    assert torch.equal(of["1:0"], wanted)


def test_what_else_the_catalog_says_stands_in_the_part_and_in_no_index(made):
    cache = made()
    (part,) = cache.parts
    clips = pandas.read_feather(cache.path(part["name"]))
    assert dict(zip(clips["clip_id"], clips["extra"], strict=True))["0:0"] == '{"duration": "PT1S"}'
    extra = pandas.json_normalize([json.loads(text or "{}") for text in clips["extra"]])  # as docs/cache.md says
    assert extra["duration"].tolist() == ["PT1S", "PT1S", *[pytest.approx(float("nan"), nan_ok=True)] * 4]
    assert "extra" not in cache.index().column_names + opened(cache.path(part["name"], "index")).schema.names


def test_another_extra_column_is_another_part(tmp_path):
    """Or two builders would make other bytes of one name."""
    names = set()
    for rows in ("videoid,name\n1,x\n", "videoid,name,a\n1,x,2\n", "videoid,name,a\n1,x,3\n", "videoid,b,name\n1,,x\n"):
        (tmp_path / "v.csv").write_text(rows)
        catalog = read_catalog(load(None, [f"catalog.csv={tmp_path}/v.csv", f"catalog.videos={tmp_path}"]).catalog, "")
        names.add((catalog.digest, *part_names(plan_parts(hashes_of(catalog), None, 100))))
    assert len(names) == len({name for _, name in names}) == 3


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
    assert {"image", "latents", "rate", "frame"} == set(ClipReader(images, "train").batch([0]))
    assert {"clip", "latents", "rate", "frame"} == set(ClipReader(features, "train").batch([0]))


def test_a_clip_is_read_from_the_place_that_the_index_tells(made):
    cache = made("family.name=videocrafter1", "family.latents=mean_std")
    reader, whole = ClipReader(cache, "train"), table(cache).to_pandas().set_index("clip_id")
    batch = reader.batch([4, 0, 5])
    for i, number in enumerate((4, 0, 5)):
        row = whole.loc[reader.known(number)["clip_id"]]
        for name in ("latents", "latents_std", "text", "image", "rate"):
            assert batch[name][i].numpy().tobytes() == row[name], name
    ahead = list(reader.ahead([[4, 0, 5], [1], [2, 3]]))
    assert torch.equal(ahead[0]["latents"], batch["latents"])
    assert [len(each["latents"]) for each in ahead] == [3, 1, 2]


def test_scores_filter_what_is_read(made):
    cache = made("family.name=toy")
    motion = ClipReader(cache, "train").values("motion")
    middle = float(np.median(motion))
    some = ClipReader(cache, "train", {"motion": (middle, None), "cut": (None, 1.0)})
    assert len(some) == (motion >= middle).sum()
    assert (some.values("motion") >= middle).all()
    assert len(ClipReader(cache, "test")) == 0


def test_a_conditional_image_may_be_any_frame_of_a_training_clip(made):
    cache = made("family.name=videocrafter1", "cache.condition=random", "cache.views_per_video=8", "seed=2")
    reader = ClipReader(cache, "train")
    assert set(reader.values("frame").tolist()) == {0, 1}
    batch = reader.batch(range(len(reader)))
    assert batch["frame"].tolist() == reader.values("frame").tolist()
    first = ClipReader(made("family.name=videocrafter1", "cache.views_per_video=8", "seed=2"), "train")
    same = [torch.equal(a, b) for a, b in zip(batch["image"], first.batch(range(len(first)))["image"], strict=True)]
    assert same == [frame == 0 for frame in batch["frame"].tolist()]


def test_clips_are_mirrored_as_often_as_is_asked(made):
    some = table(made("family.name=toy", "cache.flip=0.5", "cache.views_per_video=8"))["flip"].to_pylist()
    assert 4 < sum(some) < 20
    plain, mirrored = (
        ClipReader(made("family.name=toy", f"cache.flip={share}"), None).batch([0])["latents"] for share in (0, 1)
    )
    # The toy's latents are cosines of 4 pixels: those that are odd from left to right change their sign.
    wanted = plain[0].flip(-1) * torch.tensor([1, -1, 1, -1])[:, None, None]
    torch.testing.assert_close(mirrored[0].float(), wanted.float(), atol=2e-3, rtol=0)


def test_the_picture_is_cropped_before_it_is_resized(made):
    whole, half = (
        ClipReader(made("family.name=toy", *crop), None).batch([0])["latents"][0]
        for crop in ((), ("cache.crop=[0, 0, 0.5, 0.5]",))
    )
    # 32 x 32 of four blocks a side: the quarter is scaled up twice, and its average is that of the whole's corner.
    torch.testing.assert_close(half[:, 0].mean(), whole[:, 0, :4, :4].mean(), atol=0.01, rtol=0)
    assert not torch.allclose(half, whole, atol=0.05)


def test_of_each_local_folder_of_videos_one_that_is_there_is_looked_for_on_other_nodes(tmp_path):
    folders = [str(tmp_path / name) for name in ("one", "one-more", "none")]
    for folder, name in zip(folders, ("b", "c", None), strict=True):
        (tmp_path / folder).mkdir()
        if name:
            (tmp_path / folder / f"{name}.mp4").touch()
    (tmp_path / "videos.csv").write_text("videoid,name\na,first\nb,second\nc,third\n")
    videos = ",".join([*folders, "s3://bucket/videos"])
    config = load(None, [f"catalog.csv={tmp_path}/videos.csv", f"catalog.videos=[{videos}]"])
    assert list(_examples(read_catalog(config.catalog, ""))) == [f"{folders[0]}/b.mp4", f"{folders[1]}/c.mp4"]


@pytest.mark.parametrize("rows", [3, 30])
def test_a_folder_that_has_none_of_the_videos_is_refused_before_they_are_missing_for_ever(tmp_path, here, rows):
    (tmp_path / "vidoes").mkdir()
    (tmp_path / "videos.csv").write_text("videoid,name\n" + "".join(f"{i},x\n" for i in range(rows)))
    config = load(None, [f"out={tmp_path}", f"catalog.csv={tmp_path}/videos.csv", f"catalog.videos={tmp_path}/vidoes"])
    said = (
        rf"^none of {rows} videos of catalog\.csv=.*/videos\.csv that .* is there, such as {tmp_path}/vidoes/0\.mp4: "
    )
    for job in (build_cache, estimate):
        with pytest.raises(UserError, match=said):
            job(config)
    assert not list(tmp_path.glob("cache/parts/*"))


def test_videos_that_are_missing_are_rejects_where_one_is_there_or_some_are_made(tmp_path):
    (tmp_path / "videos.csv").write_text("videoid,name\n" + "".join(f"{i:04d},x\n" for i in range(3000)))
    config = load(None, [f"catalog.csv={tmp_path}/videos.csv", f"catalog.videos={tmp_path}"])
    catalog, made = read_catalog(config.catalog, ""), np.zeros(3000, bool)
    with pytest.raises(UserError, match="none of 200 videos"):
        refuse_lost(catalog, made)
    (tmp_path / "2999.mp4").touch()  # they are looked for all over the catalog
    refuse_lost(catalog, made)
    (tmp_path / "2999.mp4").unlink()
    made[7] = True  # whoever has made a cache may remove its videos
    refuse_lost(catalog, made)


def test_captions_of_an_index_may_be_more_than_the_two_gib_that_an_array_of_strings_holds(made):
    index = made().index()
    assert {index.schema.field(name).type for name in ("clip_id", "caption", "split")} == {pa.large_string()}
    assert index.column("caption").num_chunks == 1
