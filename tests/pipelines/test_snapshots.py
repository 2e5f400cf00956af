"""A cache that grows: what a longer catalog adds, what stays, and what is refused."""

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from conftest import SETTINGS

from pipelines import storage
from pipelines.cache import build_cache, opened, part_names, read_cache
from pipelines.config import load
from pipelines.errors import Unfinished, UserError
from pipelines.finetune import finetune
from pipelines.reader import ClipReader


def digests(folder: Path) -> dict[str, str]:
    """Of all files but those that tell of a run: of the last to begin, and of the last to make parts."""
    told = ("config.json", "build.json")
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in told)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def times(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def latest(out: Path) -> str:
    return json.loads((out / "cache/latest.json").read_bytes())["snapshot"]


# -- one catalog -------------------------------------------------------------------------------------------------------


def test_every_row_is_a_clip_or_a_reject_with_its_reason(cache, ids):
    assert cache.counts == {
        "planned": 34,
        "clips": 26,
        "rejected": 8,
        "rejected_videos": 4,
        "bytes": cache.counts["bytes"],
    }
    rejects = storage.read_rows(f"{cache.manifest.uri}/rejects.jsonl")
    assert all(reject["source"] == f"{reject['videoid']}.mp4" for reject in rejects)
    assert {(row["videoid"], row["reason"]) for row in rejects} == {
        *((ids[name], "not_a_video") for name in ("e0", "e1", "f1")),
        (ids["e2"], "missing"),
    }
    reader = ClipReader(cache, None)
    assert [reader.known(i)["clip_id"] for i in range(2)] == [f"{ids['a0']}:0", f"{ids['a0']}:1"]
    assert [part["clips"] for part in cache.parts] == [6, 6, 6, 6, 0, 2]
    assert [part["videos"] for part in cache.parts] == [3, 3, 3, 3, 3, 2]


def test_a_folder_with_the_name_of_a_video_is_no_video(tmp_path, settings, here, ids):
    (tmp_path / f"{ids['a0']}.mp4").mkdir()
    (tmp_path / "one.csv").write_text(f"videoid,name\n{ids['a0']},x\n")
    made = build_cache(settings(tmp_path, f"catalog.csv={tmp_path}/one.csv", f"catalog.videos={tmp_path}"))
    (reject,) = storage.read_rows(f"{made.manifest.uri}/rejects.jsonl")
    assert (reject["reason"], reject["message"]) == ("not_a_video", "a folder has its name")


def test_copies_of_a_video_are_in_the_split_of_the_first_and_the_drawn_one_is_told(cache, ids):
    index = cache.index().to_pandas().set_index("videoid")
    of = {
        name: index.loc[ids[name], ["drawn_split", "split"]].drop_duplicates().to_numpy().tolist()
        for name in ids
        if ids[name] in index.index
    }
    assert of["c1"] == [["train", "test"]]
    assert of["d0"] == [["test", "train"]]
    assert {name for name, ((drawn, split),) in of.items() if drawn != split} == {"c1", "d0"}


def test_the_same_again_does_nothing(built, settings, here, capsys):
    before = times(built)
    build_cache(settings(built))
    assert times(built) == before
    assert here.made == []
    assert "nothing to do" in capsys.readouterr().out


def test_a_build_that_was_cut_short_makes_what_is_missing_with_the_same_bytes(built, settings, here, cache):
    whole = digests(built / "cache")
    (built / "cache/snapshots" / latest(built) / "manifest.json").unlink()
    (built / "cache/latest.json").unlink()
    for part in cache.parts[1:3]:
        (built / f"cache/parts/{part['name']}.index").unlink()
    (built / f"cache/parts/{cache.parts[2]['name']}.arrow").write_bytes(b"half")
    build_cache(settings(built))
    assert here.made == [f"{part['name']}.index" for part in cache.parts[1:3]]
    assert digests(built / "cache") == whole


# -- the next ----------------------------------------------------------------------------------------------------------


def test_a_longer_catalog_adds_parts_and_a_snapshot_and_the_first_stays_as_it_is(built, settings, here, cache, ids):
    before, name = digests(built / "cache"), latest(built)
    before.pop("latest.json")
    first = ClipReader(cache, "train")
    longer = build_cache(settings(built, csv="longer"))
    after = digests(built / "cache")
    assert {file: digest for file, digest in after.items() if file in before} == before
    assert len(here.made) == 1  # of the two videos that are new
    assert latest(built) == Path(longer.manifest.uri).name != name
    assert [part["name"] for part in longer.parts[:-1]] == [part["name"] for part in cache.parts]
    assert longer.counts["planned"] == cache.counts["planned"] + 4
    assert longer.fingerprint != cache.fingerprint
    assert read_cache(settings(built)).manifest == longer.manifest
    old = read_cache(settings(built, f"cache.snapshot={name}"))
    assert (old.manifest, old.fingerprint) == (cache.manifest, cache.fingerprint)
    again, new = ClipReader(old, "train"), ClipReader(longer, "train")
    assert again.index.equals(first.index)
    assert len(new) == len(first) + 2
    known = {new.known(i)["clip_id"]: i for i in range(len(new))}
    for i in (0, len(first) - 1):
        mine, theirs = first.batch([i]), new.batch([known[first.known(i)["clip_id"]]])
        assert (mine["latents"] == theirs["latents"]).all()
    assert f"{ids['g0']}:1" in known


def test_workers_train_from_the_snapshot_their_job_began_with(built, settings, here, cache, monkeypatch, capsys):
    told = []
    monkeypatch.setattr("pipelines.cluster.refuse_unplaceable", lambda *_: None)
    monkeypatch.setattr("pipelines.cluster._nodes", dict)
    monkeypatch.setattr("pipelines.finetune._fit", lambda config, *_: told.append(config))
    with pytest.raises(UserError, match=r"weights.* is unfinished"):  # nobody has trained
        finetune(settings(built, "finetune.gpu=false"))
    assert "finetune base: begins with random weights, as family.weights names none" in capsys.readouterr().out
    build_cache(settings(built, csv="longer"))
    assert read_cache(told[0]).manifest == cache.manifest != read_cache(settings(built)).manifest


def test_the_first_catalog_again_makes_its_snapshot_the_latest(built, settings, here, cache):
    build_cache(settings(built, csv="longer"))
    here.made.clear()
    assert build_cache(settings(built)).manifest == cache.manifest
    assert here.made == []
    assert read_cache(settings(built)).manifest == cache.manifest


def test_a_video_that_arrives_later_is_added_under_another_id_as_the_page_says(
    built, settings, here, videos, cache, ids
):
    before = digests(built / "cache/parts")
    late = built / "arrived/late"
    late.mkdir(parents=True)
    shutil.copy(videos / f"{ids['a0']}.mp4", late / f"{ids['e2']}.mp4")
    (late / f"{ids['e2']}.txt").write_text("caption of e2")
    added = build_cache(settings(built, f"catalog.folder={built}/arrived"))
    assert len(here.made) == 1
    assert before.items() <= digests(built / "cache/parts").items()
    assert added.counts["clips"] == cache.counts["clips"] + 2
    known = {row["clip_id"]: row for row in added.index().to_pylist()}
    assert known[f"late~{ids['e2']}:0"]["caption"] == "caption of e2"
    rejects = storage.read_rows(f"{added.manifest.uri}/rejects.jsonl")
    assert [row["videoid"] for row in rejects if row["reason"] == "missing"] == [ids["e2"]]  # stays told


def test_a_shorter_catalog_makes_only_the_rest_of_a_part_anew(built, settings, here, videos, cache, ids):
    rows = (videos / "videos.csv").read_text().splitlines(keepends=True)
    (built / "shorter.csv").write_text("".join(row for row in rows if ids["b1"] not in row))
    config = settings(built, f"catalog.csv={built}/shorter.csv")
    shorter = build_cache(config)
    assert len(here.made) == 1
    assert shorter.counts["planned"] == cache.counts["planned"] - 2
    assert {part["name"] for part in cache.parts} - {part["name"] for part in shorter.parts} == {cache.parts[1]["name"]}
    assert ids["b1"] not in shorter.index()["videoid"].to_pylist()


def test_more_duplicates_of_an_id_are_more_rejects(built, settings, here, videos, ids):
    text = (videos / "videos.csv").read_text()
    for copies in (1, 3, 2):
        (built / "d.csv").write_text(text + f"{ids['a0']},caption of a0\n" * copies)
        made = build_cache(settings(built, f"catalog.csv={built}/d.csv"))
        rejects = storage.read_rows(f"{made.manifest.uri}/rejects.jsonl")
        assert [row["videoid"] for row in rejects if row["reason"] == "duplicate_id"] == [ids["a0"]] * copies
        assert made.counts["clips"] == 26


def test_a_catalog_can_be_built_after_the_latest_snapshot_was_removed(built, settings, here, cache):
    name = latest(built)
    shutil.rmtree(built / "cache/snapshots" / name)
    with pytest.raises(UserError, match=rf"{name} does not exist.*jobs\.build_cache"):
        read_cache(settings(built))
    again = build_cache(settings(built))
    assert again.fingerprint == cache.fingerprint
    assert here.made == []
    shutil.rmtree(built / "cache/snapshots" / name)
    assert build_cache(settings(built, csv="longer")).counts["clips"] == 30


@pytest.mark.parametrize("name", ["index.arrow", "plan.arrow"])
def test_a_damaged_table_of_a_snapshot_is_told_and_mended_as_is_advised(name, built, settings, here, cache):
    whole, table = digests(built / "cache"), Path(cache.manifest.uri) / name
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{name} is damaged .*remove it .*manifest\.json.*jobs\.build_cache"):
        opened(str(table))
    table.unlink()
    (table.parent / "manifest.json").unlink()
    build_cache(settings(built))
    assert digests(built / "cache") == whole
    assert here.made == []


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cache.stride=2", "cache.stride was 1, is 2"),
        ("cache.stride=[1, 2]", "cache.stride was 1, is [1, 2]"),
        ("cache.fps=4", "cache.fps was None, is 4.0"),
        ("cache.views_per_video=3", "cache.views_per_video was 2, is 3"),
        ("cache.flip=0.5", "cache.flip was 0.0, is 0.5"),
        ("cache.condition=random", "cache.condition was 'first', is 'random'"),
        ("cache.crop=[0, 0, 1, 0.5]", "cache.crop was None, is [0.0, 0.0, 1.0, 0.5]"),
        ("cache.test=0.4", "cache.test was 0.3, is 0.4"),
        ("cache.videos_per_part=4", "cache.videos_per_part was 3, is 4"),
        ("seed=1", "seed was 0, is 1"),
        ("family.height=24", "family.height was 16, is 24"),
        ("family.frames=3", "family.frames was 2, is 3"),
        ("family.name=videocrafter1", "family.name was 'toy', is 'videocrafter1'"),
    ],
)
def test_other_settings_are_refused_and_the_one_that_differs_is_named(override, said, built, settings, here):
    before = times(built)
    with pytest.raises(UserError, match=rf"/cache was made with another configuration .*{re.escape(said)}.*`out`"):
        build_cache(settings(built, override))
    assert times(built) == before
    assert here.made == []


