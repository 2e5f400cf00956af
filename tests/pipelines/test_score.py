"""jobs.score on sets of videos, also made elsewhere: what is measured of them, and what is said of what cannot be."""

import io
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import scipy.ndimage
import torch
from mlflow import MlflowClient
from PIL import Image
from published import C3D, I3D, Lengthy, saved, write_clip, write_raft
from test_decoding import Perilous
from test_generate import picture, shaken
from torch import Tensor

from cil.images import read_image
from cil.metrics.alignment import psnr, ssim
from cil.metrics.consistency import warp_error
from cil.metrics.detectors import Detector
from cil.metrics.frechet import frechet_distance
from cil.metrics.inception_score import ClassMoments, split_of
from cil.metrics.motion import motion_score
from cil.metrics.spectra import spatial_spectrum, temporal_spectrum
from pipelines import storage
from pipelines.artifact import Artifact
from pipelines.cache import build_cache
from pipelines.compare import compare
from pipelines.config import load
from pipelines.decoding import DecodePool
from pipelines.errors import UserError
from pipelines.generate import generate
from pipelines.models import family_of, shape_of
from pipelines.score import score
from pipelines.tracking import runs
from pipelines.video import PyAVDecoder, decode_all, encode
from pipelines.weights import network_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def clip(seed: int, speed: float, frames: int = 6, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """A texture that drifts, uint8 [T, H, W, 3]."""
    random = np.random.default_rng(seed)
    scene = scipy.ndimage.gaussian_filter(random.standard_normal((*size, 3)), (2, 2, 0), mode="wrap")
    scene = 128 + 45 * scene / scene.std() + random.uniform(-30, 30, 3)
    shown = [scipy.ndimage.shift(scene, (0, speed * k, 0), order=1, mode="grid-wrap") for k in range(frames)]
    return np.clip(np.stack(shown), 0, 255).astype(np.uint8)


def write_set(folder: Path, speed: float, names: list[str], fps: int = 8, seed: int = 0, **kind) -> Path:
    folder.mkdir(parents=True)
    for k, name in enumerate(names):
        path = folder / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(clip(seed + k, speed, **kind), fps))
    return folder


PAIRED = {"motion_lack", "psnr", "ssim", "first_frame_error"}
NAMES = [f"n{k}" for k in range(11)] + ["inner/n11"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """ours (slow, two damaged), other (other names), reference and true (fast), and images of some."""
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "ours", 0.3, NAMES)
    (root / "ours/broken.mp4").write_bytes(b"no video")
    (root / "ours/short.mp4").write_bytes(encode(clip(0, 1, frames=1), 8))
    (root / "ours/notes.txt").write_text("not a video")
    write_set(root / "other", 0.3, [f"x{k}" for k in range(4)], seed=50)
    write_set(root / "true", 1.5, NAMES)
    write_set(root / "reference", 1.5, [f"r{k}" for k in range(13)], seed=100)
    (root / "images").mkdir()
    for k in range(3):
        picture = np.pad(clip(k, 0.3)[0], ((0, 0), (16, 16), (0, 0)), mode="edge")  # wider: its middle is meant
        Image.fromarray(picture).save(root / f"images/n{k}.png")
    (root / "images/n3.jpg").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def told(sets, store, here, tmp_path):
    """told("key=value", ...) -> a configuration of `ours`, measured to the reference, scored in this process."""

    def of(*overrides: str):
        named = [f"out={tmp_path}/out", f"tracking.uri={store}", f"tracking.experiment={tmp_path.name}"]
        return load(None, [*named, f"score.videos.ours={sets}/ours", f"score.reference={sets}/reference", *overrides])

    return of


def table(config, name: str = "ours", file: str = "scores") -> dict[str, dict]:
    return {line["file"]: line for line in storage.read_rows(f"{config.out}/scores/{name}/{file}.jsonl")}


def run_of(config, name: str = "ours"):
    (found,) = [run for run in runs(config, "evaluate") if run.info.run_name == name]
    return found


def test_scores_and_their_comparison_are_written_to_s3_as_to_a_disk(told, endpoint, tmp_path):
    here = told()
    score(here)
    there = told("out=s3://webvid/scored", f"tracking.experiment={tmp_path.name}-there")
    score(there)
    for file in ("scores", "rejects"):
        name = f"scores/ours/{file}.jsonl"
        assert storage.read(f"{there.out}/{name}") == storage.read(f"{here.out}/{name}")
    page = storage.read(f"{compare(there).uri}/index.html").decode()
    assert "ours" in page
    assert page.count("<video") == storage.read(f"{compare(here).uri}/index.html").decode().count("<video") > 0


