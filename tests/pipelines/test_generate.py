"""jobs.generate in this process: images made elsewhere, the settings of a row, what is rejected, the same pixels."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cil import InitialNoise, families
from pipelines import storage
from pipelines.artifact import Manifest
from pipelines.config import Config, load
from pipelines.errors import UserError
from pipelines.generate import Sampler, generate, refuse_impossible_rows
from pipelines.images import read_images
from pipelines.video import PyAVDecoder, decode_all

SIZE = ("family.preset=tiny", "family.frames=4", "family.height=16", "family.width=24")
NAMES = ("a", "b", "c", "d", "e")


def picture(file: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file)
    return file


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(NAMES):
        picture(folder / f"{name}.png", seed)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return shaken(tmp_path_factory.mktemp("weights"))


def shaken(folder: Path) -> Path:
    """toy's, as if published: random, and none of them zero, as the last layer's are before a training."""
    family, random = families.load("toy", 4, 16, 24), torch.Generator().manual_seed(1)
    state = family.network(0).state_dict()
    family.export({name: t + 0.2 * torch.randn(t.shape, generator=random) for name, t in state.items()}, folder)
    return folder


@pytest.fixture
def of(tmp_path, images, weights, here) -> Callable[..., Config]:
    """of("key=value", ...) -> videos of those images by those weights, three at once."""
    shared = [f"out={tmp_path}/out", *SIZE, "generate.steps=2", "generate.clips_per_part=3"]
    rows = f"generate.rows={{one: {{weights: {weights}}}}}"
    return lambda *overrides: load(None, [*shared, f"generate.images={images}", rows, *overrides])


def index(manifest: Manifest, name: str = "index") -> list[dict]:
    return storage.read_rows(f"{manifest.uri}/{name}.jsonl")


def videos(manifest: Manifest) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(manifest.uri).glob("*.mp4")}


def pixels(manifest: Manifest) -> dict[str, torch.Tensor]:
    return {name: decode_all(data) for name, data in videos(manifest).items()}


# -- where images come from --------------------------------------------------------------------------------------------


def test_a_folder_of_images_needs_no_cache_and_its_first_frames_are_not_called_real(of, tmp_path):
    made = generate(of())
    assert made.keys() == {"one"}
    lines = index(made["one"])
    assert [line["file"] for line in lines] == [f"{name}.mp4" for name in NAMES]
    assert lines[0] == {
        "clip_id": "a",
        "image": "a.png",
        "caption": "",
        "seed": 0,
        "file": "a.mp4",
        "fps": 8.0,
        "stride": 1,
        "row": {
            "name": "one",
            "weights": lines[0]["row"]["weights"],
            "steps": 2,
            "M": None,
            "start": "gaussian",
            "guidance": 1.0,
            "motion": None,
            "ema": True,
        },
    }
    assert all(video.shape == (4, 16, 24, 3) for video in pixels(made["one"]).values())
    assert not (Path(made["one"].uri) / "rejects.jsonl").exists()
    assert made["one"].counts == {"videos": 5, "rejected": 0}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"videos"}


def test_beside_a_cache_there_is_its_reference_too(built, settings, images, weights, here):
    rows = f"generate.rows={{one: {{weights: {weights}}}}}"
    made = generate(settings(built, rows, "generate.steps=2", "generate.reference=3", f"generate.images={images}"))
    assert made.keys() == {"reference", "one"}
    assert [len(index(each)) for each in made.values()] == [3, 5]


def test_captions_stand_beside_images_at_any_depth_and_in_the_authors_prompts(tmp_path):
    for i, name in enumerate(("x/one.png", "two.jpg", "three.webp")):
        picture(tmp_path / name, i)
    (tmp_path / "x/one.txt").write_text("\ufeffa first one\n")
    (tmp_path / "x/.hidden.png").write_bytes(b"of a file system")
    told = [(each.id, each.name, each.prompt) for each in read_images(str(tmp_path))]
    assert told == [("three", "three.webp", ""), ("two", "two.jpg", ""), ("x~one", "x/one.png", "a first one")]

    (tmp_path / "test_prompts.txt").write_text("three is named\n\nand two\nand one\n")
    assert [each.prompt for each in read_images(str(tmp_path))] == ["three is named", "and two", "and one"]
    (tmp_path / "test_prompts.txt").write_text("only one")
    with pytest.raises(UserError, match=r"3 images and 1 lines of test_prompts\.txt"):
        read_images(str(tmp_path))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_names_images_with_what_holds_for_each(ending, of, images, capfd):
    table = pd.DataFrame(
        {
            "image": ["b.png", "a.png", "a.png"],
            "prompt": ["a bee", "an ant, running", None],
            "fps": [5.25, None, None],
            "seed": [None, 7, None],
            "source": "somewhere",
        }
    )
    file = images / f"table.{ending}"
    table.to_csv(file, index=False) if ending == "csv" else table.to_parquet(file, index=False)
    made = generate(of(f"generate.images={file}", "generate.seeds=[1, 2]", "generate.fps=null"))["one"]
    told = [tuple(line[key] for key in ("file", "image", "caption", "fps", "seed")) for line in index(made)]
    assert told == [
        ("b-seed1.mp4", "b.png", "a bee", 5.25, 1),
        ("b-seed2.mp4", "b.png", "a bee", 5.25, 2),
        ("a-seed7.mp4", "a.png", "an ant, running", 8, 7),
        ("a-2-seed1.mp4", "a.png", "", 8, 1),
        ("a-2-seed2.mp4", "a.png", "", 8, 2),
    ]
    assert PyAVDecoder(storage.read(storage.join(made.uri, "b-seed1.mp4"))).fps == 5.25
    assert "source of table" in capfd.readouterr().out
    file.unlink()


def test_an_id_of_the_table_names_the_file_and_cannot_leave_the_folder(tmp_path):
    picture(tmp_path / "a.png", 0)
    (tmp_path / "t.csv").write_text("id,image\n../../x,a.png\n,a.png\n")
    assert [each.id for each in read_images(f"{tmp_path}/t.csv")] == ["..~..~x", "a"]


def test_a_name_as_long_as_a_prompt_names_its_video_too(of, tmp_path):
    names = ["ein Hund läuft über die Straße " * 7 + each for each in "ab"]
    for i, name in enumerate(names):
        picture(tmp_path / f"in/{name}.png", i)
    made = generate(of(f"generate.images={tmp_path}/in"))["one"]
    assert [line["image"] for line in index(made)] == [f"{name}.png" for name in names]
    assert len(videos(made)) == 2


def test_what_cannot_be_read_is_a_reject_with_its_reason_and_the_rest_goes_on(of, tmp_path, images, here):
    folder = tmp_path / "mixed"
    picture(folder / "good.png", 0)
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:300])
    (folder / "folder.png").mkdir()
    picture(tmp_path / "outside.png", 1)
    names = [
        "good.png",
        "text.png",
        "cut.png",
        "folder.png",
        "none.png",
        "../outside.png",
        f"{tmp_path}/outside.png",
        "",
    ]
    (folder / "t.csv").write_text("image,seed\n" + "".join(f"{name},0\n" for name in names))
    made = generate(of(f"generate.images={folder}/t.csv"))["one"]
    assert [line["image"] for line in index(made)] == ["good.png"]
    told = {line["image"]: line["reason"] for line in index(made, "rejects")}
    assert told == {
        "text.png": "damaged",
        "cut.png": "damaged",
        "folder.png": "damaged",
        "none.png": "missing",
        **dict.fromkeys(["../outside.png", f"{tmp_path}/outside.png", ""], "unsafe_name"),
    }
    assert all(line["message"] for line in index(made, "rejects"))
    assert made.counts == {"videos": 1, "rejected": 7}
    assert here.told["videos"] == {"videos": 8, "rejected_videos": 7}  # for pipelines.metrics
    # The call that it was in has the same shape: the same bytes as without the others.
    alone = tmp_path / "alone"
    picture(alone / "good.png", 0)
    assert videos(made) == videos(generate(of(f"generate.images={alone}", f"out={tmp_path}/alone-out"))["one"])


def test_a_set_without_one_image_that_can_be_read_is_refused_and_stays_unfinished(of, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_text("no picture")
    with pytest.raises(
        UserError, match=r"none of its images can be read \(a\.png: damaged, it begins with.*; when they can, remove "
    ):
        generate(of(f"generate.images={tmp_path}/bad"))
    assert not (tmp_path / "out/videos/one/manifest.json").exists()


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        ({}, "nowhere", "nowhere: has no images|nowhere: cannot be read"),
        ({"empty/x.md": ""}, "empty", "has no images .none of its 1 files is one.; expected are .png, .jpg"),
        ({"t.csv": "file,prompt\na.png,x\n"}, "t.csv", "has no column image; found are file, prompt"),
        ({"t.csv": ""}, "t.csv", "has no column image; found are none"),
        ({"t.csv": "image\n"}, "t.csv", "has no rows"),
        ({"t.csv": "image,fps\na.png\n"}, "t.csv", "row 1 has not as many fields as the header"),
        ({"t.csv": "image,fps\na.png,0\n"}, "t.csv", "row 1: fps=0: a number of at least 0.1"),
        ({"t.csv": "image,fps\na.png,fast\n"}, "t.csv", "row 1: fps=fast: a number"),
        ({"t.csv": "image,seed\na.png,-1\n"}, "t.csv", "row 1: seed=-1: a whole number of at least 0"),
        ({"t.csv": "image,seed\na.png,1.5\n"}, "t.csv", "row 1: seed=1.5: a whole number"),
        ({"t.parquet": "no table"}, "t.parquet", "is no parquet file"),
        ({"t.parquet": {"image": [{"bytes": b"", "path": "a.png"}]}}, "t.parquet", "row 1: image is a dict"),
        ({"t.txt": "a.png"}, "t.txt", "cannot be read .* expected is a folder of images, or a .csv or .parquet"),
    ],
)
def test_images_that_are_none_are_one_line_before_anything_starts(files, name, said, of, tmp_path):
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            pd.DataFrame(content).to_parquet(tmp_path / file)
        else:
            (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        generate(of(f"generate.images={tmp_path}/{name}"))
    assert "\n" not in str(error.value)
    assert f"generate.images={tmp_path}/{name}" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_picture_under_the_same_name_is_another_set_and_the_same_elsewhere_is_not(of, tmp_path, here):
    picture(tmp_path / "in/a.png", 0)
    generate(of(f"generate.images={tmp_path}/in"))
    (tmp_path / "in").rename(tmp_path / "moved")
    here.made.clear()
    generate(of(f"generate.images={tmp_path}/moved"))
    assert not here.made
    picture(tmp_path / "moved/a.png", 1)
    with pytest.raises(UserError, match=r"videos/one was made with another configuration \(images was"):
        generate(of(f"generate.images={tmp_path}/moved"))


# -- the settings of a row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", ["steps=3", "M=500", "guidance=3", "seeds=[4]", "start=analytic", "start=diagonal", "fps=3"]
)
def test_a_setting_of_the_section_is_that_of_a_row_that_says_no_other_and_reaches_its_videos(setting, of, tmp_path):
    mean = torch.linspace(-1, 1, 4 * 4 * 4 * 6, dtype=torch.float64).reshape(4, 4, 4, 6)
    InitialNoise(mean, 0.5, mean.abs()).save(tmp_path / "noise.safetensors")
    shared = ("generate.M=700", f"generate.initial_noise={tmp_path}/noise.safetensors", "generate.clips_per_part=5")
    plain = generate(of(f"out={tmp_path}/plain", *shared))["one"]
    section = generate(of(f"out={tmp_path}/section", *shared, f"generate.{setting}"))["one"]
    own = generate(of(f"out={tmp_path}/own", *shared, f"generate.rows.one.{setting}"))["one"]
    assert videos(section) == videos(own)
    assert videos(section).keys() == videos(plain).keys()
    assert all(data != videos(plain)[name] for name, data in videos(section).items())


def test_isotropic_and_diagonal_starts_differ_and_a_published_file_has_no_diagonal(of, tmp_path):
    mean = torch.zeros(4, 4, 4, 6, dtype=torch.float64)
    noise = InitialNoise(mean, 0.5, torch.linspace(0, 1, mean.numel(), dtype=torch.float64).reshape(mean.shape))
    noise.save(tmp_path / "ours.safetensors")
    noise.save(tmp_path / "published.pt", "lvdm")
    starts = ("generate.M=300", "generate.rows.one.sweep.start=[analytic, diagonal]")
    made = generate(of(*starts, f"generate.initial_noise={tmp_path}/ours.safetensors"))
    assert made.keys() == {"one_start=analytic", "one_start=diagonal"}
    assert videos(made["one_start=analytic"]) != videos(made["one_start=diagonal"])
    with pytest.raises(UserError, match=r"start=diagonal: .*published\.pt has one variance"):
        generate(of(f"out={tmp_path}/2", *starts, f"generate.initial_noise={tmp_path}/published.pt"))
    with pytest.raises(UserError, match=r"generate\.initial_noise=.*none\.pt: there is nothing"):
        generate(of(f"out={tmp_path}/2", *starts, f"generate.initial_noise={tmp_path}/none.pt"))
    (tmp_path / "text.pt").write_text("no noise")
    with pytest.raises(UserError, match=r"generate\.initial_noise=.*text\.pt: neither"):
        generate(of(f"out={tmp_path}/2", *starts, f"generate.initial_noise={tmp_path}/text.pt"))


def test_a_motion_bucket_is_for_those_who_are_told_one():
    with pytest.raises(UserError, match=r"generate\.rows\.a\.motion=9: the family toy has no such input"):
        refuse_impossible_rows(load(None, ["family.preset=tiny", "generate.rows.a.motion=9"]))
    refuse_impossible_rows(load(None, ["family.name=svd", "family.preset=tiny", "generate.rows.a.motion=9"]))


@pytest.mark.parametrize(
    ("name", "settings"), [("svd", ("motion=200", "fps=24")), ("videocrafter1", ("fps=24",)), ("i2vgenxl", ("fps=24",))]
)
def test_a_published_network_is_told_prompt_image_rate_and_motion(name, settings, of, images, tmp_path):
    """Of random weights, so that nothing is learned: every input changes the answer."""
    sizes = ("family.height=32", "family.width=32", "generate.clips_per_part=1")
    sampler = Sampler(of(f"family.name={name}", *sizes, "generate.rows={one: {weights: /none}}").model_dump())
    sampler.network._kept = (("/none", True), sampler.family.network(0).eval())
    row = sampler.rows["one"]

    def answer(prompt: str = "a cat", image: str = "a.png", **own) -> torch.Tensor:
        told = {"id": "same", "name": "x", "uri": f"{images}/{image}", "prompt": prompt}
        changed = type(row)(row.arm, row.seed, row.weights, row.settings.model_copy(update=own))
        _, batch = sampler.pictures(changed.settings, [{"picture": told, "seed": 0, "ending": ""}])
        return sampler.sample(changed, batch, ["same"], [0])

    plain = answer()
    assert torch.equal(plain, answer())
    changes = [{"image": "b.png"}, *({key: int(value)} for key, _, value in (s.partition("=") for s in settings))]
    if name != "svd":
        changes.append({"prompt": "two dogs"})
    for change in changes:
        assert (answer(**change) - plain).abs().max() > 1e-6, change


def test_the_rate_of_a_row_is_told_of_cached_clips_too(built, settings, weights, here):
    rows = f"generate.rows={{own: {{weights: {weights}}}, five: {{weights: {weights}, fps: 5}}}}"
    config = settings(built, rows, "generate.steps=2", "generate.reference=2", "generate.clips=2")
    made = generate(config)
    assert {name: {line["fps"] for line in index(each)} for name, each in made.items()} == {
        "real": {8.0},
        "reference": {8.0},
        "own": {8.0},
        "five": {5},
    }
    assert pixels(made["own"]).keys() == pixels(made["real"]).keys()
    told = []
    sampler = Sampler(config.model_dump())
    sampler.family.rates = lambda clips: told.append([clip.fps for clip in clips]) or {}
    sampler.clips(sampler.rows["five"].settings, [{"number": 0, "ending": "", "seed": 0}])
    assert told == [[5.0]]


def test_each_seed_is_a_video_of_its_own_and_the_same_in_whatever_row(of, tmp_path):
    several = generate(of("generate.rows.one.seeds=[0, 3]"))["one"]
    alone = generate(of("generate.rows.one.seeds=[3]", f"out={tmp_path}/alone"))["one"]
    told = [(line["file"], line["clip_id"], line["seed"]) for line in index(several)]
    assert told == [(f"{name}-seed{seed}.mp4", name, seed) for name in NAMES for seed in (0, 3)]
    ours, theirs = pixels(several), pixels(alone)
    for name in NAMES:
        assert not torch.equal(ours[f"{name}-seed0.mp4"], ours[f"{name}-seed3.mp4"])
        difference = (ours[f"{name}-seed3.mp4"].int() - theirs[f"{name}.mp4"].int()).abs().max()
        assert difference <= 2, difference  # other neighbours in the call: float32 sums in another order


def test_the_study_of_the_documentation_has_the_rows_that_it_says(tmp_path):
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    study, *_ = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "study.yaml").write_text(study)
    config = load(tmp_path / "study.yaml", ["generate.images=/data/photos", "generate.fps=8"])
    refuse_impossible_rows(load(tmp_path / "study.yaml", ["family.weights=null", "generate.rows.before.weights=naive"]))
    told = {name: (row.weights, row.M, row.seeds, row.fps) for name, row in config.arms().items()}
    cured = [f"cured_beta_m={beta_m}_a={a}" for beta_m in (7.5, 15) for a in (1, 5)]
    assert list(config.training_rows()) == ["naive", *cured]
    assert told == {
        "before": ("published", None, [0], 8),
        **{
            f"naive_M={M}_start={s}": ("naive", M, [0, 1], 8) for M in (100, 200, 700) for s in ("gaussian", "analytic")
        },
        **{name: (name, None, [0, 1], 8) for name in cured},
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_samples_on_a_gpu_if_it_has_a_share_of_one_and_never_else(of, monkeypatch):
    """Where PyTorch says that there is one, and fails if it is asked for it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    row = of().evaluation_rows()["one"]
    Sampler(of().model_dump()).network.of(row.weights, True)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        Sampler(of("generate.gpus=0.5").model_dump()).network.of(row.weights, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["toy", "svd", "dynamicrafter", "i2vgenxl"])