def test_another_encoder_is_refused_and_told(built, settings, monkeypatch):
    monkeypatch.setattr("cil.families.toy.Toy.encoder_identity", "another")
    with pytest.raises(UserError, match=r"encoder was 'toy-dct4-scale1\.0', is 'another'"):
        build_cache(settings(built))


@pytest.mark.parametrize(
    "override",
    ["cache.watermark=[[0, 0, 0.5, 1]]", "cache.decoders=2", "cache.gpus=1", "initial_noise.where={motion: [0, 1]}"],
)
def test_what_shapes_no_clip_may_change(override, built, settings, here, cache):
    assert build_cache(settings(built, override)).manifest == cache.manifest


def test_a_clip_that_stands_in_a_cache_twice_is_a_defect(built, settings, here, cache):
    (built / "cache/snapshots" / latest(built) / "manifest.json").unlink()
    parts = built / "cache/parts"
    shutil.copy(parts / f"{cache.parts[0]['name']}.index", parts / f"{cache.parts[1]['name']}.index")
    with pytest.raises(AssertionError, match="a clip stands in it twice"):
        build_cache(settings(built))


def test_a_clip_that_is_neither_made_nor_rejected_is_a_defect(built, settings, here, cache):
    (built / "cache/snapshots" / latest(built) / "manifest.json").unlink()
    parts = built / "cache/parts"
    shutil.copy(parts / f"{cache.parts[4]['name']}.index", parts / f"{cache.parts[5]['name']}.index")
    with pytest.raises(AssertionError, match="34 clips planned, but 24 made and 12 rejected"):
        build_cache(settings(built))