def test_two_folders_from_elsewhere_are_scored_without_a_cache_or_a_study(told, sets, capfd):
    config = told()
    score(config)
    lines = table(config)
    assert len(lines) == 12
    frames = decode_all((sets / "ours/n4.mp4").read_bytes())
    assert lines["n4.mp4"]["motion"] == motion_score(frames)
    assert (lines["n4.mp4"]["warp_error"], lines["n4.mp4"]["hidden"]) == tuple(warp_error(frames))
    assert lines["n4.mp4"]["spatial"] == pytest.approx(spatial_spectrum(frames).tolist(), rel=1e-5)
    assert lines["n4.mp4"]["temporal"] == pytest.approx(temporal_spectrum(frames).tolist(), rel=1e-5)
    assert lines["inner/n11.mp4"]["clip_id"] == "inner/n11"
    found = run_of(config)
    metrics = found.data.metrics
    assert metrics["motion"] == pytest.approx(np.mean([line["motion"] for line in lines.values()]))
    assert metrics["motion_error"] > 0.5  # to the reference, as there are no true clips
    assert metrics["static_share"] == 1  # by the motion score, which is below 0.4 of all
    assert metrics["spectrum_time"] > metrics["spectrum_space"] > 0
    assert (metrics["videos"], metrics["rejects"]) == (12, 2)
    absent = {"speed", "frechet", "fvd", "is", "psnr", "first_frame_error", "motion_lack", "motion_off", "leakage"}
    assert not absent & metrics.keys()
    assert "cil.weights" not in found.data.tags
    assert {run.info.run_name for run in runs(config, "evaluate")} == {"ours"}
    assert not Path(config.out, "feature_net").exists()
    spectra = json.loads(
        Path(MlflowClient(config.tracking.uri).download_artifacts(found.info.run_id, "spectra.json")).read_text()
    )
    assert spectra["spatial"]["ours"] == pytest.approx(np.mean([line["spatial"] for line in lines.values()], axis=0))
    assert len(spectra["temporal"]["reference"]) == 5


def test_what_cannot_be_scored_is_a_row_with_its_reason_and_the_rest_goes_on(told, here, capfd):
    config = told()
    counts = score(config)["ours"].counts
    rejects = table(config, file="rejects")
    assert {file: line["reason"] for file, line in rejects.items()} == {
        "broken.mp4": "not_a_video",
        "short.mp4": "unfit",
    }
    assert "a motion score needs 2 frames" in rejects["short.mp4"]["message"]
    assert (counts["videos"], counts["rejects"]) == (12, 2)
    assert here.told["scores"]["rejected_videos"] == 2  # for pipelines.metrics
    assert here.told["scores"]["videos"] >= 14  # those of the reference too
    assert "2 of 14 videos cannot be scored" in capfd.readouterr().out


def test_a_reference_is_known_by_its_videos_whatever_else_is_measured(told, sets, tmp_path):
    known = set()
    for name, more in (("one", "score.measures=[spectra]"), ("two", "score.measures=[]")):
        config = told(f"out={tmp_path}/{name}", f"tracking.experiment={tmp_path.name}-{name}", more)
        score(config)
        known.add(run_of(config).data.params["score.reference"])
    assert len(known) == 1
    config = told(f"out={tmp_path}/three", f"tracking.experiment={tmp_path.name}-three", f"score.reference={sets}/true")
    score(config)
    assert run_of(config).data.params["score.reference"] not in known


