"""The clips of a page: of the same image, prompt and seed in every row, and small enough."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from pipelines import side_by_side as module
from pipelines import storage
from pipelines.config import load
from pipelines.decoding import DecodePool
from pipelines.side_by_side import SideBySide, side_by_side, small
from pipelines.study import Arm, Study
from pipelines.video import PyAVDecoder, encode


def disc(brightness: int, frames: int = 4, height: int = 16, width: int = 16) -> np.ndarray:
    made = np.full((frames, height, width, 3), brightness, np.uint8)
    made[:, : height // 2, : width // 2] = 255 - brightness
    return made


@pytest.fixture
def arm(tmp_path: Path):
    """arm(name, {seed: lines}) -> a row whose videos are flat pictures, as bright as their line says."""

    def made(name: str, runs: dict[int, list[dict]], index: bool = True, trained: bool = True) -> Arm:
        found = Arm(name, is_real=name == "real")
        for seed, lines in runs.items():
            folder = str(tmp_path / "videos" / f"{name}-{seed}")
            for line in lines:
                storage.write(
                    storage.join(folder, line["file"]), encode(disc(line.pop("bright", 60)), line.pop("is", 8))
                )
            where = folder if index else str(tmp_path / "scores" / f"{name}-{seed}")
            storage.write_rows(storage.join(where, "index.jsonl" if index else "scores.jsonl"), lines)
            tags = {"cil.row": name, "cil.videos": folder, "cil.scores": str(tmp_path / "scores" / f"{name}-{seed}")}
            params = {"train.seed": str(seed)} if trained else {}
            found.runs[seed] = SimpleNamespace(data=SimpleNamespace(params=params, tags=tags, metrics={}))
        return found

    return made


def line(number: int, seed: int | None = 0, caption: str = "a disc", **told) -> dict:
    said = {} if seed is None else {"seed": seed}
    file = f"{number}_0.mp4" if not seed else f"{number}_0-seed{seed}.mp4"
    return {"file": file, "clip_id": f"{number}:0", "caption": caption, **said, **told}


def shown(*arms: Arm, clips: int = 6, more: str = "seed=0") -> SideBySide:
    config = load(None, [f"compare.clips={clips}", more])
    return side_by_side(config, Study("s", {each.name: each for each in arms}, []))


def brightness(made: SideBySide) -> dict[str, list[int | None]]:
    """Of each clip what it was made with, so that it is known which one it is."""
    return {
        name: [None if clip is None else round(PyAVDecoder(clip).frames([0])[0, -1, -1].mean()) for clip in clips]
        for name, clips in made.rows.items()
    }


def about(values: list[int | None]) -> list:
    return [value if value is None else pytest.approx(value, abs=6) for value in values]


def test_rows_are_shown_with_the_trainings_seed_that_most_of_them_have(arm):
    made = shown(
        arm("naive", {11: [line(1, bright=40)], 12: [line(1, bright=80)]}),
        arm("cure", {12: [line(1, bright=120)], 13: [line(1, bright=160)]}),
    )
    assert made.seed == 12
    assert brightness(made) == {"naive": about([80]), "cure": about([120])}
    assert made.notes == []


def test_a_row_without_that_seed_is_a_hole_and_one_that_shares_no_seed_says_which_it_is_shown_with(arm):
    made = shown(
        arm("real", {0: [line(1, seed=None, bright=20)]}, trained=False),
        arm("base", {0: [line(1, bright=60)]}),
        arm("naive", {11: [line(1)], 12: [line(1)]}),
        arm("cure", {11: [line(1, bright=100)]}),
        arm("late", {12: [line(1, bright=200)]}),
        arm("published", {0: [line(1, bright=140)]}, trained=False),
    )
    found = brightness(made)
    assert found["late"] == [None]
    assert [found[name] for name in ("real", "base", "cure", "published")] == [*map(about, ([20], [60], [100], [140]))]
    assert made.notes == [
        "base is shown with seed 0: it has no seed that another row has.",
        "late has no run of seed 11, which the others are shown with.",
    ]


def test_a_column_is_one_image_one_seed_of_a_sample_and_one_prompt(arm):
    both = [line(1, bright=40), line(1, seed=1, bright=80), line(2, bright=120)]
    made = shown(
        arm("naive", {0: both}),
        arm("cure", {0: [line(1, seed=1, bright=100), line(2, caption="a square")]}),
        arm("other", {0: [line(1, seed=1, bright=160), line(2, bright=200)]}),
        arm("third", {0: [line(1, bright=220)]}),
    )
    assert made.prompts == ["a disc (seed 1)", "a disc (seed 0)"]
    assert brightness(made) == {
        "naive": about([80, 120]),
        "cure": about([100, None]),
        "other": about([160, 200]),
        "third": [None, None],
    }
    assert made.notes == [
        "third has no video of seed 1 of 1_0.",
        "cure was given another prompt for 2_0.",
        "third has no video of 2_0.",
    ]


def test_a_set_made_elsewhere_is_paired_by_the_names_of_its_files(arm):
    def named(name: str, **told) -> dict:
        return {"file": f"{name}.mp4", "name": name, "clip_id": name, **told}

    study = arm("naive", {0: [line(1, bright=40), line(2, bright=80), line(3)]})
    theirs = arm("theirs", {0: [named("2_0", bright=120), named("9", bright=20)]}, index=False, trained=False)
    images = arm(
        "of-images", {0: [{"file": "cat-seed1.mp4", "clip_id": "cat", "image": "2_0.png", "caption": "a disc"}]}
    )
    made = shown(study, theirs, images, clips=2)
    assert brightness(made) == {"naive": about([80, 40]), "theirs": about([120, None]), "of-images": about([60, None])}
    assert made.notes == [
        "theirs is paired by the names of its files; its prompts and seeds are not known.",
        "theirs has no video of 1_0.",
        "of-images has no video of 1_0.",
    ]


def test_what_cannot_be_read_is_a_hole_with_a_note(arm, tmp_path):
    made = arm("naive", {0: [line(1), line(2)]}), arm("cure", {0: [line(1), line(2)]}), arm("lost", {0: [line(1)]})
    (tmp_path / "videos/cure-0/2_0.mp4").write_bytes(b"no video")
    (tmp_path / "videos/lost-0/index.jsonl").unlink()
    found = shown(*made)
    assert [clip is None for clip in found.rows["cure"]] == [False, True]
    assert found.rows["lost"] == [None, None]
    assert found.notes == [
        "lost names no videos that can be read from here.",
        "cure has a video that cannot be read from here of 2_0.",
    ]


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "{secret}", "../../secret.mp4", "s3://bucket/secret.mp4", "a/../../../secret.mp4", 7, None]
)
@pytest.mark.parametrize("index", [True, False])
def test_a_run_shows_videos_of_its_own_folder_only(arm, tmp_path, file, index):
    (tmp_path / "secret.mp4").write_bytes(encode(disc(90), 8))
    naive, cure = (arm(name, {0: [line(1)]}) for name in ("naive", "cure"))
    where = Path(cure.runs[0].data.tags["cil.videos" if index else "cil.scores"])
    Path(cure.runs[0].data.tags["cil.videos"], "index.jsonl").unlink()
    where.mkdir(parents=True, exist_ok=True)
    told = f"{tmp_path}/secret.mp4" if file == "{secret}" else file
    storage.write_rows(
        str(where / ("index.jsonl" if index else "scores.jsonl")), [line(1) | {"file": told, "name": "1_0"}]
    )
    assert shown(naive, cure).rows["cure"] == [None]


def test_a_page_has_a_bound_and_says_what_it_leaves_out(arm, monkeypatch):
    rows = [arm(name, {0: [line(number) for number in range(6)]}) for name in ("naive", "cure")]
    monkeypatch.setattr(module, "MOST", 8)
    assert len(shown(*rows).prompts) == 4
    assert shown(*rows).notes == ["2 of 6 images are left out: a page shows at most 8 clips, and 24 MiB of them."]
    monkeypatch.setattr(module, "MOST", 240)
    monkeypatch.setattr(module, "LARGEST", 1)
    made = shown(*rows)
    assert [len(clips) for clips in made.rows.values()] == [1, 1]  # one at the least
    assert made.notes[0].startswith("5 of 6 images are left out")


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    with DecodePool(PyAVDecoder, seconds=60) as made:
        yield made


def test_large_long_heavy_and_strange_videos_are_made_small(arm, pool):
    plain = encode(disc(60), 8)
    assert small(plain, pool).data == plain
    noise = np.random.default_rng(0).integers(0, 255, (40, 240, 320, 3), dtype=np.uint8)
    heavy = encode(noise, 8)
    assert len(heavy) > module.HEAVIEST
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)  # which browsers do not play
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        for picture in disc(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    coloured = io.BytesIO()
    with av.open(coloured, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv444p"  # H.264 that many browsers do not play either
        for picture in disc(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    for data, size, frames, smaller in [
        (coloured.getvalue(), (16, 16), 4, False),
        (encode(disc(60, 3, 300, 640), 8), (150, 320), 3, True),
        (encode(disc(60, 100), 8), (16, 16), 64, True),
        (heavy, (240, 320), 40, False),
        (target.getvalue(), (16, 16), 4, False),
    ]:
        clip = small(data, pool)
        with av.open(io.BytesIO(clip.data)) as container:
            context = container.streams.video[0].codec_context
            assert (context.name, context.pix_fmt, context.height, context.width) == ("h264", "yuv420p", *size)
        video = PyAVDecoder(clip.data)
        assert (video.count, video.fps, clip.fps, clip.smaller) == (frames, 8, 8, smaller)

    assert len(small(heavy, pool).data) < len(heavy)


def test_a_video_of_more_than_memory_is_a_hole(arm):
    made = shown(arm("naive", {0: [line(1)]}), more="score.memory=0.000001")
    assert made.rows == {"naive": [None]}
    assert "cannot be read from here" in made.notes[0]


def test_rows_of_different_frame_rates_are_told(arm):
    made = shown(arm("naive", {0: [line(1)]}), arm("cure", {0: [line(1, **{"is": 3})]}))
    assert made.notes == ["Clips have different frame rates: 3 in cure; 8 in naive."]