def test_a_sample_of_a_gpu_is_that_of_a_cpu_but_for_rounding(name, of, images):
    size = ("family.height=32", "family.width=32") if name != "toy" else ()
    one, other = (latents_of(of(f"family.name={name}", *size, f"generate.gpus={g}"), [0], images) for g in (0, 1))
    assert (one["a"] - other["a"].cpu()).abs().max() < 0.05 * one["a"].std()


@pytest.mark.slow
def test_more_gpus_than_the_cluster_has_are_one_line_and_exit_2(tmp_path, images, weights):
    told = (*SIZE, f"out={tmp_path}", f"generate.images={images}", f"generate.rows={{one: {{weights: {weights}}}}}")
    command = [sys.executable, "-m", "jobs.generate", *told, "generate.gpus=1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    wanted = "generate: generate.gpus=1.0: the cluster has 0 GPUs; 0 samples on CPUs"
    assert done.stderr.strip().splitlines()[-1] == wanted
    assert not list(tmp_path.iterdir())


def test_images_and_videos_are_on_s3_as_on_a_disk(of, images, endpoint, tmp_path):
    client = boto3.client("s3")
    for name in NAMES:
        client.upload_file(str(images / f"{name}.png"), "webvid", f"photos/{name}.png")
    table = "image,prompt\na.png,an ant\ns3://webvid/photos/b.png,a bee\nnone.png,\n../photos/a.png,\n"
    client.put_object(Bucket="webvid", Key="photos/t.csv", Body=table.encode())
    here, there = (
        generate(of())["one"],
        generate(of("generate.images=s3://webvid/photos", "out=s3://webvid/out"))["one"],
    )
    for name in NAMES:
        assert storage.read(f"{there.uri}/{name}.mp4") == videos(here)[f"{name}.mp4"]
    told = [(each.id, each.uri, each.problem) for each in read_images("s3://webvid/photos/t.csv")]
    assert told == [
        ("a", "s3://webvid/photos/a.png", ""),
        ("b", "s3://webvid/photos/b.png", ""),
        ("none", "s3://webvid/photos/none.png", "missing"),
        ("..~photos~a", "s3://webvid/photos/../photos/a.png", "unsafe_name"),
    ]
    with pytest.raises(UserError, match=r"s3://webvid/nothing: has no images .it is empty, or not there"):
        read_images("s3://webvid/nothing")


# -- the same pixels ---------------------------------------------------------------------------------------------------


def latents_of(config: Config, numbers: list[int], images: Path) -> dict[str, torch.Tensor]:
    sampler = Sampler(config.model_dump())
    if config.family.name != "toy":
        net = sampler.family.network(0).to(sampler.device).eval()
        sampler.network._kept = ((sampler.rows["one"].weights, True), net)
    pictures = read_images(str(images))
    samples = [{"picture": vars(pictures[i]), "seed": 0, "ending": ""} for i in numbers]
    lines, batch = sampler.pictures(sampler.rows["one"].settings, samples)
    ids = [line["clip_id"] for line in lines]
    return dict(zip(ids, sampler.sample(sampler.rows["one"], batch, ids, [0] * len(ids)), strict=True))


@pytest.mark.parametrize("name", ["toy", "svd", "dynamicrafter"])
def test_a_sample_is_the_same_whoever_its_neighbours_are_and_nearly_so_in_a_call_of_another_size(name, of, images):
    """Of tiny networks in float32; docs/evaluation.md has what was measured."""
    size = ("family.height=32", "family.width=32") if name != "toy" else ()
    config = of(f"family.name={name}", *size)
    first, other = latents_of(config, [0, 1, 2], images), latents_of(config, [4, 2, 0], images)
    for name in ("a", "c"):
        assert torch.equal(first[name], other[name])
    for numbers in ([0], [0, 1, 2, 3, 4]):
        difference = (latents_of(config, numbers, images)["a"] - first["a"]).abs().max() / first["a"].std()
        assert difference < 1e-5, difference


def test_a_configuration_that_is_dumped_and_read_again_means_the_same(of):
    config = of("generate.M=700", "generate.rows.one.M=null", "generate.rows.one.sweep.steps=[2, 3]")
    again = Config.model_validate(json.loads(config.model_dump_json()))
    assert again.evaluation_rows() == config.evaluation_rows()
    assert [(row.settings.M, row.settings.steps) for row in again.evaluation_rows().values()] == [(None, 2), (None, 3)]