def test_videos_that_fail_for_passing_reasons_keep_a_snapshot_unfinished_until_they_are_accepted(
    tmp_path, settings, here, monkeypatch, ids, cache
):
    from pipelines import clips

    real = storage.read
    failing = f"{ids['c2']}.mp4"

    def read(uri: str, *most: int) -> bytes:
        if uri.endswith(failing):
            raise OSError("the disk is away")
        return real(uri, *most)

    monkeypatch.setattr(clips.storage, "read", read)
    with pytest.raises(Unfinished, match=f"1 parts wait.*{ids['c2']}: OSError: the disk is away.*accept_transient"):
        build_cache(settings(tmp_path))
    with pytest.raises(UserError, match=r"is unfinished.*jobs\.build_cache"):
        read_cache(settings(tmp_path))
    here.made.clear()
    accepted = build_cache(settings(tmp_path, "cache.accept_transient=true"))
    assert len(here.made) == 1
    assert accepted.counts["clips"] == 24
    assert accepted.manifest.fingerprint == cache.manifest.fingerprint
    assert accepted.fingerprint != cache.fingerprint  # what is made of it must not pass for made of the whole
    assert [row["reason"] for row in storage.read_rows(f"{accepted.manifest.uri}/rejects.jsonl")].count("io") == 1