def test_a_link_that_leads_nowhere_costs_its_own_row(told, tmp_path):
    write_set(tmp_path / "links", 0.3, ["n0", "n1"])
    (tmp_path / "links/gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "links/loop.mp4").symlink_to("loop.mp4")
    config = told(f"score.videos.ours={tmp_path}/links")
    score(config)
    rejects = table(config, file="rejects")
    assert {file: line["reason"] for file, line in rejects.items()} == {"gone.mp4": "missing", "loop.mp4": "damaged"}
    assert table(config).keys() == {"n0.mp4", "n1.mp4"}


def test_sets_are_paired_by_the_names_of_their_files(told, sets, capfd):
    config = told(f"score.real={sets}/true", f"score.videos.other={sets}/other")
    score(config)
    assert "other: 0 of its 4 videos have a true clip" in capfd.readouterr().out
    ours, true = table(config), table(config, "real")
    for name in ("n4.mp4", "inner/n11.mp4"):
        assert ours[name]["motion_lack"] == true[name]["motion"] - ours[name]["motion"] > 1
        a, b = (decode_all((sets / folder / name).read_bytes())[0] for folder in ("ours", "true"))
        assert (ours[name]["psnr"], ours[name]["ssim"]) == (psnr(a, b), ssim(a, b))
    found = run_of(config).data.metrics
    lack = np.array([line["motion_lack"] for line in ours.values()])
    assert (found["motion_lack"], found["motion_off"]) == (pytest.approx(lack.mean()), pytest.approx(abs(lack).mean()))
    assert found["motion_error"] == pytest.approx(lack.mean(), rel=0.05)
    other = run_of(config, "other").data.metrics
    assert not {"motion_lack", "motion_off", "psnr", "ssim", "first_frame_error"} & other.keys()
    assert {"motion", "motion_error", "spectrum_time", "warp_error"} < other.keys()
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    assert [name for name in found if f"`{name}`" not in page] == []
    real = run_of(config, "real").data.metrics
    assert (real["first_frame_error"], real["psnr"], real["motion_error"]) == (0, 100, 0)


def test_conditional_images_may_be_pictures_of_another_size_without_true_clips(told, sets, tmp_path):
    folder = write_clip(tmp_path / "clip")
    config = told(f"score.real={sets}/images", f"score.clip={folder}")
    score(config)
    lines = table(config)
    first = decode_all((sets / "ours/n2.mp4").read_bytes())[0]
    assert lines["n2.mp4"]["psnr"] == psnr(first, torch.from_numpy(clip(2, 0.3)[0])) > 25
    assert lines["n2.mp4"]["clip_similarity"] > 0.99
    assert "psnr" not in lines["n3.mp4"]  # its picture is none
    assert table(config, file="rejects")["n3.mp4"]["reason"] == "image"
    assert lines["n3.mp4"]["motion"] > 0
    assert not Path(config.out, "scores/real").exists()
    assert run_of(config).data.metrics["clip_similarity"] > 0.99
    assert len(run_of(config).data.params["score.clip"]) == 16


def test_where_a_name_means_two_files_no_pair_is_guessed(told, sets, tmp_path, capfd):
    real = tmp_path / "real"
    shutil.copytree(sets / "images", real)
    shutil.copy(real / "n1.png", real / "n1.jpg")
    for name in ("n4.mp4", "n4.MP4", "n5.mp4"):
        shutil.copy(sets / "true/n5.mp4", real / name)
    config = told(f"score.real={real}")
    score(config)
    lines, said = table(config), capfd.readouterr().out
    assert f"score.real={real}: 1 names mean several files each (n1.jpg, n1.png ...): no pair is guessed" in said
    assert f"score.real={real}: 1 names mean several files each (n4.MP4, n4.mp4 ...): no pair is guessed" in said
    for file, paired in {
        "n1.mp4": set(),
        "n4.mp4": set(),
        "n2.mp4": PAIRED - {"motion_lack"},
        "n5.mp4": PAIRED,
    }.items():
        assert PAIRED & lines[file].keys() == paired, file


def test_a_video_that_was_written_anew_in_its_size_is_another_one(told, sets, tmp_path):
    folder = Path(shutil.copytree(sets / "other", tmp_path / "other"))
    config = told(f"score.videos={{other: {folder}}}")
    score(config)
    score(config)
    video = folder / "x0.mp4"
    video.write_bytes(video.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"scores/other was made with another configuration \(videos was"):
        score(config)


def by_hand(detector: Detector, folder: Path) -> Tensor:
    files = [file for file in sorted(folder.rglob("*.mp4")) if file.name not in ("broken.mp4", "short.mp4")]
    return torch.cat([detector(decode_all(file.read_bytes())[None]) for file in files])


def test_fvd_and_is_are_those_of_the_networks_features_with_intervals_and_a_warning(
    told, sets, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("pipelines.score.VIDEOS_PER_PART", 5)  # moments of several parts are merged
    i3d, c3d = saved(I3D(), tmp_path / "i3d.pt"), saved(C3D(), tmp_path / "c3d.pt")
    config = told(f"score.fvd={i3d}", f"score.inception={c3d}")
    score(config)
    found = run_of(config)
    metrics = found.data.metrics
    ours, theirs = (by_hand(Detector.features(i3d), sets / name) for name in ("ours", "reference"))
    assert metrics["fvd"] == pytest.approx(frechet_distance(ours, theirs), rel=1e-9)
    assert metrics["fvd_low"] < metrics["fvd"] < metrics["fvd_high"]
    order = [line["file"] for line in storage.read_rows(f"{config.out}/scores/ours/scores.jsonl")]
    p = torch.cat([Detector.classes(c3d)(decode_all((sets / "ours" / f).read_bytes())[None]) for f in order])
    scores = ClassMoments.of(p, split_of(torch.arange(12), 12)).scores
    assert metrics["is"] == pytest.approx(float(scores.mean()))
    assert metrics["is_sd"] == pytest.approx(float(scores.std(unbiased=False)))
    assert metrics["is_low"] < metrics["is"] < metrics["is_high"]
    told_of = capfd.readouterr().out
    assert "ours: fvd: this set has 12 videos, where published figures are of 2,048" in told_of
    assert "ours: is: this set has 12 videos, where published figures are of 10,000" in told_of
    assert "12 videos" in found.data.tags["cil.too_small"]
    assert found.data.params["score.fvd"] == Detector.features(i3d).identity
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    assert [name for name in metrics if f"`{name}`" not in page] == []
    # Features are for sets: a table of scores has none.
    assert not {"fvd", "classes", "velocity"} & next(iter(table(config).values())).keys()


def test_features_that_depend_on_the_video_are_a_hole_with_a_reason_and_the_rest_goes_on(told, sets, tmp_path, capfd):
    """Sets of several lengths, and one that has two."""
    longer = write_set(tmp_path / "longer", 1.0, ["a", "b", "c"], frames=7)
    mixed = write_set(tmp_path / "mixed", 1.0, ["a", "b"])
    (mixed / "c.mp4").write_bytes((longer / "c.mp4").read_bytes())
    net = saved(Lengthy(), tmp_path / "net.pt")
    lots = f"score.videos={{longer: {longer}, mixed: {mixed}, ours: {sets}/ours}}"
    config = told(f"score.fvd={net}", f"score.inception={net}", lots)
    score(config)
    found = {name: run_of(config, name).data for name in ("longer", "mixed", "ours")}
    assert {name for name, data in found.items() if "fvd" in data.metrics} == {"ours"}
    assert {name for name, data in found.items() if "is" in data.metrics} == {"longer", "ours"}
    assert all(data.metrics["motion"] > 0 for data in found.values())
    said = capfd.readouterr().out
    assert "scores: longer: no fvd: features of 7 and of 6 dimensions" in said
    assert "scores: mixed: no fvd: features of 6 and of 7 dimensions in one set" in said
    assert "scores: mixed: no is: features of 6 and of 7 dimensions in one set" in said
    assert "score.protocol=paper takes as many frames of each" in found["mixed"].tags["cil.too_small"]


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("foo://x", r"^tracking\.uri=foo://x: "),
        ("postgresql://127.0.0.1:{port}/db", r"^tracking\.uri=postgresql://.*No module named 'psycopg"),
        ("{folder}", r"^tracking\.uri=.*file"),
    ],
)
def test_a_tracking_store_that_cannot_be_used_is_said_before_anything_is_scored(told, tmp_path, uri, says):
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = told(f"tracking.uri={uri.format(port=server.getsockname()[1], folder=tmp_path)}")
        with pytest.raises(UserError, match=says):
            score(config)
    assert not Path(config.out, "scores").exists()


