"""What a cache's card says, and what is found when its files are looked at."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cil.families import load
from pipelines import storage
from pipelines.cache import build_cache, read_cache
from pipelines.card import _histogram, card, contact_sheet, orphans, show_cache, snapshots, verify
from pipelines.errors import Unfinished
from pipelines.progress import clock
from pipelines.reader import ClipReader


def files(cache, number: int) -> list[Path]:
    return [Path(cache.path(cache.parts[number]["name"], ending)) for ending in ("arrow", "moments", "index")]


def flip_a_bit(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_has_the_counts(cache):
    said = dict(re.findall(r"^ {2}(\w+) +(.*)$", text := card(cache), re.M))
    assert cache.uri in text
    assert said["snapshot"] == f"{Path(cache.manifest.uri).name} of 1"
    assert said["family"] == "toy, clips of 2 x 16 x 16"
    assert said["encoder"] == "toy-dct4-scale1.0"
    assert said["clips"] == "26 of 34 planned, in 6 parts"
    assert said["splits"] == "test 8, train 16, validation 2"
    assert said["rejected"] == "4 videos: 3 not_a_video, 1 missing"
    size = sum(Path(cache.path(part["name"])).stat().st_size for part in cache.parts)
    assert said["bytes"] == f"{size:,}, {size / 26:,.0f} a clip"


def test_the_card_has_the_spread_of_each_score(cache):
    text, reader = card(cache), ClipReader(cache, None)
    for score in ("motion", "cut", "subject"):
        (shown,) = re.findall(rf"^ {{4}}{score} +(.*)$", text, re.M)
        wanted = np.quantile(reader.values(score), (0.01, 0.25, 0.5, 0.75, 0.99))
        *quantiles, bars = shown.split()
        np.testing.assert_allclose([float(x) for x in quantiles], wanted, atol=5.1e-4)
        within = list(np.histogram(reader.values(score).clip(wanted[0], wanted[-1]), 10)[0])
        assert len(bars) == 10
        assert [bar == "·" for bar in bars] == [clips == 0 for clips in within]
        assert [bar == "█" for bar in bars] == [clips > 7 / 8 * max(within) for clips in within]
        assert [c for _, c in sorted(zip(within, bars, strict=True))] == sorted(bars, key="·▁▂▃▄▅▆▇█".index)


def test_the_card_has_a_histogram_of_scores_that_are_all_the_same():
    assert _histogram(np.zeros(5, np.float32), 0.0, 0.0) == "·····█····"
    assert _histogram(np.arange(100.0), 0.0, 99.0) == "█" * 10
    assert _histogram(np.array([-5.0, 0, 0, 0, 1, 9]), 0.0, 1.0) == "█········▄"
    assert _histogram(np.array([0.5, *[1.0] * 1000]), 0.0, 1.0) == "·····▁···█"


def test_the_card_tells_how_fast_the_run_was_that_made_the_last_parts(built, settings, cache, here):
    (told,) = re.findall(
        r"^  built       by the last attempt in (\d+:\d\d), (\S+) clips/s; decoding 0%, encoding (\d+)% of the time$",
        card(cache),
        re.M,
    )
    known = json.loads(Path(cache.manifest.uri, "build.json").read_text())
    assert told == (clock(known["seconds"]), f"{known['clips_per_second']:.3g}", f"{known['encoding_busy'] * 100:.0f}")
    assert known["clips_per_second"] == pytest.approx(26 / known["seconds"])
    # A run that finds all parts made leaves what the one before it told, and who has no such file has a card too.
    Path(cache.manifest.uri, "manifest.json").unlink()
    assert card(build_cache(settings(built))) == card(cache)
    Path(cache.manifest.uri, "build.json").unlink()
    assert "built" not in card(cache)


def test_the_card_is_a_small_page(cache):
    assert len(card(cache).splitlines()) <= 25
    assert max(map(len, card(cache).splitlines()[1:])) <= 120


def test_the_contact_sheet_has_three_frames_of_eight_clips_and_last_the_mean(built, settings, cache):
    with Image.open(io.BytesIO(contact_sheet(settings(built), cache))) as picture:
        assert (picture.format, picture.size) == ("PNG", (3 * 16, 9 * 16))
        rows = torch.from_numpy(np.array(picture)).reshape(9, 16, 3, 16, 3).transpose(1, 2)
    decoded = load("toy", 2, 16, 16, "tiny").decode(ClipReader(cache, None).batch([0, 25])["latents"].float())
    for row, frames in zip(rows[[0, 7]], decoded, strict=True):
        assert torch.equal(row, frames[[0, 1, 1]])  # first, middle, last of two
    assert rows[8].float().std() < rows[:8].float().std() / 2  # a mean of unlike pictures


def test_a_cache_of_no_clips_has_a_card_too(tmp_path, settings, here, ids, capsys):
    (tmp_path / "none.csv").write_text(f"videoid,name\n{ids['e0']},x\n")
    config = settings(tmp_path, f"catalog.csv={tmp_path}/none.csv", "show_cache.verify=true")
    build_cache(config)
    show_cache(config)
    text = capsys.readouterr().out
    assert "clips       0 of 2 planned, in 1 parts" in text
    assert "rejected    1 videos: 1 not_a_video" in text
    assert "verified: 1 parts" in text
    assert storage.read(f"{tmp_path}/cache_card.png")[:4] == b"\x89PNG"


def test_showing_a_cache_changes_nothing_of_it(built, settings, capsys):
    before = {file: file.stat().st_mtime_ns for file in (built / "cache").rglob("*")}
    show_cache(settings(built))
    assert {file: file.stat().st_mtime_ns for file in (built / "cache").rglob("*")} == before
    assert (built / "cache_card.png").exists()
    assert "not needed" not in capsys.readouterr().out


# -- verify ------------------------------------------------------------------------------------------------------------


def test_a_whole_cache_is_verified_with_its_moments(built, settings, cache, capsys):
    verify(settings(built), cache)
    assert "verified: 6 parts have the bytes they were made with, 6 their clips' moments" in capsys.readouterr().out


@pytest.mark.parametrize("part", [0, 1, 5])
@pytest.mark.parametrize("file", [0, 1, 2], ids=["arrow", "moments", "index"])
@pytest.mark.parametrize("at", [10, -10])
def test_a_flipped_bit_is_found_and_the_file_named(built, settings, cache, part, file, at):
    flip_a_bit(files(cache, part)[file], at)
    found = rf"^1 of 18 files are damaged: {files(cache, part)[file]} has other bytes.*jobs\.build_cache"
    with pytest.raises(Unfinished, match=found):
        verify(settings(built), cache)


@pytest.mark.parametrize("name", ["index.arrow", "plan.arrow", "rejects.jsonl"])
def test_a_flipped_bit_in_what_a_snapshot_says_of_its_parts_is_found(built, settings, here, cache, name):
    file = Path(cache.manifest.uri, name)
    flip_a_bit(file, 10)
    with pytest.raises(Unfinished, match=rf"^{file} has other bytes .*: remove that and manifest\.json beside it"):
        show_cache(settings(built, "show_cache.verify=true"))
    file.unlink()
    Path(cache.manifest.uri, "manifest.json").unlink()
    assert build_cache(settings(built)).manifest == cache.manifest
    verify(settings(built), cache)
    assert not here.made


def test_missing_files_are_found_and_all_damage_is_told_at_once(built, settings, cache):
    files(cache, 2)[0].unlink()
    files(cache, 3)[1].unlink()
    flip_a_bit(files(cache, 4)[0], 10)
    with pytest.raises(Unfinished) as found:
        verify(settings(built), cache)
    told = str(found.value)
    assert told.startswith("3 of 18 files are damaged")
    assert f"{files(cache, 2)[0]} is missing" in told
    assert f"{files(cache, 3)[1]} is missing" in told
    assert f"{files(cache, 4)[0]} has other bytes" in told


def test_moments_that_are_not_of_their_clips_are_found_although_their_digest_is_right(built, settings, cache):
    """As a defect of the builder would leave them."""
    import hashlib

    wrong = files(cache, 2)[1]
    shutil.copy(files(cache, 3)[1], wrong)
    cache.parts[2]["moments_sha256"] = hashlib.sha256(wrong.read_bytes()).hexdigest()
    with pytest.raises(Unfinished, match=f"^1 of 18 files are damaged: {wrong} is not of its clips"):
        verify(settings(built), cache)


def test_what_verify_advises_mends_the_cache(built, settings, here, cache):
    fingerprint = cache.fingerprint
    flip_a_bit(files(cache, 2)[0], -10)
    with pytest.raises(Unfinished, match=r"those parts' three files and manifest\.json of this snapshot"):
        verify(settings(built), cache)
    for file in (*files(cache, 2), Path(cache.manifest.uri) / "manifest.json"):
        file.unlink()
    again = build_cache(settings(built))
    verify(settings(built), again)
    assert len(here.made) == 1
    assert again.fingerprint == fingerprint


# -- what nobody needs -------------------------------------------------------------------------------------------------


@pytest.fixture
def longer(built, settings, here, cache):
    return build_cache(settings(built, csv="longer"))


def test_all_files_of_all_snapshots_are_needed(longer):
    assert len(snapshots(longer.uri)) == 2
    assert orphans(longer.uri) == []


def test_what_only_a_removed_snapshot_cited_is_listed_and_swept(built, settings, longer, cache, capsys):
    shutil.rmtree(longer.manifest.uri)
    new = [str(file) for file in sorted(files(longer, len(longer.parts) - 1))]
    assert orphans(longer.uri) == new
    name = Path(cache.manifest.uri).name
    show_cache(settings(built, f"cache.snapshot={name}"))
    told = capsys.readouterr().out.splitlines()
    assert told[-4:-1] == new
    assert told[-1].startswith("not needed: these 3 files, which no snapshot cites; show_cache.sweep=true")
    parts = built / "cache/parts"
    before = {file.name for file in parts.iterdir()}
    assert set(map(Path, new)) < set(parts.iterdir())
    show_cache(settings(built, f"cache.snapshot={name}", "show_cache.sweep=true", "show_cache.verify=true"))
    text = capsys.readouterr().out
    assert "removed: these 3 files" in text
    assert "verified: 6 parts" in text
    assert {file.name for file in parts.iterdir()} == before - {Path(file).name for file in new}
    assert orphans(longer.uri) == []


def test_parts_of_a_snapshot_that_has_begun_are_needed(built, settings, longer):
    (Path(longer.manifest.uri) / "manifest.json").unlink()
    files(longer, len(longer.parts) - 1)[2].unlink()
    assert orphans(longer.uri) == []
    assert files(longer, len(longer.parts) - 1)[0].exists()


def test_what_a_killed_writer_left_is_swept_unless_a_builder_may_be_at_work(longer):
    left = Path(longer.uri) / "parts/.unfinished-abc"
    left.write_bytes(b"half a part")
    assert orphans(longer.uri) == [str(left)]
    (Path(longer.manifest.uri) / "manifest.json").unlink()
    assert orphans(longer.uri) == []


def test_the_cache_is_read_after_a_sweep(built, settings, longer, cache):
    shutil.rmtree(longer.manifest.uri)
    config = settings(built, f"cache.snapshot={Path(cache.manifest.uri).name}", "show_cache.sweep=true")
    show_cache(config)
    reader = ClipReader(read_cache(config), None)
    assert len(reader.batch(range(len(reader)))["latents"]) == 26
