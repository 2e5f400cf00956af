from pathlib import Path

import pytest

from cil import TimeNoise
from pipelines.config import load
from pipelines.errors import UserError

PAPER = Path(__file__).parents[2] / "jobs" / "configs" / "paper.yaml"


def test_an_override_on_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("cache: {stride: 3, views_per_video: 4}")
    config = load(file, ["cache.stride=2"])
    assert (config.cache.stride, config.cache.views_per_video) == (2, 4)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("cache.strid=2", ["cache.strid", "did you mean stride"]),
        ("nothing=2", ["nothing", "allowed are", "cache"]),
        ("cache.stride=two", ["cache.stride", "two", "integer"]),
        ("cache.stride=0", ["cache.stride", "0", "greater than 0"]),
        ("family.name=svdx", ["family.name", "svdx", "toy"]),
        ("cache.stride", ["cache.stride", "key=value"]),
        ("--stride=2", ["--stride=2", "key=value"]),
        ("finetune.row.batch=7", ["finetune.rows.base.batch=7", "finetune.workers=2"]),
        ("finetune.row.samples=100", ["samples=100", "multiple of batch=16"]),
        ("finetune.row.weights=elsewhere", ["weights=elsewhere", "URI"]),
        ("finetune.rows.base.lrr=1", ["finetune.rows.base.lrr:", "did you mean lr"]),
        ("finetune.rows.base.optimiser={lr: 1}", ["finetune.rows.base.optimiser:", "allowed are", "conditioning"]),
        ("finetune.rows.base.conditioning=3", ["finetune.rows.base.conditioning=3", "dictionary"]),
        ("generate.rows.next.guidanc=1", ["generate.rows.next.guidanc:", "did you mean guidance"]),
        ("finetune.rows.base.conditioning.levle=1", ["finetune.rows.base.conditioning.levle:", "did you mean level"]),
        ("finetune.log_every=100", ["finetune.log_every=100", "base's batch=16"]),
        ("finetune.row.lr=.inf", ["finetune.row.lr", "finite"]),
        ("finetune.rows={../../x: {}}", ["'../../x'", "no name for a row"]),
        ("finetune.rows={real: {}}", ["'real'", "taken"]),
        ("finetune.rows={a: {seeds: [1, 2]}, a-1: {}}", ["two rows are called a-1"]),
        ("finetune.row.seeds=[1, 1]", ["two rows are called base-1"]),
        ("seed=-1", ["seed=-1", "greater than or equal to 0"]),
        ("generate.rows.next.guidance=3", ["generate.rows.next.guidance", "base was trained without drop"]),
        ("finetune.checkpoint_every=90", ["checkpoint_every=90", "log_every=80"]),
        ("generate.rows.next.weights=best", ["generate.rows.next.weights=best", "base"]),
        ("finetune.micro_batch=3", ["finetune.micro_batch=3", "worker's share of base's batch, 8"]),
        ("finetune.row.drop={text: 0.5, both: 0.6}", ["finetune.rows.base.drop", "0.5 + 0.0 + 0.6", "above 1"]),
        ("finetune.validate_every=90", ["finetune.validate_every=90", "log_every=80"]),
        ("finetune.row.train=head", ["finetune.row.train=head", "'full', 'unet', 'temporal' or 'lora'"]),
        ("finetune.row.rank=0", ["finetune.row.rank=0", "greater than 0"]),
        ("finetune.row.precision=half", ["finetune.row.precision=half", "'float32', 'bfloat16' or 'float16'"]),
        ("finetune.row.schedule=step", ["finetune.row.schedule=step", "'cosine', 'linear' or 'constant'"]),
        ("finetune.on_nan=ignore", ["finetune.on_nan=ignore", "'stop' or 'skip'"]),
        ("finetune.keep=0", ["finetune.keep=0", "greater than 0"]),
        ("export.checkpoint=first", ["export.checkpoint", "'last' or 'best'"]),
        ("cache.test=0.96", ["cache.validation + cache.test", "below 1"]),
        ("shapes.max_speed=0.1", ["min_speed=0.5", "max_speed=0.1"]),
    ],
)
def test_a_mistake_is_named_in_one_line_with_what_is_allowed(override, named):
    with pytest.raises(UserError) as error:
        load(None, [override])
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in named if part not in message] == [], message