def test_a_build_goes_on_where_the_videos_have_moved_meanwhile_and_leaves_nothing_of_its_own(
    tmp_path, settings, here, videos, monkeypatch, cache
):
    from pipelines import clips

    real = storage.read

    def away(uri: str, *most: int) -> bytes:
        if uri.endswith(".mp4"):
            raise OSError("the disk is away")
        return real(uri, *most)

    with monkeypatch.context() as patched:
        patched.setattr(clips.storage, "read", away)
        with pytest.raises(Unfinished):
            build_cache(settings(tmp_path / "mine"))
    assert list(tmp_path.glob("mine/cache/snapshots/*/rows-*.arrow"))
    moved = shutil.copytree(videos, tmp_path / "moved")
    gone = settings(tmp_path / "mine", f"catalog.videos={moved}")
    assert build_cache(gone).fingerprint == cache.fingerprint
    assert not list(tmp_path.glob("mine/cache/snapshots/*/rows-*"))


def test_a_build_goes_on_where_a_shard_has_moved_among_the_same_folders(tmp_path, here, videos, ids, monkeypatch):
    from pipelines import clips

    for number, name in enumerate(["a0", "a1", "a2", "b0"]):
        (tmp_path / f"d{number % 2}").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / f"d{number % 2}/{number}.tar", "w") as tar:
            tar.add(videos / f"{ids[name]}.mp4", "one.mp4")
    config = load(None, [*SETTINGS, f"out={tmp_path}/out", f"catalog.tars={tmp_path}/d*/*.tar"])

    def away(*_: object) -> bytes:
        raise OSError("the disk is away")

    with monkeypatch.context() as patched:
        patched.setattr(clips.storage, "read_range", away)
        with pytest.raises(Unfinished):
            build_cache(config)
    (tmp_path / "d0/0.tar").rename(tmp_path / "d1/0.tar")
    assert build_cache(config).counts["rejected"] == 0


def test_a_cache_that_is_missing_and_a_snapshot_that_is_unknown_are_one_line_each(tmp_path, built, settings):
    with pytest.raises(UserError, match=r"^the latent cache at .*/cache does not exist: .*jobs\.build_cache.*$"):
        read_cache(settings(tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match=r"^the snapshot at .*/cache/snapshots/abc does not exist: .*jobs\.build_cache.*$"
    ):
        read_cache(settings(built, "cache.snapshot=abc"))
    with pytest.raises(UserError, match=r"is for family\.height=16, not 24"):
        read_cache(settings(built, "family.height=24"))


def test_clips_too_small_to_be_scored_are_refused_before_anything_is_written(tmp_path, settings):
    with pytest.raises(UserError, match="clips of 1 x 16 x 16; a motion score needs 2 frames"):
        build_cache(settings(tmp_path / "new", "family.frames=1"))
    assert not (tmp_path / "new").exists()


def test_a_catalog_of_which_nothing_can_be_read_is_a_cache_of_no_clips(tmp_path, settings, here, videos, ids):
    (tmp_path / "none.csv").write_text(f"videoid,name\n{ids['e0']},x\n{ids['e2']},y\n")
    made = build_cache(settings(tmp_path, f"catalog.csv={tmp_path}/none.csv"))
    assert (made.counts["clips"], made.counts["rejected"]) == (0, 4)
    assert len(ClipReader(made, "train")) == 0
    assert part_names(opened(f"{made.manifest.uri}/plan.arrow").read_all()) == [made.parts[0]["name"]]
