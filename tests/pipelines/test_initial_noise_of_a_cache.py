"""The initial noise of a cache: of which clips it is, what is read for it, what is written."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from cil import InitialNoise, Moments
from cil.moments import outside
from pipelines import storage
from pipelines.cache import Cache, build_cache
from pipelines.errors import UserError
from pipelines.initial_noise import FILE, MomentsMaker, make_initial_noise, read_initial_noise
from pipelines.reader import ClipReader


def by_hand(cache: Cache, where=None, counted=None) -> InitialNoise:
    """From the latents of all clips that are meant, part by part."""
    reader = ClipReader(cache, "train", where)
    latents, parts = reader.batch(range(len(reader)))["latents"], torch.from_numpy(reader.values("part").copy())
    groups = [Moments.of(latents[parts == part]) for part in parts.unique()]
    return InitialNoise.from_moments(*groups, counted=counted)


def assert_equal(found: InitialNoise, wanted: InitialNoise) -> None:
    assert found.count == wanted.count
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.diagonal, wanted.diagonal, rtol=1e-12, atol=1e-14)
    for name in ("variance", "mean_error", "variance_error"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-9), name


def names(cache: Cache, *numbers: int) -> list[str]:
    return [f"{cache.parts[i]['name']}.moments" for i in numbers]


def test_it_is_of_the_training_clips_and_follows_copies_that_changed_their_split(built, settings, here, cache, ids):
    config = settings(built)
    manifest = make_initial_noise(config)
    noise, _ = read_initial_noise(config)
    assert_equal(noise, by_hand(cache))
    assert noise.count == manifest.counts["clips"] == 16
    # Of c1, which went to test, and of d0, which came from there: no other part is read again.
    assert here.made == names(cache, 2, 3)
    drawn = InitialNoise.from_moments(
        *(Moments.from_bytes(storage.read(cache.path(part["name"], "moments"))) for part in cache.parts)
    )
    assert drawn.count == 16  # as many, but others
    assert not torch.allclose(drawn.mean, noise.mean, atol=1e-3)


def test_no_part_is_read_again_where_all_its_training_clips_are_meant(tmp_path, settings, here, videos, ids):
    rows = (videos / "videos.csv").read_text().splitlines(keepends=True)
    copies = (ids["c1"], ids["d0"])
    (tmp_path / "v.csv").write_text("".join(row for row in rows if row.split(",")[0] not in copies))
    config = settings(tmp_path / "out", f"catalog.csv={tmp_path}/v.csv")
    cache = build_cache(config)
    here.made.clear()
    for part in cache.parts:  # nor looked at
        storage.write(cache.path(part["name"]), b"")
    make_initial_noise(config)
    assert here.made == []
    assert read_initial_noise(config)[0].count == 14


@pytest.mark.parametrize("score", ["motion", "cut", "subject"])
def test_with_a_filter_it_is_of_exactly_the_clips_that_pass(score, built, settings, here, cache):
    values = ClipReader(cache, "train").values(score)
    least, most = (float(x) for x in sorted(values)[3 : -2 : len(values) - 6])
    config = settings(built, f"initial_noise.where={{{score}: [{least!r}, {most!r}]}}")
    make_initial_noise(config)
    noise, manifest = read_initial_noise(config)
    where = {score: (least, most)}
    passing = ((values >= least) & (values <= most)).sum()
    assert noise.count == manifest.counts["clips"] == passing < 16
    assert_equal(noise, by_hand(cache, where))


def test_a_filter_that_all_clips_of_a_part_pass_leaves_that_part_alone(built, settings, here, cache):
    reader = ClipReader(cache, "train")
    of_first = reader.values("motion")[reader.values("part") == 0]
    make_initial_noise(settings(built, f"initial_noise.where={{motion: [{float(of_first.min())!r}, null]}}"))
    assert names(cache, 0)[0] not in here.made


def test_the_cells_of_a_watermark_do_not_count(built, settings, here, cache):
    config = settings(built, "cache.watermark=[[0.5, 0, 1, 0.5]]")
    make_initial_noise(config)
    counted = outside([(0.5, 0, 1, 0.5)], 4, 4)
    noise, _ = read_initial_noise(config)
    assert_equal(noise, by_hand(cache, counted=counted))
    assert noise.variance != by_hand(cache).variance


def test_what_is_written_loads_back_and_the_estimate_is_a_picture(built, settings, here, cache):
    config = settings(built)
    manifest = make_initial_noise(config)
    noise = InitialNoise.load(f"{manifest.uri}/{FILE}")
    for layout in ("lvdm", "svd"):
        published = InitialNoise.load(f"{manifest.uri}/published_{layout}.pt")
        assert torch.equal(published.mean, noise.mean.float().double())
        assert published.variance == pytest.approx(noise.variance, rel=1e-6)
    with Image.open(io.BytesIO(storage.read(f"{manifest.uri}/estimate.png"))) as picture:
        assert (picture.format, picture.size) == ("PNG", (600, 400))
        assert len(picture.convert("RGB").getcolors(10**6)) > 10  # and not blank
    assert noise.facts == {"family": "toy", "scaling_factor": "1.0", "cache": cache.fingerprint}


def test_noises_of_two_filters_stand_side_by_side_each_with_its_card(built, settings, here, cache, capsys):
    plain, moving = (
        settings(built),
        settings(built, "initial_noise.name=initial_noise-moving", "initial_noise.where={motion: [0, 9]}"),
    )
    for config in (plain, moving):
        make_initial_noise(config)
        noise, manifest = read_initial_noise(config)
        told = capsys.readouterr().out
        assert f"initial noise at {built}/{config.initial_noise.name}\n" in told
        assert f"  estimate    {noise}\n" in told
        assert f"  clips       {manifest.counts['clips']} for training" in told
        assert Path(cache.manifest.uri).name in told
    assert "with {'motion': (0.0, 9.0)}" in told


def test_the_same_again_does_nothing_and_another_cache_or_filter_is_refused(built, settings, here, capsys):
    make_initial_noise(settings(built))
    here.made.clear()
    make_initial_noise(settings(built))
    assert "nothing to do" in capsys.readouterr().out
    assert here.made == []
    for override, said in (
        ("initial_noise.where={motion: [0, null]}", r"where\.motion was None, is \[0\.0, None\]"),
        ("cache.watermark=[[0, 0, 0.5, 1]]", r"watermark was \[\], is \[\[0\.0, 0\.0, 0\.5, 1\.0\]\]"),
    ):
        with pytest.raises(UserError, match=said):
            make_initial_noise(settings(built, override))
    build_cache(settings(built, csv="longer"))
    with pytest.raises(UserError, match=r"made with another configuration \(cache was"):
        make_initial_noise(settings(built))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("initial_noise.where={motion: [1000, null]}", r"has 0 training clips with scores in .*motion.*at least 2"),
        ("cache.watermark=[[0, 0, 1, 0.5], [0, 0.4, 1, 1]]", "touches each of the 4 x 4 latents"),
    ],
)
def test_what_leaves_nothing_is_refused_before_anything_is_written(override, said, built, settings, here):
    with pytest.raises(UserError, match=said):
        make_initial_noise(settings(built, override))
    assert not (built / "initial_noise").exists()


def test_moments_made_again_have_the_bytes_of_those_that_the_part_was_made_with(built, settings, cache):
    maker = MomentsMaker(settings(built).model_dump(), cache.uri)
    index = cache.index().to_pandas()
    for number, part in enumerate(cache.parts):
        mine = index[(index["part"] == number) & (index["drawn_split"] == "train")]["row"]
        data, problem, _ = maker({"part": part["name"], "rows": sorted(mine)})
        assert not problem
        assert data == storage.read(cache.path(part["name"], "moments")), number
    some = Moments.from_bytes(maker({"part": cache.parts[0]["name"], "rows": [1, 4]})[0])
    assert some.count == 2