def test_without_a_bootstrap_there_is_no_interval(told, tmp_path):
    config = told(f"score.fvd={saved(I3D(), tmp_path / 'i3d.pt')}", "score.bootstrap=0")
    score(config)
    assert "fvd" in run_of(config).data.metrics
    assert "fvd_low" not in run_of(config).data.metrics


def test_of_more_videos_than_memory_is_meant_for_there_is_a_distance_and_no_interval(told, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.summary.KEPT", 12)  # the reference has 13
    config = told(
        f"score.fvd={saved(I3D(), tmp_path / 'i3d.pt')}", f"score.inception={saved(C3D(), tmp_path / 'c.pt')}"
    )
    score(config)
    assert "fvd_low" not in run_of(config).data.metrics
    assert {"fvd", "is_low"} < run_of(config).data.metrics.keys()


def test_the_flow_is_rafts_where_its_weights_are_given_and_that_shapes_the_scores(told, tmp_path, capfd):
    """Weights that see 4.8 pixels a frame in whatever they look at, and both ways, of which none leads back."""
    folder = write_set(tmp_path / "still", 0, ["a"], frames=2, size=(128, 128))
    write_set(tmp_path / "still/small", 0, ["b"], frames=2)
    weights = write_raft(tmp_path / "raft.pth", (0.04, 0.03))
    told_of = f"score.videos={{ours: {folder}}}", f"score.reference={folder}", "score.measures=[consistency]"
    config = told(*told_of, f"score.raft={weights}")
    score(config)
    line = table(config)["a.mp4"]
    assert (line["motion"], line["dynamic"], line["hidden"]) == (pytest.approx(4.8, rel=1e-5), True, 1)
    assert "a motion score by RAFT needs" in table(config, file="rejects")["small/b.mp4"]["message"]
    params = run_of(config).data.params
    assert len(params["score.raft"]) == 16
    with pytest.raises(UserError, match="networks"):
        score(told(*told_of))
    write_raft(weights, (0.04, 0.0))
    with pytest.raises(UserError, match="networks"):
        score(config)
    other = told(*told_of, f"out={tmp_path}/other")  # by DIS
    score(other)
    assert table(other)["a.mp4"]["motion"] < 0.1
    assert table(other)["small/b.mp4"]["motion"] < 0.1
    assert {run.data.params.get("score.raft") for run in runs(config, "evaluate")} == {params["score.raft"], None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_rafts_flow_is_on_a_gpu_if_a_worker_has_a_share_of_one(told, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("pipelines.cluster.workers", lambda *gpus: None)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        score(told("score.gpus=0.5", f"score.raft={write_raft(tmp_path / 'raft.pth', (0, 0))}"))


def test_what_is_dynamic_depends_on_the_frame_rate(told, tmp_path):
    slow, fast = (write_set(tmp_path / f"{fps}", 0.5, ["a", "b"], fps) for fps in (8, 30))
    config = told(f"score.videos={{slow: {slow}, fast: {fast}}}")
    score(config)
    degrees = [run_of(config, name).data.metrics["dynamic_degree"] for name in ("slow", "fast")]
    assert degrees == [0, 1]  # faster than 0.75 and 0.2 pixels a frame


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["score.fvd={net}/flat.pt"], r"^score\.fvd: .*flat\.pt, of videos .*: gives \[1, 9, 1\]; expected \[1, D\]$"),
        (["score.fvd={net}/c3d.pt"], r"^score\.fvd: .*c3d\.pt: its forward has no rescale"),
        (["score.fvd={net}/none.pt"], r"^score\.fvd: .*none\.pt: no such file"),
        (["score.inception={net}/none.pt"], r"^score\.inception: .*none\.pt: no such file"),
        (["score.clip={net}"], r"^score\.clip: .*no config\.json in it"),
        (["score.raft={net}/none.pt"], r"^score\.raft: .*none\.pt: no such file"),
        (["score.raft={net}/c3d.pt"], r"^score\.raft: .*c3d\.pt: "),
        (["score.videos.ours={net}"], r"^score\.videos\.ours=.*: holds no \.mp4$"),
        (["score.videos.ours={net}/none"], r"^score\.videos\.ours=.*/none: there is nothing$"),
        (["score.videos.ours={net}/c3d.pt"], r"^score\.videos\.ours=.*c3d\.pt: is a file; expected is a folder"),
        (["score.reference={net}"], r"^score\.reference=.*: holds no \.mp4$"),
        (["score.real={net}"], r"^score\.real=.*: holds no \.mp4 and no picture$"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing_behind(told, tmp_path, overrides, says):
    net = tmp_path / "net"
    net.mkdir()
    saved(I3D(wide=False), net / "flat.pt")
    saved(C3D(), net / "c3d.pt")
    config = told(*(override.format(net=net) for override in overrides))
    with pytest.raises(UserError, match=says):
        score(config)
    assert not Path(config.out, "scores").exists()


def test_run_again_it_does_nothing_and_anew_it_has_the_same_bytes(told, sets, here, tmp_path):
    config = told(f"score.real={sets}/true")
    score(config)
    files = {path: path.read_bytes() for path in Path(config.out, "scores").rglob("*.jsonl")}
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*") if path.is_file()}
    here.made.clear()
    score(config)
    assert not here.made
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*") if path.is_file()} == before
    shutil.rmtree(Path(config.out, "scores"))
    score(config)
    assert {path: path.read_bytes() for path in Path(config.out, "scores").rglob("*.jsonl")} == files


def test_a_part_that_is_there_is_not_made_again(told, here):
    config = told()
    score(config)
    for path in ("manifest.json", "scores.jsonl"):
        Path(config.out, "scores/ours", path).unlink()
    here.made.clear()
    score(config)
    assert not here.made
    assert len(table(config)) == 12


def test_no_video_is_decoded_twice_whatever_is_measured(told, sets, tmp_path, monkeypatch):
    decoded: list[int] = []
    frames = PyAVDecoder.frames
    monkeypatch.setattr(
        PyAVDecoder, "frames", lambda self, wanted: decoded.append(len(list(wanted))) or frames(self, wanted)
    )
    score(told(f"score.real={sets}/true"))
    # 12 + 13 + 12 of them whole, the short one, and of each true clip one frame more for the video that begins with it.
    assert sorted(decoded) == [1] * (1 + 12) + [6] * (12 + 13 + 12)


@pytest.mark.parametrize(
    ("measure", "columns"),
    [
        ("alignment", {"psnr", "ssim", "first_frame_error"}),
        ("consistency", {"warp_error", "hidden"}),
        ("spectra", {"spatial", "temporal"}),
    ],
)
def test_measures_may_be_left_out(told, sets, measure, columns):
    others = [each for each in ("alignment", "consistency", "spectra") if each != measure]
    config = told(f"score.real={sets}/true", f"score.measures=[{', '.join(others)}]")
    score(config)
    line = table(config)["n4.mp4"]
    assert not columns & line.keys()
    assert {"motion", "motion_lack", "dynamic"} < line.keys()
    assert len(line) > 6


def test_videos_of_several_lengths_have_a_temporal_spectrum_of_the_commonest(told, tmp_path):
    folder = write_set(tmp_path / "mixed", 0.5, ["a", "b", "c"])
    (folder / "long.mp4").write_bytes(encode(clip(3, 0.5, frames=9), 8))
    longer = write_set(tmp_path / "longer", 0.5, ["a", "b"], frames=9)
    config = told(f"score.videos.mixed={folder}", f"score.videos.longer={longer}")
    score(config)
    assert run_of(config, "mixed").data.metrics["spectrum_time"] > 0
    # Frequencies that are not the reference's.
    assert "spectrum_time" not in run_of(config, "longer").data.metrics
    assert "spectrum_space" in run_of(config, "longer").data.metrics


def test_the_papers_protocol_takes_16_frames_at_3_fps_of_the_first_so_many_videos(told, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("pipelines.sets.FVD", type(load_protocol())(4, 16, 3.0))
    long = write_set(tmp_path / "long", 0.2, [f"n{k}" for k in range(6)], fps=6, frames=34)
    whole = write_set(tmp_path / "whole", 0.2, ["n2", "n0"], fps=8, frames=16)
    short = write_set(tmp_path / "short", 0.2, ["a", "b"], fps=6, frames=20)
    config = told(
        *("score.protocol=paper", f"score.videos={{long: {long}, whole: {whole}, short: {short}}}"),
        *(f"score.reference={long}", f"score.real={long}"),
    )
    score(config)
    lines = table(config, "long")
    assert len(lines) == 4  # of 6
    for file, line in lines.items():
        frames = decode_all((long / file).read_bytes())[0:31:2]
        assert line["motion"] == motion_score(frames)
        assert len(line["temporal"]) == 15
    frames = decode_all((whole / "n0.mp4").read_bytes())
    assert table(config, "whole")["n0.mp4"]["motion"] == motion_score(frames)
    assert {line["reason"] for line in table(config, "short", "rejects").values()} == {"unfit"}
    assert run_of(config, "short").data.metrics == {"videos": 0, "rejects": 2}
    assert run_of(config, "long").data.params["score.protocol"] == "paper"
    # All true clips are scored: which of them a set needs is another question for each.
    assert all("motion_lack" in line for name in ("long", "whole") for line in table(config, name).values())


def test_a_set_that_is_added_later_leaves_what_is_scored_as_it_is(told, tmp_path, monkeypatch, here):
    monkeypatch.setattr("pipelines.sets.FVD", type(load_protocol())(2, 16, 3.0))
    true = write_set(tmp_path / "true", 0.2, [f"n{k}" for k in range(6)], frames=16)
    first, second = (
        write_set(tmp_path / folder, 0.4, [f"n{k}" for k in numbers], frames=16)
        for folder, numbers in (("first", (0, 1)), ("second", (4, 5)))
    )
    named = ("score.protocol=paper", f"score.real={true}")
    score(told(f"score.videos={{ours: {first}}}", *named))
    out = Path(told().out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("scores/*/*.jsonl")}
    here.made.clear()
    config = told(f"score.videos={{ours: {first}, added: {second}}}", *named)
    score(config)
    assert here.made == ["part-00000.jsonl"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert all("motion_lack" in line for name in ("ours", "added") for line in table(config, name).values())


def load_protocol():
    from cil.metrics.detectors import FVD

    return FVD


def spoilt(data: bytes, first: int) -> bytes:
    """With every packet from this one on made to nothing."""
    spoilt = bytearray(data)
    with av.open(io.BytesIO(data)) as container:
        packets = [(packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for _, begin, size in sorted(packets)[first:]:
        spoilt[begin : begin + size] = b"\xff" * size
    return bytes(spoilt)


@pytest.mark.slow  # decodes in real processes
def test_videos_of_strangers_cost_their_own_row_whatever_they_do_to_their_decoder(told, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("pipelines.scorer.DecodePool", DecodePool)
    monkeypatch.setattr("pipelines.scorer.PyAVDecoder", Perilous)
    folder, long = tmp_path / "strange", tmp_path / "long"
    write_set(folder, 0.5, ["good"])
    for name, peril in {"hangs": "hang", "dies": "crash", "swells": "much"}.items():
        (folder / f"{name}.mp4").write_bytes(f"frames: {peril}".encode())
    (folder / "bulky.mp4").write_bytes(bytes(10**6))
    long.mkdir()
    (long / "a.mp4").write_bytes(spoilt(encode(clip(0, 0.5, frames=90), 6), 40))  # 90 frames are 0.41 MB, 16 are 0.07
    bounds = ("score.decode_seconds=2", "score.memory=0.0004", "score.measures=[]")
    config = told(f"score.videos={{strange: {folder}, long: {long}}}", *bounds)
    score(config)
    assert list(table(config, "strange")) == ["good.mp4"]
    rejects = {file: (line["reason"], line["message"]) for file, line in table(config, "strange", "rejects").items()}
    assert rejects["hangs.mp4"] == (
        "hung",
        "the process that decoded it: not done within 2 s; another one: not done within 4 s",
    )
    assert rejects["dies.mp4"][0] == rejects["swells.mp4"][0] == "decoder_died"
    what_to_do = ": cut it, take score.protocol=paper, or set score.memory higher and score anew"
    assert rejects["bulky.mp4"] == ("unfit", f"the file is larger than the 0.0004 GB that are allowed{what_to_do}")
    (line,) = table(config, "long", "rejects").values()
    assert line["reason"] == "unfit"
    assert line["message"] == f"90 frames of 48x32 are 0.000415 GB, and 0.0004 GB are allowed{what_to_do}"
    # What the paper's protocol does not see is neither decoded nor counted.
    config = told(f"out={tmp_path}/paper", f"score.videos.long={long}", "score.protocol=paper", *bounds)
    score(config)
    assert list(table(config, "long")) == ["a.mp4"]
    # And what is seen whole is decoded whole.
    more = told(f"out={tmp_path}/more", f"score.videos.long={long}", bounds[0], bounds[2])
    score(more)
    assert [line["reason"] for line in table(more, "long", "rejects").values()] == ["damaged"]


def test_a_set_of_the_name_of_a_row_is_refused():
    with pytest.raises(UserError, match=r"^score\.videos\.base: a row of the study is called base too; rename one$"):
        load(None, ["score.videos.base=/a"])
    with pytest.raises(UserError, match="'real' is no name for a row"):
        load(None, ["score.videos.real=/a"])


def test_sets_may_lie_on_s3(told, sets, endpoint):
    for file in ("ours/n1.mp4", "ours/inner/n11.mp4", "true/inner/n11.mp4"):
        storage.write(f"s3://webvid/{file}", (sets / file).read_bytes())
    config = told("score.videos={far: s3://webvid/ours}", "score.real=s3://webvid/true")
    score(config)
    near = told(f"out={config.out}-near", f"score.videos={{far: {sets}/ours}}", f"score.real={sets}/true")
    score(near)
    found, wanted = table(config, "far"), table(near, "far")
    assert found["inner/n11.mp4"] == wanted["inner/n11.mp4"]
    assert found["n1.mp4"] == {key: value for key, value in wanted["n1.mp4"].items() if key not in PAIRED}
    assert len(found) == 2
    with pytest.raises(UserError, match=r"s3://webvid/none: there is nothing"):
        score(told("score.videos={far: s3://webvid/none}"))


@pytest.mark.slow
def test_the_command_line_scores_two_folders_by_workers_of_ray_and_makes_no_part_twice(sets, tmp_path):
    out, named = tmp_path / "out", [f"score.videos={{ours: {sets}/ours}}", f"score.reference={sets}/reference"]
    command = [sys.executable, "-m", "jobs.score", f"out={out}", *named]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "scores: ours: dynamic_degree" in done.stdout
    assert f"{out}/scores/ours" in done.stdout.splitlines()[-1]
    found = (out / "scores/ours/scores.jsonl").read_bytes()
    for path in ("manifest.json", "scores.jsonl"):
        (out / "scores/ours" / path).unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "scores/ours/scores.jsonl").read_bytes() == found
    assert " left" not in done.stdout  # no part was made anew


# -- the study's own rows ----------------------------------------------------------------------------------------------


@pytest.fixture
def study(told, sets, built, settings, store, tmp_path):
    """study("key=value", ...): a row `base` of random weights at a URI, whose videos are made; and `ours` beside it."""
    family = family_of(settings(built))
    weights = tmp_path / "weights"
    weights.mkdir()
    (name,) = family.export(network_of(settings(built), family, None).state_dict(), weights)
    rows = f"generate.rows={{base: {{weights: {weights}/{name}, M: 700}}, again: {{weights: {weights}/{name}}}}}"

    def of(*overrides: str):
        named = (f"tracking.uri={store}", f"tracking.experiment={tmp_path.name}", rows, "generate.steps=2")
        return settings(built, *named, "generate.clips=3", "generate.reference=6", "score.leakage=2", *overrides)

    generate(of())
    return of


def test_a_row_has_the_leakage_of_its_weights_as_a_metric_and_its_curve_as_a_file(study, here, capfd):
    config = study()
    score(config)
    base, again = run_of(config, "base"), run_of(config, "again")
    assert 0 <= base.data.metrics["leakage"] <= 1
    assert base.data.metrics["leakage"] == again.data.metrics["leakage"]  # of the same weights, before any sampling
    assert len(list(Path(config.out, "leakage").iterdir())) == 1
    client = MlflowClient(config.tracking.uri)
    curve = json.loads(Path(client.download_artifacts(base.info.run_id, "leakage.json")).read_text())
    assert curve["clips"] == 2
    assert len(curve["t"]) == len(curve["motion"]) == 10
    assert curve["t"] == sorted(curve["t"])
    assert curve["leakage"] == base.data.metrics["leakage"]
    lines = storage.read_rows(f"{base.data.tags['cil.leakage']}/parts/part-00000.jsonl")
    assert curve["truth"] == pytest.approx(np.mean([line["truth"] for line in lines]))
    assert curve["motion"] == pytest.approx(np.mean([line["motion"] for line in lines], axis=0))
    assert "leakage" not in run_of(config, "real").data.metrics
    assert base.data.params["row.M"] == "700.0"
    assert base.data.params["row.steps"] == "2"
    assert base.data.params["weights"] == again.data.params["weights"]
    assert len(base.data.params["cache"]) == 16
    # Captions that tell no velocity: no feature net.
    assert "no caption of the reference clips tells a velocity" in capfd.readouterr().out
    assert not {"speed", "frechet"} & base.data.metrics.keys()
    assert base.data.metrics["psnr"] > 0


def test_no_leakage_where_none_is_asked_for_or_the_cache_is_gone_and_later_it_is_added(study, capfd):
    config = study("score.leakage=0")
    score(config)
    assert "leakage" not in run_of(config, "base").data.metrics
    config = study()
    cache = Path(config.out, "cache")
    cache.rename(cache.with_name("away"))
    score(config)
    assert "leakage: not measured: the latent cache at" in capfd.readouterr().out
    runs_of = [run for run in runs(config, "evaluate") if run.info.run_name == "base"]
    assert all("leakage" not in run.data.metrics for run in runs_of)
    cache.with_name("away").rename(cache)
    score(config)
    runs_of = [run for run in runs(config, "evaluate") if run.info.run_name == "base"]
    assert sorted("leakage" in run.data.metrics for run in runs_of) == [False, True]


def test_a_leakage_of_another_snapshot_takes_the_place_of_the_one_that_is_there(study, videos, settings):
    def curve_of(run) -> dict:
        file = MlflowClient(study().tracking.uri).download_artifacts(run.info.run_id, "leakage.json")
        return json.loads(Path(file).read_text())

    score(study())
    before = run_of(study(), "base")
    first = curve_of(before)
    build_cache(settings(study().out, csv="longer"))
    for _ in range(2):  # the second time nothing is left to do
        score(study(f"catalog.csv={videos}/longer.csv"))
        after = run_of(study(), "base")
        assert after.info.run_id == before.info.run_id
        assert after.info.status == "FINISHED"
        assert after.data.tags["cil.leakage"] != before.data.tags["cil.leakage"]
        assert curve_of(after)["truth"] != first["truth"]
        assert after.data.metrics == before.data.metrics | {"leakage": curve_of(after)["leakage"]}


def test_of_other_weights_than_the_videos_were_made_with_nothing_is_said(told, sets, built, settings, tmp_path, capfd):
    """Of a row that was trained here: its weights are made anew after its videos."""
    config = settings(built, "generate.steps=2", "generate.clips=3", "generate.reference=6", "score.leakage=2")
    family, folder = family_of(config), Path(built, "weights/base")
    state = network_of(config, family, None).state_dict()

    def train(seed: int) -> Artifact:
        identity = {"family": shape_of(family) | {"preset": family.preset}, "shift": 1.0, "row": {"seed": seed}}
        made = Artifact(str(folder), "weights", identity)
        for kind in ("ema", "raw"):
            (folder / kind).mkdir(parents=True)
            family.export(state, folder / kind)
        made.begin("{}")
        made.finish({})
        return made

    train(0)
    generate(config)
    score(config)
    right = run_of(config, "base").data
    assert right.params["train.seed"] == "0"
    assert "leakage" in right.metrics
    shutil.rmtree(folder)
    shutil.rmtree(Path(built, "scores"))
    train(1)
    capfd.readouterr()
    config = config.model_copy(update={"score": config.score.model_copy(update={"bootstrap": 27})})  # another run
    score(config)
    (found,) = [
        run.data
        for run in runs(config, "evaluate")
        if run.info.run_name == "base" and not run.data.metrics.get("leakage")
    ]
    assert not any(name.startswith("train.") for name in found.params)
    assert found.params["weights"] == right.params["weights"]
    said = capfd.readouterr().out
    assert f"scores: base: its videos are of other weights than {folder} holds now" in said
    assert "leakage: not measured of base: its videos are of other weights than base holds now" in said


def test_sets_from_elsewhere_stand_beside_the_studys_rows_or_instead_of_them(study, sets, capfd):
    config = study(f"score.videos.ours={sets}/ours")
    score(config)
    assert {run.info.run_name for run in runs(config, "evaluate")} == {"real", "base", "again", "ours"}
    shutil.rmtree(Path(config.out, "videos/again"))
    shutil.rmtree(Path(config.out, "scores"))
    score(config)
    assert "the study has no videos of again; they are left out" in capfd.readouterr().out
    assert not Path(config.out, "scores/again").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_networks_are_on_a_gpu_if_a_worker_has_a_share_of_one_and_never_else(told, study, tmp_path, monkeypatch):
    """Where PyTorch says that there is one, and fails if it is asked for it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    asked: list[tuple] = []
    monkeypatch.setattr("pipelines.cluster.workers", lambda *gpus: asked.append(gpus))
    elsewhere = f"out={tmp_path}/elsewhere", f"score.fvd={saved(I3D(), tmp_path / 'i3d.pt')}"
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        score(told("score.gpus=0.5", *elsewhere))
    score(told(*elsewhere))
    score(study())
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        score(study("score.leakage=3", "score.gpus=0.25"))  # scored already: leakage alone asks for it
    assert asked == [(0.5, "score.gpus"), (0.25, "score.gpus")]


def test_videos_of_a_table_of_images_are_paired_by_what_their_index_says(told, endpoint, tmp_path):
    """By the image's file wherever it lies, else by the video's own name; two images of one stem are told apart."""
    for number, name in enumerate(("inner/a.png", "cat.png", "cat.jpg", "b.png"), 1):
        picture(tmp_path / f"images/{name}", number)
    storage.write("s3://webvid/far/d.png", (tmp_path / "images/b.png").read_bytes())
    rows = "image,id\ninner/a.png,one\ncat.png,\ncat.jpg,\nb.png,two\ns3://webvid/far/d.png,three\n"
    (tmp_path / "images/table.csv").write_text(rows)
    size = ("family.preset=tiny", "family.frames=4", "family.height=16", "family.width=24")
    one = f"generate.rows.one={{weights: {shaken(tmp_path / 'weights')}, steps: 2}}"
    named = (*size, one, f"generate.images={tmp_path}/images/table.csv")
    generate(told(*named))
    real = tmp_path / "images"
    (real / "two.mp4").write_bytes(encode(clip(0, 1, frames=4, size=(16, 24)), 8))

    def paired(real: Path | str) -> dict[str, float]:
        config = told(*named, f"score.real={real}")
        score(config)
        lines = table(config, "one")
        for folder in ("scores", "leakage"):
            shutil.rmtree(Path(config.out, folder), ignore_errors=True)
        return {file: line["psnr"] for file, line in lines.items() if "psnr" in line}

    videos = {"one.mp4": "inner/a.png", "cat.mp4": "cat.png", "cat-2.mp4": "cat.jpg", "two.mp4": "b.png"}
    found = paired(real)
    assert found.keys() == videos.keys()  # the fifth has its image elsewhere
    for file, image in videos.items():
        frames = decode_all(Path(told().out, "videos/one", file).read_bytes())
        assert found[file] == pytest.approx(psnr(frames[0], read_image((real / image).read_bytes(), 16, 24))), file
    assert paired("s3://webvid/far").keys() == {"three.mp4"}


def test_videos_of_images_made_elsewhere_are_set_against_their_images(told, sets, tmp_path):
    """By the image's name, whatever seed a video has: its folder is where they are looked for."""
    picture(tmp_path / "images/a\nb.png", 1)
    picture(tmp_path / "images/inner/b.png", 2)
    size = ("family.preset=tiny", "family.frames=4", "family.height=16", "family.width=24")
    one = f"generate.rows.one={{weights: {shaken(tmp_path / 'weights')}, seeds: [0, 1], steps: 2}}"
    config = told(*size, one, f"generate.images={tmp_path}/images")
    generate(config)
    score(config)
    scores = table(config, "one")
    assert scores.keys() == {f"{name}-seed{seed}.mp4" for name in ("a%0Ab", "inner~b") for seed in (0, 1)}
    family = family_of(config)
    for file, image in (("a%0Ab-seed1.mp4", "a\nb.png"), ("inner~b-seed0.mp4", "inner/b.png")):
        frames = decode_all(Path(config.out, "videos/one", file).read_bytes())
        shown = read_image((tmp_path / "images" / image).read_bytes(), family.height, family.width)
        assert scores[file]["psnr"] == pytest.approx(psnr(frames[0], shown))
    assert not Path(config.out, "scores/real").exists()
