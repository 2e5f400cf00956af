"""Each job's artifact after one walk of the whole road: real videos, real Ray, real DeepSpeed, real MLflow."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient

from cil import InitialNoise, Moments, families
from cil.metrics.duplicates import picture_hash
from cil.metrics.motion import motion_score
from jobs import paper
from pipelines import cache, feature_net, generate, score, storage
from pipelines.artifact import read_manifest
from pipelines.config import load
from pipelines.errors import Unfinished, UserError
from pipelines.finetune import finetune
from pipelines.initial_noise import FILE, make_initial_noise
from pipelines.reader import ClipReader
from pipelines.shapes import velocity_of
from pipelines.study import read_study
from pipelines.tracking import runs, store_uri
from pipelines.video import PyAVDecoder, decode_all, fit
from pipelines.views import split_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(road) -> pd.DataFrame:
    """Every row of the cache, read as the documentation says."""
    return pd.concat([pd.read_feather(path) for path in sorted(Path(road.out, "cache/parts").glob("*.arrow"))])


def rejects(road) -> pd.DataFrame:
    path = Path(cache.read_cache(road).manifest.uri, "rejects.jsonl")
    return pd.read_json(path, lines=True, dtype={"videoid": str})


def test_the_data_set_is_in_webvids_format(road):
    table = pd.read_csv(Path(road.out, "shapes/videos.csv"), dtype=str)
    assert list(table.columns) == ["videoid", "contentUrl", "duration", "page_dir", "name"]
    assert len(table) == 120
    present = [Path(road.out, "shapes/videos", r.page_dir, f"{r.videoid}.mp4").exists() for r in table.itertuples()]
    assert sum(present) == 119  # one of the seven damaged ones never arrived
    video = PyAVDecoder(min(Path(road.out, "shapes/videos").glob("*/*.mp4")).read_bytes())
    assert (video.count, video.fps) == (20, 5)
    assert video.frames([0]).shape == (1, 40, 40, 3)
    assert set(table.duration) == {"PT00H00M04S"}


def test_the_discs_have_the_speeds_that_were_asked_for(road):
    told = [velocity_of(name) for name in pd.read_csv(Path(road.out, "shapes/videos.csv")).name]
    speeds = np.array([np.hypot(*v) for v in told])
    assert np.isclose(speeds[speeds > 0].min(), 1, atol=0.1)
    assert np.isclose(speeds[speeds > 0].max(), 2, atol=0.1)
    assert (speeds > 0).mean() == pytest.approx(0.5, abs=0.02)


def test_rows_in_are_rows_out_and_rejects_and_each_damaged_video_is_a_row_with_its_reason(road, clips):
    counts = cache.read_cache(road).counts
    size = sum(path.stat().st_size for path in Path(road.out, "cache/parts").glob("*.arrow"))
    assert counts == {"planned": 360, "clips": 339, "rejected": 21, "rejected_videos": 7, "bytes": size}
    assert len(clips) == 339
    assert clips.clip_id.is_unique
    table = rejects(road)
    assert table.reason.value_counts().to_dict() == {"not_a_video": 5, "missing": 1, "too_short": 1}
    assert table.clips.sum() == 21
    assert not set(table.videoid) & set(clips.videoid)


def test_a_cached_clip_is_what_encoding_its_frames_gives(road, clips):
    family = families.load(**road.family.model_dump())
    row = clips.iloc[17]
    path = next(Path(road.out, "shapes/videos").glob(f"*/{row.videoid}.mp4"))
    assert (np.diff(row.frame_indices) == 2).all()
    frames = fit(decode_all(path.read_bytes())[list(row.frame_indices)].numpy(), 24, 32)
    latents = np.frombuffer(row.latents, np.float16).reshape(family.latent_shape)
    np.testing.assert_array_equal(latents, family.encode(frames[None])["latents"][0].numpy())
    assert row.motion == pytest.approx(motion_score(frames))
    assert row.hash == picture_hash(fit(decode_all(path.read_bytes())[:1].numpy(), 24, 32)[0])
    assert row.caption.startswith("a disc")
    assert (row.fps, row.stride) == (5, 2)


def test_all_views_of_a_video_are_in_one_split_and_the_shares_are_as_configured(clips):
    assert (clips.groupby("videoid").split.nunique() == 1).all()
    shares = clips.split.value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.25, abs=0.1)
    assert 0 < shares["validation"] < 0.2
    assert (clips.groupby("videoid").view.nunique() == 3).all()


def test_splits_are_drawn_anew_with_another_seed(road):
    ids = [f"{i:09d}" for i in range(400)]
    splits = [[split_of(load(None, [f"seed={seed}"]), i) for i in ids] for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def test_the_reader_gives_the_clips_of_a_split_that_move_enough(road, clips):
    reader = ClipReader(cache.read_cache(road), "train", {"motion": (0.06, None)})
    wanted = clips[(clips.split == "train") & (clips.motion >= 0.06)].set_index("clip_id")
    ids = reader.index["clip_id"].take(pa.array(reader.rows)).to_pylist()
    assert ids == sorted(wanted.index)
    assert 0 < len(reader) < (clips.split == "train").sum()
    batch = reader.batch([5, 0])["latents"]
    np.testing.assert_array_equal(batch[0].numpy().tobytes(), wanted.loc[ids[5]].latents)


def test_the_initial_noise_is_a_two_pass_float64_over_the_training_latents(road, clips):
    latents = np.stack([np.frombuffer(b, np.float16) for b in clips[clips.split == "train"].latents]).astype(np.float64)
    noise = InitialNoise.from_bytes(Path(road.out, "initial_noise", FILE).read_bytes())
    np.testing.assert_allclose(noise.mean.numpy().ravel(), latents.mean(0), rtol=1e-12, atol=1e-14)
    assert noise.variance == pytest.approx(latents.var(0).mean(), rel=1e-12)
    assert noise.count == len(latents)


def test_a_part_holds_the_moments_of_its_own_training_clips(road):
    made = cache.read_cache(road)
    part = made.parts[2]["name"]
    table = pd.read_feather(made.path(part))
    moments = Moments.from_bytes(storage.read(made.path(part, "moments")))
    assert moments.count == (table.split == "train").sum()


def test_every_row_of_the_study_has_weights_and_a_run_of_its_own(road):
    rows = road.training_rows()
    assert sorted(p.name for p in Path(road.out, "weights").iterdir()) == sorted(rows)
    found = {run.info.run_name: run for run in runs(road, "train")}
    assert found.keys() == rows.keys()
    for name, run in found.items():
        assert run.info.status == "FINISHED"
        assert run.data.params["row.seed"] == str(rows[name].seed)
        assert run.data.params["row.conditioning.kind"] == rows[name].settings.conditioning.kind
        assert run.data.params["cache"] == cache.read_cache(road).fingerprint
        assert "world_size" not in run.data.params
        assert run.data.tags["cil.world_size"] == "2"
        assert {"loss", "loss_t000", "loss_t900", "samples_per_second"} <= run.data.metrics.keys()


def test_a_curve_has_a_point_for_each_interval_of_samples(road):
    client = MlflowClient(store_uri(road))
    run = next(run for run in runs(road, "train") if run.info.run_name == "base")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [16, 32, 48, 64, 80, 96]


def test_fine_tuning_starts_from_the_weights_it_names_and_the_arms_part_ways(road):
    def tensors(row: str) -> torch.Tensor:
        state = safetensors.torch.load_file(Path(road.out, "weights", row, "ema/toy.safetensors"))
        return torch.cat([v.flatten() for v in state.values()])

    base, naive, timenoise, other = map(tensors, ("base", "naive-1", "timenoise-1", "naive-2"))
    fresh = families.load(**road.family.model_dump()).network(seed=1)
    far = (torch.cat([v.flatten() for v in fresh.state_dict().values()]) - base).norm()
    for fine_tuned in (naive, timenoise, other):
        assert 0 < (fine_tuned - base).norm() < far / 2
    assert (naive - timenoise).norm() > 0
    assert (naive - other).norm() > 0


def test_every_set_has_its_videos_and_an_index(road):
    for name in [generate.REAL, *road.evaluation_rows()]:
        folder = Path(road.out, "videos", name)
        index = storage.read_rows(str(folder / "index.jsonl"))
        assert len(index) == 12
        for line in index:
            frames = decode_all((folder / line["file"]).read_bytes())
            assert frames.shape == (8, 24, 32, 3)
    assert len(storage.read_rows(f"{road.out}/videos/reference/index.jsonl")) == 24


def test_sets_start_from_the_same_images_of_videos_that_training_never_saw(road, clips):
    ids = [
        [line["clip_id"] for line in storage.read_rows(f"{road.out}/videos/{n}/index.jsonl")]
        for n in ("real", "naive-1")
    ]
    assert ids[0] == ids[1]
    split = clips.set_index("clip_id").split
    assert set(split[ids[0]]) == {"test"}
    reference = [line["clip_id"] for line in storage.read_rows(f"{road.out}/videos/reference/index.jsonl")]
    assert set(split[reference]) == {"train"}


def test_the_pixels_of_a_sample_do_not_depend_on_the_batch_it_is_in(road, smallest, tmp_path):
    sampler = generate.Sampler(road.model_dump())
    numbers = generate.choose(road, cache.read_cache(road), generate.REAL)
    reader = sampler.readers[generate.REAL]
    row = road.evaluation_rows()["naive-1"]

    def sample(chosen: list[int]) -> torch.Tensor:
        ids = [reader.known(n)["clip_id"] for n in chosen]
        return sampler.sample(row, reader.batch(chosen), ids, [0] * len(ids))

    together, alone = sample(numbers[:4]), sample(numbers[2:3])
    torch.testing.assert_close(together[2], alone[0], rtol=0, atol=1e-4)  # float32 sums in another order


def test_an_analytic_start_differs_from_a_gaussian_one(road):
    sampler = generate.Sampler(road.model_dump())
    noise = sampler.start("analytic")
    assert noise.variance != 1
    assert sampler.start("gaussian").variance == 1
    assert noise.mean.abs().max() > 0.1


@pytest.mark.parametrize(
    "override",
    [
        "rows.naive.guidance=3",
        "rows.naive.M=500",
        "rows.naive.start=analytic",
        "steps=3",
        "rows.naive.weights=timenoise",
    ],
)
def test_every_setting_of_a_row_reaches_its_samples(road, smallest, override):
    def sample(config) -> torch.Tensor:
        sampler = generate.Sampler(config.model_dump())
        reader = sampler.readers[generate.REAL]
        ids = [reader.known(n)["clip_id"] for n in (0, 1)]
        return sampler.sample(config.evaluation_rows()["naive-1"], reader.batch([0, 1]), ids, [0, 0])

    assert (sample(road) - sample(smallest(road.out, f"generate.{override}"))).abs().max() > 1e-3


def test_scores_are_kept_for_every_video_and_the_real_row_is_the_yardstick(road):
    for name in ("real", "naive-1"):
        rows = storage.read_rows(f"{road.out}/scores/{name}/scores.jsonl")
        assert len(rows) == 12
        video = decode_all(Path(road.out, "videos", name, rows[3]["clip_id"].replace(":", "_") + ".mp4").read_bytes())
        assert rows[3]["motion"] == pytest.approx(motion_score(video))
    found = {run.info.run_name: run.data.metrics for run in runs(road, "evaluate")}
    assert found.keys() == {"real", *road.evaluation_rows()}
    assert found["real"]["motion_error"] == found["real"]["first_frame_error"] == 0
    assert found["naive-1"]["motion"] == pytest.approx(np.mean([r["motion"] for r in rows]))
    assert found["naive-1"]["first_frame_error"] > 0
    assert found["naive-1"]["frechet"] > 0
    assert found["naive-1"]["static_share"] == np.mean([r["speed"] < 0.7 for r in rows])


def test_an_evaluate_run_tells_how_its_row_was_sampled_and_trained_and_how_much_its_weights_leak(road):
    found = {run.info.run_name: run.data for run in runs(road, "evaluate")}
    cured, naive = found["timenoise+analytic-init-2"], found["naive-2"]
    wanted = {"row.M": "700.0", "row.start": "analytic", "row.guidance": "1.0", "row.steps": "2", "train.seed": "2"}
    wanted |= {"train.conditioning.kind": "timenoise", "cache": cache.read_cache(road).fingerprint}
    assert {key: cured.params.get(key) for key in wanted} == wanted
    assert {"train.conditioning.beta_m", "train.conditioning.a", "initial_noise"} < cured.params.keys()
    weights = read_manifest(f"{road.out}/weights/timenoise-2", "weights").fingerprint
    assert cured.params["weights"] == f"{weights}-ema"
    assert naive.params["row.M"] == "None"
    assert 0 <= naive.metrics["leakage"] != cured.metrics["leakage"]
    assert len(list(Path(road.out, "leakage").iterdir())) == len(found) - 1
    assert {
        "psnr",
        "ssim",
        "warp_error",
        "hidden",
        "dynamic_degree",
        "motion_lack",
        "motion_off",
    } < naive.metrics.keys()
    assert naive.metrics["spectrum_time"] > 0


def test_another_threshold_is_another_evaluate_run_of_the_same_scores(road, smallest, tmp_path):
    rows = [r["speed"] for r in storage.read_rows(f"{road.out}/scores/naive-1/scores.jsonl")]
    store = shutil.ignore_patterns("mlflow*", "mlartifacts")  # which has absolute places in it
    shutil.copytree(road.out, tmp_path / "road", ignore=store)
    plain, strict = smallest(tmp_path / "road"), smallest(tmp_path / "road", "score.static_below=1.0e-6")
    for config in (plain, strict):
        score.score(config)
    assert read_study(strict).arms["naive"].values("static_share") == {1: 0.0, 2: 0.0}
    assert read_study(plain).arms["naive"].values("static_share")[1] == np.mean([s < 0.7 for s in rows]) > 0


def test_the_reference_captions_tell_the_velocities_that_the_feature_net_learned(road):
    lines = storage.read_rows(f"{road.out}/videos/reference/index.jsonl")
    assert read_manifest(f"{road.out}/feature_net", feature_net.KIND).counts["clips"] == len(lines)
    assert all(velocity_of(line["caption"]) is not None for line in lines)


def test_a_reference_clip_that_was_damaged_since_is_one_line(road, smallest, tmp_path):
    shutil.copytree(f"{road.out}/videos/reference", tmp_path / "videos/reference")
    damaged = min((tmp_path / "videos/reference").glob("*.mp4"))
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(UserError, match=f"{damaged.name}: .*remove its set"):
        feature_net.feature_net(smallest(str(tmp_path)), {})
    damaged.unlink()
    with pytest.raises(UserError, match=f"{damaged.name}: .*remove its set"):
        feature_net.feature_net(smallest(str(tmp_path)), {})


def page_of(road) -> str:
    return next(Path(road.out, "comparison").glob("*/index.html")).read_text()


def test_the_page_is_self_contained_and_holds_table_plots_and_clips(road):
    page = page_of(road)
    assert "Indicative: 2 seeds" in page
    assert page.count("<svg") == 5
    assert page.count("<video") == 2 * 3  # two images, for the real clips and two rows
    for name in ("real", "naive", "timenoise+analytic-init"):
        assert f"<th>{name}</th>" in page
    for namespace in (
        "http://www.w3.org/",
        "http://purl.org/",
        "http://creativecommons.org/",
        "https://matplotlib.org/",
    ):
        page = page.replace(namespace, "")  # named in the plots' metadata, never fetched
    assert "http" not in page
    assert "$" not in page
    assert "The naive model moves less than real clips: <b>" in page


def test_the_comparison_is_logged_to_the_study(road):
    client = MlflowClient(store_uri(road))
    run = runs(road, "compare")[0]
    assert sorted(f.path for f in client.list_artifacts(run.info.run_id)) == [
        "comparison.html",
        "table.csv",
        "table.md",
    ]


def test_a_second_walk_does_nothing(road, capsys):
    before = {
        path: path.stat().st_mtime_ns
        for path in Path(road.out).rglob("*")
        if path.is_file() and "mlflow" not in path.name
    }
    paper.run(road)
    printed = capsys.readouterr().out
    assert printed.count("nothing to do") == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_no_run_has_a_step_twice_after_a_second_walk(road):
    client = MlflowClient(store_uri(road))
    for run in runs(road, "evaluate"):
        assert len(client.get_metric_history(run.info.run_id, "frechet")) == 1


@pytest.mark.parametrize(
    ("override", "job", "says"),
    [
        ("family.frames=6", make_initial_noise, r"family\.frames=8, not 6"),
        ("family.frames=6", finetune, r"family\.frames=8, not 6"),
        ("cache.stride=1", cache.build_cache, r"cache\.stride was 2, is 1"),
        ("finetune.rows.naive.lr=1", finetune, r"weights/naive-1 was made .*row\.lr was 0\.0005, is 1\.0"),
        ("generate.steps=3", generate.generate, r"videos/naive-1 was made .*steps was 2, is 3"),
        ("generate.where={motion: [99, null]}", generate.generate, "at least 2 are needed"),
    ],
)
def test_an_artifact_of_another_configuration_is_refused_by_name(road, smallest, override, job, says):
    with pytest.raises(UserError, match=says) as error:
        job(smallest(road.out, override))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("finetune.workers=64", r"finetune\.workers=64: the cluster has"),
        ("finetune.row.where={motion: [99, null]}", "rows.fresh: no training clip .*'motion': .99"),
        ("finetune.gpu=true", r"finetune\.workers=2: the cluster has 0 GPUs"),
    ],
)
def test_what_is_refused_leaves_nothing_behind_that_blocks_the_corrected_run(road, mistake, says):
    sizes = ["row.batch=64", "row.warmup=64", "log_every=320", "checkpoint_every=640", "rows={fresh: {}}"]
    fresh = [f"finetune.{size}" for size in sizes]
    config = load(None, [f"out={road.out}", "family.preset=tiny", "family.height=24", *fresh, mistake])
    with pytest.raises(UserError, match=says):
        finetune(config)
    assert not Path(road.out, "weights/fresh").exists()


def test_an_unfinished_cache_is_refused(road, tmp_path):
    Path(tmp_path, "cache").mkdir()
    Path(tmp_path, "cache/plan.json").write_bytes(Path(road.out, "cache/plan.json").read_bytes())
    with pytest.raises(UserError, match=r"latent cache at .* is unfinished"):
        make_initial_noise(load(None, [f"out={tmp_path}"]))


def test_the_study_is_the_experiment_that_the_configuration_names(road):
    assert MlflowClient(store_uri(road)).get_experiment_by_name("smallest") is not None


def test_clips_too_small_for_a_motion_score_are_refused_before_the_start(road, smallest, tmp_path):
    shapes = [f"catalog.csv={road.out}/shapes/videos.csv", f"catalog.videos={road.out}/shapes/videos"]
    with pytest.raises(UserError, match="8 x 8 x 32; a motion score needs"):
        cache.build_cache(smallest(tmp_path, *shapes, "family.height=8"))
    with pytest.raises(UserError, match="multiples of 8"):
        cache.build_cache(smallest(tmp_path, *shapes, "family.height=30"))


def test_a_tracking_server_that_nobody_runs_is_one_line(road, smallest):
    with pytest.raises(Unfinished, match=r"tracking\.uri=http://127\.0\.0\.1:9: cannot be reached"):
        score.score(smallest(road.out, "tracking.uri=http://127.0.0.1:9"))


def test_manifests_name_everything_that_shaped_their_content(road):
    manifest = json.loads(Path(road.out, "weights/timenoise-1/manifest.json").read_text())
    assert manifest["identity"]["row"]["conditioning"]["kind"] == "timenoise"
    assert manifest["identity"]["parent"] == read_manifest(f"{road.out}/weights/base", "weights").fingerprint
    assert manifest["identity"]["cache"] == cache.read_cache(road).fingerprint
    assert json.loads(Path(road.out, "weights/timenoise-1/config.json").read_text())["finetune"]["row"]["batch"] == 8
    assert "torch" in manifest["software"]


def test_every_part_has_the_digest_that_the_manifest_says(road):
    import hashlib

    made = cache.read_cache(road)
    for part in made.parts:
        data = Path(made.path(part["name"])).read_bytes()
        assert hashlib.sha256(data).hexdigest() == part["sha256"]
        assert pa.ipc.open_file(pa.py_buffer(data)).read_all().num_rows == part["clips"]