BOX = "[top, left, bottom, right], each 0..1, top above bottom and left before right"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cache.stride=0"], "cache.stride=0: input should be greater than 0, or input should be a valid tuple"),
        (["cache.stride=[3, 0]"], "cache.stride.1=0: input should be greater than 0"),
        (["cache.stride=[1, 2, 3]"], "cache.stride=[1, 2, 3]: input should be a valid integer, or tuple should have"),
        (["cache.stride=[6, 1]"], "cache.stride=[6, 1]: [least, most]"),
        (["cache.fps=0"], "cache.fps=0: input should be greater than 0"),
        (["cache.fps=8", "cache.stride=2"], "cache.fps=8.0 and cache.stride=2: one of the two"),
        (["cache.fps=8", "cache.stride=[1, 6]"], "cache.fps=8.0 and cache.stride=[1, 6]: one of the two"),
        (["cache.flip=1.1"], "cache.flip=1.1: input should be less than or equal to 1"),
        (["cache.condition=last"], "cache.condition=last: input should be 'first' or 'random'"),
        (["cache.crop=[0, 0, 1.1, 1]"], f"cache.crop=[0, 0, 1.1, 1]: {BOX}"),
        (["cache.crop=[0, 0.5, 1, 0.5]"], f"cache.crop=[0, 0.5, 1, 0.5]: {BOX}"),
        (["cache.crop=[0, 0, 1]"], "cache.crop=[0, 0, 1]: field required"),
        (["cache.watermark=[[0, 0, 1, 1], [0, -0.1, 1, 1]]"], f"cache.watermark.1=[0, -0.1, 1, 1]: {BOX}"),
        (["cache.watermark=[0, 0, 1, 1]"], "cache.watermark.0=0: input should be a valid tuple"),
        (["cache.decoder=ffmpeg"], "cache.decoder=ffmpeg: input should be 'pyav' or 'decord'"),
        (["cache.decoders=0"], "cache.decoders=0: input should be greater than 0"),
        (["cache.gpus=-1"], "cache.gpus=-1: input should be greater than or equal to 0"),
        (["cache.gpus=2"], "cache.gpus=2: input should be less than or equal to 1"),
        (
            ["cache.aesthetic.head=/h.pth"],
            "cache.aesthetic.head=/h.pth: without cache.aesthetic.clip; name both, or none",
        ),
        (["cache.aesthetic={clip: /c}"], "cache.aesthetic.clip=/c: without cache.aesthetic.head; name both, or none"),
        (["cache.aesthetic.heads=/h"], "cache.aesthetic.heads: there is no such key; did you mean head?"),
        (["cache.aesthetic={head: https://h, clip: /c}"], "cache.aesthetic.head=https://h: a local path or s3://"),
        (["initial_noise.where={speed: [0, 1]}"], "initial_noise.where.speed: input should be 'motion', 'cut', 's"),
        (["initial_noise.where.speed=[0, 1]"], "initial_noise.where.speed: input should be 'motion', 'cut', 's"),
        (["generate.where={cut: [1, 0]}"], "generate.where.cut=[1, 0]: [least, most], or null"),
        (["generate.where={cut: 1}"], "generate.where.cut=1: input should be a valid tuple"),
        (["generate.where={cut: [a, 1]}"], "generate.where.cut.0=a: input should be a valid number"),
        (["finetune.row.where={cut: [1, 0]}"], "finetune.row.where.cut=[1, 0]: [least, most], or null"),
        (["finetune.rows.base.where={cut: [1, 0]}"], "finetune.rows.base.where.cut=[1, 0]: [least, most], or null"),
        (["finetune.rows.base.where={speed: [0, 1]}"], "finetune.rows.base.where.speed: input should be 'motion'"),
        (["finetune.row.balance=speed"], "finetune.row.balance=speed: input should be 'motion', 'cut', 'subject' or"),
        (["family.latents=median"], "family.latents=median: input should be 'mode', 'sample' or 'mean_std'"),
        (["compare.claims=[{row: a}]"], "compare.claims.0.says: field required"),
        (["generate.seeds=[2, 2]"], "generate.seeds=[2, 2]: each once"),
        (["generate.rows.a.seeds=[]"], "generate.rows.a.seeds=[]: list should have at least 1 item"),
        (["generate.start=noise"], "generate.start=noise: input should be 'gaussian', 'analytic' or 'diagonal'"),
        (["generate.rows.a.fps=0"], "generate.rows.a.fps=0: input should be greater than 0"),
        (["generate.rows.a.motion=-1"], "generate.rows.a.motion=-1: input should be greater than or equal to 0"),
        (["generate.gpus=2"], "generate.gpus=2: input should be less than or equal to 1"),
        (["generate.rows.a.sweep=3"], "generate.rows.a.sweep=3: keys with lists of values"),
        (["generate.rows.a.sweep.M=3"], "generate.rows.a.sweep={'M': 3}: each key with a list"),
        (["generate.rows.a.sweep.M=[]"], "generate.rows.a.sweep={'M': []}: each key with a list"),
        (["generate.rows.a.sweep.M=[0]"], "generate.rows.a.sweep.M=0: input should be greater than 0"),
        (
            ["generate.rows.a.sweep.guidanc=[1]"],
            "generate.rows.a.sweep.guidanc: there is no such key; did you mean guidance?",
        ),
        (["generate.rows.a.sweep.start=[a/b]"], "generate.rows.a.sweep={'start': ['a/b']}: its words become a part"),
        (["generate.rows.a.sweep.M=[7, 7.0]"], "generate.rows.a.sweep: M=7 stands in it twice"),
        (["finetune.rows.base.sweep=3"], "finetune.rows.base.sweep=3: keys with lists of values"),
        (["finetune.rows.base.sweep.lr=[0]"], "finetune.rows.base.sweep.lr=0: input should be greater than 0"),
        (["finetune.rows.base.sweep.conditioning.beta=[1]"], "finetune.rows.base.sweep.conditioning.beta: there is no"),
        (["finetune.rows.base.sweep.batch=[16, 7]"], "finetune.rows.base_batch=7.batch=7 does not divide"),
        (["finetune.row.sweep.lr=[1]"], "finetune.row.sweep: there is no such key"),
        (
            ["finetune.rows={a: {sweep: {lr: [1]}}, b: {weights: a}}"],
            "finetune.rows.b.weights=a: a row before it (a_lr=1)",
        ),
        (["score.videos=[/a]"], "score.videos=['/a']: input should be a valid dictionary"),
        (["score.videos.ours=http://a"], "score.videos.ours=http://a: a local path or s3://"),
        (["score.protocol=kinetics"], "score.protocol=kinetics: input should be 'whole' or 'paper'"),
        (["score.measures=[fvd]"], "score.measures.0=fvd: input should be 'alignment', 'consistency' or 'spectra'"),
        (["score.gpus=2"], "score.gpus=2: input should be less than or equal to 1"),
        (["score.bootstrap=19"], "score.bootstrap=19: an interval wants 20 draws or more; 0: no intervals"),
        (["score.videos={aü: x}"], "'aü' is no name for a row"),
        (["score.bootstrap=-1"], "score.bootstrap=-1: input should be greater than or equal to 0"),
    ],
)
def test_a_message_has_the_key_as_the_user_wrote_it(overrides, message):
    with pytest.raises(UserError) as error:
        load(None, overrides)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_ranges_of_scores_may_be_open_or_a_point():
    config = load(None, ["initial_noise.where={motion: [0.5, null], cut: [null, 0.1], subject: [0.3, 0.3]}"])
    assert config.initial_noise.where == {"motion": (0.5, None), "cut": (None, 0.1), "subject": (0.3, 0.3)}
    assert load(None, ["cache.stride=[2, 2]"]).cache.stride == (2, 2)
    assert load(None, ["cache.fps=8"]).cache.stride == 1


@pytest.mark.parametrize("text", ["[1, 2", "just words", "- a list"])
def test_a_file_that_is_not_a_configuration_is_named(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=str(file)):
        load(file)


def test_an_override_replaces_what_the_file_has_at_that_place(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("generate: {rows: {base: {M: 900}, other: {M: 800}}}")
    config = load(file, ["generate.rows={base: {}}", "generate.rows.base.guidance=2", "finetune.row.drop.both=0.1"])
    assert list(config.generate.rows) == ["base"]
    assert (config.generate.rows["base"].M, config.generate.rows["base"].guidance) == (None, 2)


def test_relative_paths_are_made_absolute_because_workers_run_elsewhere():
    config = load(None, ["out=here", "catalog.videos=there", "finetune.row.weights=./w", "generate.rows.a.weights=./v"])
    uris = [config.out, config.catalog.videos, config.finetune.row.weights, config.generate.rows["a"].weights]
    assert uris == [str(Path.cwd() / name) for name in ("here", "there", "w", "v")]
    assert load(None, ["out=s3://bucket/x"]).out == "s3://bucket/x"
    assert load(None).out == str(Path.cwd() / "outputs/shapes")


def test_a_relative_folder_would_be_lost_with_a_submitted_job(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="out=here: in a submitted job it must be an absolute path"):
        load(None, ["out=here"])


def test_a_file_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load("nowhere.yaml")


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://h/db?password=hunter2",
        "postgresql:///db?host=h&sslpassword=hunter2",
        "mysql+pymysql://h/db?charset=utf8&passwd=hunter2",
        "https://mlflow.example.org/?token=hunter2",
        "https://mlflow.example.org/?API-Key=hunter2",
        "https://mlflow.example.org/?%70assword=hunter2",
        "https://mlflow.example.org/#access_token=hunter2",
    ],
)
def test_a_password_behind_the_address_of_the_tracking_server_is_refused_and_not_repeated(uri):
    with pytest.raises(UserError, match=r"^tracking\.uri holds a password: .*PGPASSWORD$") as error:
        load(None, [f"tracking.uri={uri}"])
    assert "hunter2" not in str(error.value)


def test_what_an_address_asks_for_beside_passwords_is_no_secret():
    for uri in ("postgresql://h/db?sslmode=require&sslkey=/a.key", "sqlite:////a/mlflow.db?timeout=5"):
        assert load(None, [f"tracking.uri={uri}"]).tracking.uri == uri


def test_a_password_in_the_address_of_the_tracking_server_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as error:
        load(None, ["tracking.uri=https://me:hunter2@mlflow.example.org"])
    assert "hunter2" not in str(error.value)


def test_yaml_tags_cannot_run_code(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"out: !!python/object/apply:os.system ['touch {tmp_path}/ran']")
    with pytest.raises(UserError, match="not YAML"):
        load(file)
    assert not (tmp_path / "ran").exists()


def test_rows_take_what_they_do_not_say_from_the_shared_row():
    rows = load(None, ["finetune.row.lr=0.25", "finetune.rows={base: {}, next: {weights: base, samples: 320}}"])
    trained = rows.training_rows()
    assert trained["next"].settings.lr == 0.25
    assert (trained["base"].settings.samples, trained["next"].settings.samples) == (640, 320)


def test_a_filter_of_a_rows_own_stands_in_place_of_the_shared_one_and_its_conditioning_key_by_key():
    shared = "finetune.row={where: {motion: [0.1, null]}, conditioning: {kind: constant, level: 2}}"
    own = "finetune.rows={a: {}, b: {where: {}}, c: {where: {cut: [0, 1]}, conditioning: {level: 3}}}"
    rows = {name: row.settings for name, row in load(None, [shared, own]).training_rows().items()}
    assert [row.where for row in rows.values()] == [{"motion": (0.1, None)}, {}, {"cut": (0.0, 1.0)}]
    assert [(row.conditioning.kind, row.conditioning.level) for row in rows.values()] == [
        *[("constant", 2)] * 2,
        ("constant", 3),
    ]


def test_the_paper_study_pretrains_on_all_clips_and_fine_tunes_on_those_that_move():
    rows = load(PAPER).training_rows()
    assert rows["base"].settings.where == {}
    assert rows["naive-101"].settings.where == {"motion": (0.06, None)}


def test_every_seed_is_a_row_of_its_own_and_is_evaluated_as_such():
    config = load(PAPER)
    assert [n for n, row in config.training_rows().items() if row.arm == "naive"] == [
        f"naive-{seed}" for seed in range(101, 106)
    ]
    evaluated = config.evaluation_rows()
    assert evaluated["analytic-init-102"].weights == "naive-102"
    assert evaluated["base"].weights == "base"


def test_the_rows_of_the_comparison_are_those_that_were_trained_unless_others_are_named():
    config = load(None, ["finetune.rows={a: {}, b: {seeds: [1, 2]}}"])
    assert {name: row.weights for name, row in config.evaluation_rows().items()} == {
        "a": "a",
        "b-1": "b-1",
        "b-2": "b-2",
    }


def test_a_sweep_is_a_row_of_each_combination_with_its_values_in_the_name():
    timenoise = "timenoise: {sweep: {conditioning.beta_m: [0.5, 1], conditioning.a: [1, 5]}, seeds: [1, 2]}"
    config = load(None, ["finetune.row.conditioning.kind=timenoise", f"finetune.rows={{naive: {{}}, {timenoise}}}"])
    told = {
        name: (row.arm, row.seed, row.settings.conditioning.beta_m, row.settings.conditioning.a)
        for name, row in config.training_rows().items()
    }
    assert told == {"naive": ("naive", 0, None, None)} | {
        f"timenoise_beta_m={beta_m:g}_a={a}-{seed}": (f"timenoise_beta_m={beta_m:g}_a={a}", seed, beta_m, a)
        for beta_m in (0.5, 1.0)
        for a in (1, 5)
        for seed in (1, 2)
    }
    assert all(row.settings.conditioning.kind == "timenoise" for row in config.training_rows().values())
    # Without rows of its own, a comparison has them all; and dots on the command line make the same sweep.
    assert {row.weights for row in config.evaluation_rows().values()} == told.keys()
    dotted = ["finetune.rows.t.sweep.conditioning.a=[1, 2.5]", "finetune.rows.t.sweep.train=[lora]"]
    assert list(load(None, dotted).training_rows()) == ["t_a=1_train=lora", "t_a=2.5_train=lora"]


def test_a_generate_row_is_swept_and_has_a_row_for_each_member_of_the_training_row_that_it_names():
    trained = "finetune.rows={naive: {}, cured: {sweep: {lr: [1.0e-4, 2.0e-4]}}}"
    early = "early: {weights: cured, sweep: {M: [700, null], start: [gaussian, analytic]}}"
    rows = f"generate.rows={{naive: {{weights: naive, M: 900}}, {early}, one: {{weights: cured_lr=0.0001}}}}"
    config = load(None, [trained, rows, "generate.M=800"])
    told = {name: (row.weights, row.M, row.start) for name, row in config.arms().items()}
    assert told == {
        "naive": ("naive", 900, "gaussian"),
        **{
            f"early_lr={lr}_M={M or 'null'}_start={start}": (f"cured_lr={lr}", M, start)
            for lr in ("0.0001", "0.0002")
            for M in (700, None)
            for start in ("gaussian", "analytic")
        },
        "one": ("cured_lr=0.0001", 800, "gaussian"),
    }
    assert {name: row.weights for name, row in config.evaluation_rows().items()} == {n: t[0] for n, t in told.items()}
    over_weights = ["finetune.rows={a: {}, b: {}}", "generate.rows.x.sweep.weights=[a, b]"]
    assert {n: row.weights for n, row in load(None, over_weights).arms().items()} == {
        "x_weights=a": "a",
        "x_weights=b": "b",
    }


def test_a_row_says_what_it_has_of_its_own_and_the_section_the_rest():
    rows = "generate.rows={a: {}, b: {steps: 3, M: null, ema: true, fps: 4}}"
    config = load(None, ["generate.steps=7", "generate.M=700", "generate.ema=false", "generate.motion=9", rows])
    told = [(row.steps, row.M, row.ema, row.motion, row.fps) for row in config.arms().values()]
    assert told == [(7, 700, False, 9, None), (3, None, True, 9, 4)]
    assert load(None, ["generate.steps=7"]).arms()["base"].steps == 7


def test_the_paper_study_has_the_arms_and_at_least_three_paired_seeds():
    config = load(PAPER)
    assert {"naive", "early-start", "analytic-init", "constant", "timenoise"} < config.generate.rows.keys()
    seeds = {arm: [r.seed for r in config.evaluation_rows().values() if r.arm == arm] for arm in config.generate.rows}
    seeds.pop("base")
    assert len({tuple(s) for s in seeds.values()}) == 1
    assert len(seeds["naive"]) >= 3


def test_timenoise_and_naive_differ_in_one_word():
    naive, timenoise = (load(None, [f"finetune.row.conditioning.kind={kind}"]) for kind in ("none", "timenoise"))
    rows = [c.training_rows()["base"].shaping(TimeNoise(1)) for c in (naive, timenoise)]
    assert [key for key in rows[0] if rows[0][key] != rows[1][key]] == ["conditioning"]


def test_the_seeds_of_a_row_begin_in_turn_from_those_of_the_row_that_it_starts_from():
    given = "{base: {weights: null, seeds: [1, 2]}, naive: {weights: base, seeds: [7, 8, 9]}}"
    rows = load(None, [f"finetune.rows={given}"]).training_rows()
    starts = {name: row.settings.weights for name, row in rows.items()}
    assert starts == {
        "base-1": None,
        "base-2": None,
        "naive-7": "base-1",
        "naive-8": "base-2",
        "naive-9": "base-1",
    }


def test_the_full_form_of_the_paper_has_fifteen_seeds_of_each_arm_from_two_bases():
    from jobs.paper import FILE, FULL

    config = load(FILE, FULL)
    rows = config.training_rows()
    starts = [row.settings.weights for row in rows.values() if row.arm == "timenoise"]
    assert (starts.count("base-1"), starts.count("base-2")) == (8, 7)
    assert len(config.evaluation_rows()) == 2 + 6 * 15
    assert (rows["base-1"].settings.samples, rows["naive-201"].settings.samples) == (5600, 960)
    numbers = (config.shapes.videos, config.generate.clips, config.generate.reference, config.score.leakage)
    assert numbers == (3600, 128, 640, 16)  # those of the README's table
