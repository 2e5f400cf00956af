import csv
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_study
from mlflow import MlflowClient
from scipy.stats import ttest_rel

from pipelines import storage
from pipelines.artifact import read_manifest
from pipelines.compare import compare
from pipelines.config import ClaimConfig, Config, load
from pipelines.errors import Unfinished, UserError
from pipelines.page import _differences, _settings, _status, _summary, _verdicts, render
from pipelines.plots import _losses as losses_of
from pipelines.plots import leakage_of, plots
from pipelines.score import evaluation
from pipelines.study import METRICS, Arm, Estimate, Study, Verdict, holm, put_to_the_test, read_study, t_test
from pipelines.table import as_csv, holes, legend, markdown, tabulate
from pipelines.tracking import Run, runs, store_uri


def run(metrics: dict[str, float], **params: str) -> SimpleNamespace:
    return SimpleNamespace(data=SimpleNamespace(metrics=metrics, params=params, tags={}))


def arm(name: str, *values: float, metric: str = "motion") -> Arm:
    return Arm(name, {seed: run({metric: value}) for seed, value in enumerate(values)}, is_real=name == "real")


def study(*arms: Arm) -> Study:
    real = next((each for each in arms if each.name == "real"), None)
    for each in arms:
        each.real = real
    return Study("a study", {each.name: each for each in arms}, [])


def marks(of: Study, metric: str) -> dict[str, str]:
    (column,) = (c for c in tabulate(of) if c.name == metric)
    return {name: cell.mark for name, cell in column.cells.items()}


def claim(expected: str = "higher", against: str = "naive", row: str = "cure", metric: str = "motion") -> ClaimConfig:
    return ClaimConfig(says="it moves more", row=row, against=against, metric=metric, expected=expected)


def verdict(ours, theirs, **kind):
    arms = {"cure": arm("cure", *ours), "naive": arm("naive", *theirs), "real": arm("real", *theirs[:1])}
    return put_to_the_test(claim(**kind), arms)


def test_the_interval_is_the_t_interval_of_the_mean():
    estimate = Estimate.of([1.0, 2.0, 4.0])
    assert estimate.mean == pytest.approx(7 / 3)
    assert estimate.half == pytest.approx(4.302653 * 1.527525 / 3**0.5, rel=1e-5)
    assert Estimate.of([1.0]).half is None


def test_small_and_large_figures_keep_digits_that_say_something():
    assert [str(Estimate.of([x])) for x in (512.34, 31.256, 1.5, 0.0412, 0.00412, 0)] == [
        *("512.3", "31.26", "1.500", "0.041", "0.00412", "0.000")
    ]
    assert str(Estimate.of([0.02340, 0.02341, 0.02342])) == "0.02341 ± 0.00002"  # never ± 0.000


def test_seeds_are_paired_so_what_they_share_does_not_hide_the_difference():
    ours, theirs = [1.10, 5.11, 9.09], [1.0, 5.0, 9.0]
    v = verdict(ours, theirs)
    assert v.word == "holds"
    assert v.figures == "motion score +0.100 ± 0.025, 3 of 3 seeds, p 0.0033"
    assert v.p == pytest.approx(ttest_rel(ours, theirs).pvalue)  # the same test, by somebody else


def test_a_difference_that_could_be_chance_is_not_shown():
    assert verdict([1.1, 0.9, 1.2], [1.0, 1.0, 1.0]).word == "not shown"


def test_the_opposite_is_said_as_plainly():
    assert verdict([1.10, 5.11, 9.09], [1.0, 5.0, 9.0], expected="lower").word == "the opposite holds"


def test_one_seed_without_scores_of_single_videos_tests_nothing():
    assert verdict([2.0], [1.0]).word == "not tested (1 common seed)"


def test_real_clips_stand_against_every_seed_on_either_side():
    v = verdict([2.0, 2.1, 1.9], [1.0, 7.0, 7.0], against="real")
    assert list(v.differences.values()) == pytest.approx([1.0, 1.1, 0.9])
    v = verdict([2.0, 2.1, 1.9], [1.0, 7.0, 7.0], row="real", against="cure", expected="lower")
    assert list(v.differences.values()) == pytest.approx([-1.0, -1.1, -0.9])
    assert v.word == "holds"


def test_what_cannot_be_tested_says_why():
    arms = {"cure": arm("cure", 1.0, 2.0), "naive": Arm("naive", {0: run({"fvd": 1.0}), 1: run({"fvd": 2.0})})}

    def said(**kind) -> str:
        found = put_to_the_test(claim(**kind), arms)
        assert (found.p, found.figures) == (None, "no figures")
        return found.word

    assert said(against="gone") == "not tested (there are no runs of gone)"
    assert said(row="real", against="gone") == "not tested (there are no runs of real and gone)"
    assert said() == "not tested (no run of naive has the motion score)"
    assert said(metric="psnr") == "not tested (no run of cure or naive has the PSNR)"
    arms["naive"] = Arm("naive", {7: run({"motion": 1.0}), 8: run({"motion": 1.0})})
    assert said() == "not tested (0 common seeds)"


def test_a_claim_about_a_row_and_itself_is_refused():
    about = [{"says": "it is itself", "row": "real", "against": "real", "metric": "fvd", "expected": "lower"}]
    with pytest.raises(UserError, match="'it is itself' is about 'real' against itself"):
        load(None, [f"compare.claims={json.dumps(about)}", "compare.experiment=any"])


def from_bases(ours: list[float], bases: list[str]) -> Verdict:
    arms = {"cure": arm("cure", *ours), "naive": arm("naive", *[0.0] * len(ours))}
    for each in arms.values():
        each.bases = dict(enumerate(bases))
    return put_to_the_test(claim(), arms)


def test_where_seeds_begin_from_several_bases_agreement_is_told_of_each():
    bases = ["base-1", "base-2"] * 7 + ["base-1"]
    v = from_bases([1.0 + 0.01 * i for i in range(15)], bases)
    assert v.word == "holds"
    assert "15 of 15 seeds (base-1: 8 of 8, base-2: 7 of 7), p" in v.figures
    v = from_bases([1.0 + 0.01 * i for i in range(4)], ["base"] * 4)
    assert "4 of 4 seeds, p" in v.figures


def test_what_holds_over_all_but_not_from_one_base_says_so():
    bases = ["base-1", "base-2", "base-1", "base-3"] * 3
    v = from_bases([3.0, -0.2, 3.1, 2.9, 3.0, -0.1, 3.2, 3.0, 2.9, -0.3, 3.0, 3.1], bases)
    assert (v.outcome, v.word) == ("holds", "holds, but not from base-2")
    assert "9 of 12 seeds (base-1: 6 of 6, base-2: 0 of 3, base-3: 3 of 3)" in v.figures
    v = from_bases([1.0, -1.2, 0.9, 1.0], bases[:4])  # of what is not shown there is nothing to say
    assert v.word == "not shown"


def test_differences_that_are_all_the_same_are_certain_and_none_is_no_difference():
    assert t_test([0.5, 0.5, 0.5]) == 0
    assert t_test([0.0, 0.0]) == 1


def test_holms_correction_counts_tests_that_are_not_told():
    assert holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, 0.04], 10) == pytest.approx([0.1, 0.36])
    assert holm([0.5, 0.9], 3) == [1, 1]


def test_the_table_has_a_line_a_row_and_shows_a_hole_as_a_hole_that_is_explained():
    of = study(arm("real", 1.0), arm("cure", 1.0, 2.0), Arm("other", {0: run({"motion": 5.0, "psnr": 30.0})}))
    table = markdown(of, tabulate(of), [])
    assert "| cure  | 2     | **1.500 ± 6.353**        | -          |" in table
    assert "| other | 1     | 5.000 ?                  | 30.00      |" in table
    assert "- cure: its runs have no PSNR." in table


def test_a_figure_that_is_not_finite_is_missing():
    of = study(arm("cure", 1.0, float("nan"), 3.0, metric="psnr"), arm("naive", float("inf"), metric="psnr"))
    (column,) = tabulate(of)
    assert column.cells["cure"].estimate.mean == 2
    assert column.cells["naive"].estimate is None
    assert holes(of, [column]) == [
        "cure: without seed 1, whose runs lack it: PSNR.",
        "naive: its runs have no PSNR.",
    ]


@pytest.mark.parametrize(("metric", "best"), [("frechet", "low"), ("psnr", "high"), ("motion", "near")])
def test_the_best_is_the_best_in_the_metrics_direction_and_never_the_real_row(metric, best):
    arms = [arm(n, *v, metric=metric) for n, v in {"low": (2.0, 2.1), "high": (9.0, 9.1), "near": (5.5, 5.6)}.items()]
    of = study(arm("real", {"frechet": 0.0, "psnr": 99.0, "motion": 5.0}[metric], metric=metric), *arms)
    assert [name for name, mark in marks(of, metric).items() if mark == "best"] == [best]


def test_without_a_real_row_nothing_says_which_motion_is_the_best():
    assert set(marks(study(arm("low", 1.0), arm("high", 2.0)), "motion").values()) == {""}


def test_a_row_that_cannot_be_told_from_the_best_is_marked_and_one_that_can_is_not():
    of = study(
        arm("best", 1.00, 3.01, 2.02, 5.00, metric="fvd"),
        arm("close", 1.10, 2.95, 2.10, 4.98, metric="fvd"),
        arm("worse", 2.00, 4.02, 3.00, 6.01, metric="fvd"),  # its mean is within the others' spread over seeds
    )
    assert marks(of, "fvd") == {"best": "best", "close": "tied", "worse": ""}
    assert "paired by seed (t-test), at 5% with Holm's correction for all pairs of rows." in " ".join(
        legend(tabulate(of))
    )


def test_the_number_of_rows_counts_in_what_can_be_told():
    best, close = (0.0, 0.1, 0.2), (1.0, 1.3, 1.0)  # p is .013
    two = study(arm("best", *best, metric="fvd"), arm("close", *close, metric="fvd"))
    assert marks(two, "fvd")["close"] == ""
    more = [arm(f"far-{i}", 40.0 + i, 3.0 + i, 90.0 - i, metric="fvd") for i in range(4)]
    assert marks(study(*two.arms.values(), *more), "fvd")["close"] == "tied"


def with_videos(name: str, values: list[float], metric: str = "psnr", seed: int = 0) -> Arm:
    lines = [{"clip_id": f"{i}:0", metric: value} for i, value in enumerate(values)]
    return Arm(name, {seed: run({metric: sum(values) / len(values)})}, {seed: lines}, is_real=name == "real")


def test_how_far_motion_is_off_is_the_size_of_what_each_video_lacks():
    lacking = with_videos("cure", [-1.0, 2.0], metric="motion_lack")
    assert lacking.clips(0, "motion_off") == {"0:0": 1.0, "1:0": 2.0}


def test_with_one_seed_rows_are_compared_video_by_video():
    base = [20.0 + 3 * (i % 7) for i in range(30)]  # videos differ by more than rows do
    of = study(
        with_videos("best", [x + 0.5 + 0.1 * (i % 3) for i, x in enumerate(base)]),
        with_videos("close", [x + 0.6 - 0.24 * (i % 2) + 0.1 * (i % 3) for i, x in enumerate(base)], seed=4),
        with_videos("worse", base),
    )
    assert marks(of, "psnr") == {"best": "best", "close": "tied", "worse": ""}
    assert "paired video by video (sign flips)" in " ".join(legend(tabulate(of)))


def test_of_motion_the_distance_from_the_real_clips_is_compared_on_whichever_side_a_row_is():
    real = [1.0 + 0.1 * (i % 5) for i in range(30)]
    few = [x - 0.20 + 0.01 * (i % 3) for i, x in enumerate(real)]
    much = [x + 0.20 + 0.01 * (i % 3) for i, x in enumerate(real)]  # nearly as far off, on the other side
    off = [x + 0.50 for x in real]
    rows = {"real": real, "few": few, "much": much, "off": off}
    of = study(*(with_videos(name, values, "motion") for name, values in rows.items()))
    assert marks(of, "motion") == {"real": "", "few": "best", "much": "", "off": ""}
    rows["much"] = [2 * x - y + 0.02 * (-1) ** i for i, (x, y) in enumerate(zip(real, few, strict=True))]
    of = study(*(with_videos(name, values, "motion") for name, values in rows.items()))
    assert sorted([marks(of, "motion")[name] for name in ("few", "much")]) == ["best", "tied"]


def test_a_share_of_videos_is_compared_by_what_each_of_them_is():
    rows = {"real": [True] * 30, "most": [True] * 29 + [False], "none": [False] * 30}
    of = study(*(with_videos(name, values, "dynamic_degree") for name, values in rows.items()))
    for each in of.arms.values():
        each.videos[0] = [{"clip_id": line["clip_id"], "dynamic": line["dynamic_degree"]} for line in each.videos[0]]
    assert marks(of, "dynamic_degree") == {"real": "", "most": "best", "none": ""}


def test_a_claim_about_rows_of_one_seed_is_tested_video_by_video_and_says_so():
    base = [1.0 + 0.1 * (i % 5) for i in range(30)]
    rows = {"naive": base, "cure": [x + 0.05 + 0.01 * (i % 3) for i, x in enumerate(base)]}
    arms = {name: with_videos(name, values, "motion", seed=len(name)) for name, values in rows.items()}
    v = put_to_the_test(claim(), arms)
    assert (v.word, v.p) == ("holds, of one seed", None)
    assert v.figures == "motion score +0.060 [0.057, 0.063], 30 videos, p below 0.0001"
    assert put_to_the_test(claim(expected="lower"), arms).word == "the opposite holds, of one seed"
    arms["cure"] = with_videos("cure", [x + 0.05 * (-1) ** i for i, x in enumerate(base)], "motion")
    assert put_to_the_test(claim(), arms).word == "not shown, of one seed"


def measured_by(name: str, *values: float, metric: str = "fvd", yardstick: str = "", **told: str) -> Arm:
    made = arm(name, *values, metric=metric)
    for each in made.runs.values():
        each.data.params = {f"score.{key}": value for key, value in told.items()}
    made.yardstick = yardstick
    return made


def test_a_row_of_true_clips_is_never_the_best_whatever_it_is_called():
    reals = [measured_by("real", x, metric="motion", raft=net) for x, net in [(1.0, "-"), (2.0, "a-net")]]
    for real, name in zip(reals, ("real (raft=-)", "real (raft=a-net)"), strict=True):
        real.name = name
    ours = [measured_by(name, x, x, metric="motion", raft="a-net") for name, x in [("naive", 1.0), ("cure", 1.9)]]
    of = study(*reals, *ours)
    for each in of.arms.values():
        each.real = reals[1]
    assert marks(of, "motion") == {"real (raft=-)": "", "real (raft=a-net)": "", "naive": "", "cure": "best"}
    for each in ours:  # a real row that is measured by another flow is no yardstick
        each.real = reals[0]
    assert set(marks(of, "motion").values()) == {""}


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("fvd", {"fvd": "another-net"}),
        ("fvd", {"reference": "another-set"}),
        ("frechet", {"reference": "another-set"}),
        ("spectrum_time", {"reference": "another-set"}),
        ("is", {"classes": "another-net"}),
        ("clip_similarity", {"clip": "another-net"}),
        ("motion_error", {"raft": "another-net"}),
        ("motion_error", {"yardstick": "other clips"}),
        ("warp_error", {"raft": "another-net"}),
        ("psnr", {"protocol": "paper"}),
    ],
)
def test_figures_that_are_measured_differently_are_not_ranked_and_not_tested(metric, told):
    shared = {"fvd": "a-net", "reference": "a-set", "protocol": "all", "yardstick": ""}
    alike = [measured_by(name, x, x + 1, metric=metric, **shared) for name, x in [("naive", 1.0), ("cure", 2.0)]]
    best, other = ("cure", "naive") if METRICS[metric].better == "higher" else ("naive", "cure")
    assert marks(study(*alike), metric) == {best: "best", other: ""}
    of = study(*alike, measured_by("theirs", 3.0, 4.0, metric=metric, **shared | told))
    assert set(marks(of, metric).values()) == {""}
    name = "the true clips" if "yardstick" in told else f"score.{min(told)}"
    (said,) = holes(of, tabulate(of))
    before = "-" if min(told) in ("raft", "classes", "clip") else shared[min(told)]
    after = f"{told[min(told)][:12]} in theirs"
    assert said == (
        f"{METRICS[metric].label}: no row is the best, as rows differ in {name} ({before} in naive, cure; {after})."
    )
    found = put_to_the_test(claim(row="theirs", metric=metric), of.arms)
    assert found.word == f"not tested (they differ in {name})"
    assert put_to_the_test(claim(metric=metric), of.arms).p is not None


def test_what_else_is_measured_differently_does_not_matter_to_a_metric():
    of = study(
        measured_by("naive", 1.0, 2.0, metric="psnr", reference="a-set"),
        measured_by("cure", 3.0, 4.1, metric="psnr", reference="another-set"),
    )
    assert set(marks(of, "psnr").values()) == {"", "best"}


def test_rows_without_anything_in_common_are_not_compared_and_that_is_said():
    of = study(arm("best", 1.0, metric="fvd"), arm("other", 9.0, metric="fvd"))
    assert marks(of, "fvd") == {"best": "best", "other": "untested"}
    assert "| other | 1     | 9.000 ?" in markdown(of, tabulate(of), [])


def test_one_run_shows_the_interval_that_was_measured_with_it():
    values = {"fvd": 300.0, "fvd_low": 280.0, "fvd_high": 331.0}
    of = study(Arm("one", {0: run(values)}), Arm("two", {0: run(values), 1: run(values | {"fvd": 310.0})}))
    (column,) = tabulate(of)
    assert str(column.cells["one"].estimate) == "300.0 [280.0, 331.0]"
    assert str(column.cells["two"].estimate) == "305.0 ± 63.5"


def test_metrics_that_nobody_here_knows_stand_behind_the_others_and_have_no_best():
    values = {
        "aaa": 1.0,
        "aaa_low": 0.5,
        "aaa_high": 2.0,
        "fvd": 3.0,
        "motion": 0.1,
        "fvd_sd": 1.0,
        "videos": 4,
        "rejects": 2,
        "system/cpu": 9.0,
    }
    of = study(Arm("one", {0: run(values)}), Arm("two", {0: run(values)}))
    assert [column.label for column in tabulate(of)] == ["motion score, px/frame →", "FVD ↓", "aaa"]
    assert set(marks(of, "aaa").values()) == {""}
    assert holes(of, tabulate(of)) == [f"{name}: 2 videos could not be scored." for name in ("one", "two")]


def test_every_metric_that_a_claim_may_name_is_in_the_table():
    assert set(ClaimConfig.model_fields["metric"].annotation.__args__) == METRICS.keys()


def test_the_csv_has_every_figure_whole():
    of = study(arm("real", 0.5), arm("cure", 1 / 3, 2 / 3), arm("naive", 0.1), Arm("hole", {0: run({"fvd": 1.0})}))
    real, cure, naive, hole = csv.DictReader(io.StringIO(as_csv(of, tabulate(of))))
    assert float(cure["motion"]) == 0.5
    assert float(cure["motion_high"]) - 0.5 == pytest.approx(12.7062 / 6, rel=1e-4)
    assert (real["motion_mark"], naive["motion_low"], hole["motion"], hole["fvd"]) == ("", "", "", "1.0")


# Of a study in MLflow.


def asked(config: Config, **compare) -> Config:
    return load(None, [f"out={config.out}", *(f"compare.{key}={json.dumps(value)}" for key, value in compare.items())])


@pytest.fixture
def own(studied, tmp_path) -> Config:
    """A copy of the study, to spoil."""
    config = studied.model_copy(update={"out": str(shutil.copytree(studied.out, tmp_path / "out"))})
    client = MlflowClient(store_uri(config))
    for found in runs(config, "evaluate"):
        for tag in ("cil.scores", "cil.videos"):
            client.set_tag(found.info.run_id, tag, found.data.tags[tag].replace(studied.out, config.out))
    return config


def ids(config: Config) -> dict[str, str]:
    return {found.info.run_name: found.info.run_id for found in runs(config, "evaluate")}


def test_runs_by_themselves_are_the_rows_of_the_configuration_that_made_them(studied):
    named, found = read_study(studied), read_study(asked(studied, experiment="a small study"))
    assert found.arms.keys() == named.arms.keys() == {"real", *small_study.ROWS}
    for name, each in named.arms.items():
        assert {s: r.info.run_id for s, r in found.arms[name].runs.items()} == {
            s: r.info.run_id for s, r in each.runs.items()
        }
    assert sorted(found.arms["naive"].runs) == small_study.SEEDS
    assert found.notes == named.notes == []
    order = ["real", *sorted(small_study.ROWS)]
    tables = [{name: [str(c.cells[name]) for c in tabulate(each)] for name in order} for each in (named, found)]
    assert tables[0] == tables[1]


def test_a_filter_takes_what_matches(studied):
    found = read_study(asked(studied, experiment="a small study", filter="params.M = '700.0'"))
    assert found.arms.keys() == {"early-start-700", "analytic-init-700"}
    study_of_the_configuration = asked(studied, filter="params.start = 'analytic'").model_copy(
        update={"tracking": studied.tracking}
    )
    assert read_study(study_of_the_configuration).arms.keys() == {"analytic-init-850", "analytic-init-700"}


def test_runs_are_compared_by_their_ids_and_what_is_none_is_left_out_with_a_line(studied, capsys):
    known, (training, *_) = ids(studied), runs(studied, "train")
    wanted = [known["naive-11"], known["naive-12"], known["timenoise-11"], training.info.run_id, "0" * 32]
    found = read_study(asked(studied, runs=wanted))
    assert {name: sorted(each.runs) for name, each in found.arms.items()} == {"naive": [11, 12], "timenoise": [11]}
    printed = capsys.readouterr().out
    assert f"({training.info.run_id}) is a run of the stage train; it is left out." in printed
    assert f"{'0' * 32}: {store_uri(studied)} has no such run; it is left out." in printed


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (
            {"experiment": "another"},
            r"compare\.experiment=another: sqlite:.* has no such experiment, but .*a small study",
        ),
        ({"experiment": "a small study", "filter": "params.M > 'x"}, r"compare\.filter=params\.M > 'x: "),
        ({"experiment": "a small study", "filter": "params.M = '1'"}, "no evaluate run with metrics is there"),
        ({"runs": ["0" * 32]}, r"0: sqlite:.* has no such run; it is left out\. Run jobs\.score"),
    ],
)
def test_what_finds_nothing_is_one_line(studied, wanted, says):
    with pytest.raises(UserError, match=says) as error:
        read_study(asked(studied, **wanted))
    assert "\n" not in str(error.value)
    assert MlflowClient(store_uri(studied)).get_experiment_by_name("another") is None


@pytest.mark.parametrize("override", ["compare.experiment=any", "compare.clips=1"])
def test_a_store_that_is_not_there_is_refused_and_not_made(tmp_path, override):
    with pytest.raises(UserError, match="there is no such tracking store"):
        read_study(load(None, [f"out={tmp_path}", override]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["compare.experiment=any", "compare.runs=[a]", "compare.clips=1"])
def test_a_tracking_server_that_nobody_runs_is_one_line(tmp_path, override):
    with pytest.raises(Unfinished, match=r"tracking\.uri=http://127\.0\.0\.1:9: cannot be reached"):
        read_study(load(None, [f"out={tmp_path}", "tracking.uri=http://127.0.0.1:9", override]))


def test_claims_are_about_rows_of_the_configuration_unless_runs_are_compared_by_themselves(studied):
    about = [{"says": "it moves", "row": "their-row", "against": "real", "metric": "fvd", "expected": "lower"}]
    with pytest.raises(UserError, match="'their-row' is not a row"):
        asked(studied, claims=about)
    assert asked(studied, claims=about, experiment="theirs").compare.claims[0].row == "their-row"


def test_ids_and_a_search_are_not_asked_for_together():
    with pytest.raises(UserError, match=r"compare\.runs: instead of"):
        load(None, ["compare.runs=[a]", "compare.experiment=b"])


def test_runs_that_somebody_else_made_are_compared_by_their_parameters(own):
    client = MlflowClient(store_uri(own))
    theirs = client.create_experiment("theirs", artifact_location=f"file://{own.out}/theirs")
    for name, rate, seed in [("funny-cat", 1, 5), ("wild-ox", 1, 6), ("odd-fox", 2, 5), ("shy-owl", 2, 6)]:
        made = client.create_run(theirs, run_name=name).info.run_id
        client.log_param(made, "model.lr", rate)
        client.log_param(made, "seed", seed)
        client.log_metric(made, "fvd", 300 + 10 * rate + seed)
    client.create_run(theirs, run_name="nothing-yet")
    config = asked(own, experiment="theirs")
    found = read_study(config)
    assert {name: sorted(each.runs) for name, each in found.arms.items()} == {"funny-cat": [5, 6], "odd-fox": [5, 6]}
    assert any("nothing-yet" in note and "has no metrics" in note for note in found.notes)
    assert any("wild-ox: names no scores of single videos" in note for note in found.notes)
    page = Path(compare(config).uri, "index.html").read_text()
    assert "None of these runs names videos that can be read from here." in page
    assert "<tr><th>model.lr</th><td>1</td><td>2</td></tr>" in page
    assert marks(found, "fvd") == {"funny-cat": "best", "odd-fox": ""}


def test_rows_of_one_name_in_two_studies_are_told_apart(own, tmp_path):
    other = small_study.config_of(
        tmp_path / "other", f"tracking.uri={store_uri(own)}", "finetune.row.lr=0.001", "tracking.experiment=other"
    )
    theirs = small_study.make(other)
    wanted = [ids(own)["naive-11"], ids(own)["real"], theirs["naive-11"], theirs["timenoise-11"]]
    found = read_study(asked(own, runs=wanted))
    assert found.arms.keys() == {"real", "naive (lr=0.0005)", "naive (lr=0.001)", "timenoise"}
    assert {name: each.real is not None for name, each in found.arms.items()} == dict.fromkeys(found.arms, True)


def test_rows_against_other_real_clips_have_their_own_and_the_page_says_so(own):
    for name in ("real", "timenoise-11", "timenoise-12", "timenoise-13"):
        manifest = Path(own.out, "scores", name, "manifest.json")
        told = json.loads(manifest.read_text())
        told["identity"]["real"] = "others"
        manifest.write_text(json.dumps(told))
    found = read_study(asked(own, experiment="a small study"))
    assert found.notes == ["Not all rows are known to be measured against the same true clips: compare within a study."]
    assert found.arms["timenoise"].real is found.arms["real"]
    assert found.arms["naive"].real is None
    assert marks(found, "motion")["naive"] == ""


def test_what_says_the_same_twice_is_taken_once(own):
    client, known = MlflowClient(store_uri(own)), ids(own)["naive-11"]
    first = client.get_run(known)
    again = client.create_run(first.info.experiment_id, tags=first.data.tags).info.run_id
    for key, value in first.data.params.items():
        client.log_param(again, key, value)
    client.log_metric(again, "fvd", 3.0)
    found = read_study(asked(own, experiment="a small study"))
    assert found.arms["naive"].runs[11].info.run_id == again
    assert any(f"({again}) says the same of itself as {known}; the newer one is taken." in n for n in found.notes)


def test_scores_that_cannot_be_read_are_a_hole_and_the_rest_goes_on(own):
    Path(own.out, "scores/naive-11/scores.jsonl").unlink()
    Path(own.out, "scores/naive-12/scores.jsonl").write_text("{no json\n")
    shutil.rmtree(Path(own.out, "videos/naive-11"))
    made = compare(own)
    page = Path(made.uri, "index.html").read_text()
    for name in ("naive-11", "naive-12"):
        assert f"{name}: {own.out}/scores/{name}/scores.jsonl cannot be read" in page
    assert made.counts == {"rows": 1 + len(small_study.ROWS)}
    assert "What is missing (2)" in page


def test_a_study_of_one_run_is_shown_and_said_to_be_one(own):
    made = compare(asked(own, runs=[ids(own)["naive-11"]]))
    table = Path(made.uri, "table.md").read_text()
    assert "There is one row, naive: nothing to compare it with." in table
    assert "| naive | 1 " in table
    assert "**" not in table  # the best of one is none


def test_rows_that_are_not_scored_yet_are_named(own):
    shutil.rmtree(Path(own.out, "scores/timenoise-12"))
    found = read_study(own)
    assert sorted(found.arms["timenoise"].runs) == [11, 13]
    assert found.notes == ["timenoise-12: has no scores in the study a small study; it is left out."]


def test_each_state_of_a_study_is_logged_once_with_all_three_files(own, capsys):
    first, client = compare(own), MlflowClient(store_uri(own))
    assert compare(own).uri == first.uri
    (logged,) = runs(own, "compare")
    files = sorted(file.path for file in client.list_artifacts(logged.info.run_id))
    assert files == ["comparison.html", "table.csv", "table.md"]
    assert Path(first.uri, "table.md").read_text() in capsys.readouterr().out
    client.log_metric(ids(own)["naive-11"], "fvd", 300.0)
    assert compare(own).uri != first.uri
    assert len(runs(own, "compare")) == 2


def test_what_is_said_of_the_runs_above_the_table_belongs_to_a_state_of_the_study(own):
    first = compare(own)
    rows = own.generate.rows | {"later": own.generate.rows["naive"]}
    named = own.model_copy(update={"generate": own.generate.model_copy(update={"rows": rows})})
    again = compare(named)
    assert read_study(named).notes != read_study(own).notes
    assert again.uri != first.uri
    assert "later" in Path(again.uri, "index.html").read_text()


def test_a_comparison_of_another_experiment_is_logged_there(own):
    client = MlflowClient(store_uri(own))
    client.create_experiment("empty", artifact_location=f"file://{own.out}/empty")
    config = asked(own, experiment="a small study").model_copy(update={"tracking": own.tracking})
    elsewhere = config.model_copy(update={"tracking": own.tracking.model_copy(update={"experiment": "empty"})})
    compare(elsewhere)
    assert len(runs(own, "compare")) == 1


def test_runs_of_one_experiment_are_compared_there_and_of_several_in_that_of_the_configuration(own, tmp_path):
    other = small_study.config_of(tmp_path / "other", f"tracking.uri={store_uri(own)}", "tracking.experiment=other")
    theirs = small_study.make(other, clips=4)
    of_one = asked(own, runs=[theirs["naive-11"], theirs["timenoise-11"]])
    of_both = asked(own, runs=[theirs["naive-11"], ids(own)["timenoise-11"]])
    assert (read_study(of_one).name, read_study(of_one).notes) == ("other", [])
    found = read_study(of_both)
    assert found.name == of_both.tracking.experiment == "shapes"
    assert found.notes[0] == (
        "The runs are of several experiments, a small study, other; this comparison stands in shapes."
    )


def test_two_runs_of_one_seed_are_compared_video_by_video(own):
    known = ids(own)
    about = [dict(zip(("says", "row", "against", "metric", "expected"), small_study.CLAIMS[0], strict=True))]
    config = asked(own, runs=[known["real"], known["naive-11"], known["timenoise-11"]], claims=about)
    found = read_study(config)
    assert marks(found, "motion") == {"real": "", "naive": "", "timenoise": "best"}
    assert "of one seed, paired video by video (sign flips)" in " ".join(legend(tabulate(found)))
    claimed = [put_to_the_test(each, found.arms) for each in config.compare.claims]
    assert "- TimeNoise moves more than naive fine-tuning: **holds, of one seed**" in markdown(found, [], claimed)
    assert "24 videos, p below 0.0001" in _verdicts(claimed)
    assert "videos of one seed are compared by sign flips" in _verdicts(claimed)
    assert _summary(claimed) == "1 claim: 1 hold of one seed."  # and none that counts for other seeds


def test_agreement_is_told_by_the_base_that_each_seed_begins_from(tmp_path):
    config = small_study.config_of(tmp_path, "finetune.rows.base.seeds=[1, 2]")
    small_study.make(config, clips=4)
    of = read_study(config)
    assert of.arms["naive"].bases == of.arms["early-start-700"].bases == {11: "base-1", 12: "base-2", 13: "base-1"}
    assert of.arms["base"].bases == of.arms["real"].bases == {}
    claimed = [put_to_the_test(each, of.arms) for each in config.compare.claims]
    assert "3 of 3 seeds (base-1: 2 of 2, base-2: 1 of 1), p" in _verdicts(claimed)
    assert "They begin from 2 bases, base-1, base-2." in _status(of, claimed)


def drawn(config: Config, of: Study) -> list[str]:
    return [said for said, _ in plots(config, of)]


def test_curves_are_drawn_over_what_differs_between_rows_and_over_nothing_else(studied):
    whole = drawn(studied, read_study(studied))
    assert [said for said in whole if " over " in said] == [
        "motion score over M: where sampling starts",
        "Frechet distance over M: where sampling starts",
        "motion score over beta_m of TimeNoise",
        "Frechet distance over beta_m of TimeNoise",
    ]
    assert any(said.startswith("Leakage") for said in whole)
    assert any(said.startswith("Training loss") for said in whole)
    few = read_study(
        asked(studied, experiment="a small study", filter="params.start = 'gaussian' and params.M = '850.0'")
    )
    assert not [said for said in drawn(studied, few) if " over " in said]


def test_a_curve_over_M_is_a_line_for_each_start_of_the_same_weights(studied):
    of = read_study(studied)
    svg = dict(plots(studied, of))["motion score over M: where sampling starts"]
    for told in (">gaussian<", ">analytic<", ">700<", ">850<", ">T<", ">real clips<"):
        assert told in svg, told
    assert ">base<" not in svg  # it stands at one M alone


def test_the_leakage_of_a_row_is_the_mean_of_its_seeds_and_another_file_of_that_name_is_left_out(own):
    client, named = MlflowClient(store_uri(own)), ids(own)
    of = read_study(own)
    values = of.arms["naive"].values("motion")
    whole = leakage_of(own, of)["naive"]
    assert whole["truth"] == pytest.approx([0.19] * 3)
    assert whole["motion"] == pytest.approx([0.19, 0.15, sum(values.values()) / 3 / 2])
    client.log_dict(named["naive-11"], {"something": "else"}, "leakage.json")
    assert leakage_of(own, of)["naive"]["motion"][2] == pytest.approx((values[12] + values[13]) / 2 / 2)


def test_runs_without_parameters_or_files_have_fewer_plots(studied):
    of = study(arm("one", 1.0, 2.0), arm("two", 2.0, 3.0))
    for each in of.arms.values():
        for seed, found in each.runs.items():
            found.info = SimpleNamespace(run_id=f"none-{seed}", experiment_id="0")
    assert drawn(studied, of) == ["motion score: every seed a dot, the mean with its interval"]


def page(config: Config, of: Study) -> str:
    return render(config, of, tabulate(of), [put_to_the_test(c, of.arms) for c in config.compare.claims])


def test_few_seeds_are_called_indicative_and_the_note_stands_beside_it(studied):
    of, config = read_study(studied), load(None, [f"out={studied.out}", "compare.note=Chosen on <other> seeds."])
    assert "Indicative: 3 seeds at the fewest." in page(config, of)
    assert "<p>Chosen on &lt;other&gt; seeds.</p>" in page(config, of)


@pytest.mark.parametrize(
    ("seeds", "of_one", "indicative"), [(15, 15, False), (10, 10, False), (9, 9, True), (15, 9, True)]
)
def test_a_page_is_indicative_where_something_is_compared_on_fewer_than_ten_seeds(seeds, of_one, indicative):
    of = study(
        arm("real", 1.0),
        *(arm(name, *[1.0 + 0.1 * i for i in range(n)]) for name, n in [("cure", of_one), ("naive", seeds), ("b", 1)]),
    )
    claimed = [put_to_the_test(claim(against=against), of.arms) for against in ("naive", "real", "gone")]
    assert _status(of, claimed).startswith(f"Indicative: {of_one} seeds at the fewest.") == indicative
    of_one_seed = {
        name: with_videos(name, [x, x + 1], "motion", seed) for name, x, seed in [("cure", 2, 3), ("naive", 1, 4)]
    }
    assert _status(of, [put_to_the_test(claim(), of_one_seed)]).startswith("Indicative: 1 seed at the fewest.")
    without = study(*(each for each in of.arms.values() if each.name != "cure"), arm("c", *range(of_one)))
    assert _status(without, []).startswith("Indicative") == indicative


def test_a_page_says_from_which_bases_its_seeds_begin():
    of = study(arm("cure", *range(12)), arm("naive", *range(12)))
    assert "bases" not in _status(of, [])
    of.arms["cure"].bases = {seed: f"base-{1 + seed % 2}" for seed in range(12)}
    assert _status(of, []) == "2 rows, compared on 12 seeds or more. They begin from 2 bases, base-1, base-2."


def test_the_words_at_the_top_count_what_holds_and_what_does_not(studied):
    assert (
        "5 claims: 2 hold, 1 hold the other way round, 1 not shown, 1 not tested. Tested one by one; with Holm&#x27;s "
        "correction for 4 tests, 3 of these 3 would be left."
    ) in page(studied, read_study(studied))


def test_the_page_shows_as_many_images_as_are_asked_for_with_their_prompts_and_the_real_clips_first(studied):
    config = studied.model_copy(update={"compare": studied.compare.model_copy(update={"clips": 2})})
    clips = page(config, read_study(studied)).partition('<table class="clips">')[2].partition("</table>")[0]
    assert clips.count("<video") == 2 * (1 + len(small_study.ROWS))
    assert clips.count("a disc that moves to the right, number") == 2
    assert clips.index("<th>real</th>") < clips.index("<th>base</th>")


def test_a_set_made_elsewhere_stands_beside_the_study_and_says_what_it_lacks(own):
    for made in ("scores", "videos"):
        shutil.copytree(Path(own.out, made, "naive-11"), Path(own.out, made, "theirs"))
    Path(own.out, "videos/theirs/index.jsonl").unlink()
    lines = storage.read_rows(f"{own.out}/scores/theirs/scores.jsonl")
    names = [line["clip_id"].replace(":", "_") for line in lines]
    told = [line | {"file": f"{name}.mp4", "name": name} for line, name in zip(lines, names, strict=True)]
    storage.write_rows(f"{own.out}/scores/theirs/scores.jsonl", told)
    config = own.model_copy(
        update={"score": own.score.model_copy(update={"videos": {"theirs": f"{own.out}/videos/theirs"}})}
    )
    logged = Run(config, "theirs", "evaluate", evaluation(config, read_manifest(f"{own.out}/scores/theirs", "scores")))
    logged.tags({"row": "theirs", "videos": f"{own.out}/videos/theirs", "scores": f"{own.out}/scores/theirs"})
    logged.parameters({"score": {"protocol": "all"}})
    logged.metrics({"motion": 0.1})
    logged.finish()
    text = Path(compare(config).uri, "index.html").read_text()
    clips = text.partition('<table class="clips">')[2].partition("</table>")[0]
    assert clips.count("<video") == 3 * (2 + len(small_study.ROWS))
    assert "theirs is paired by the names of its files; its prompts and seeds are not known." in text
    assert "theirs: nothing is said of how the videos were made." in text
    told = text.partition('<table class="differences">')[2].partition("</table>")[0]
    assert "<tr><th>score.protocol</th>" in told  # which the others do not say
    assert "<tr><th>steps</th>" not in told  # the same in all that say it


def test_what_some_runs_lack_differs_too():
    of = study(arm("one", 1.0), arm("two", 2.0), arm("three", 2.0), arm("four", 2.0))
    for each, told in zip(of.arms.values(), ({"lr": "1"}, {"lr": "1", "clip": "None"}, {"clip": "5"}, {}), strict=True):
        each.runs[0].data.params = {"steps": "5"} | told if each.name != "four" else {"score.fvd": "a"}
    told = _differences(of)
    assert "<th>lr</th><td>1</td><td>1</td><td>-</td><td>-</td>" in told
    assert "<th>clip</th><td>-</td><td>-</td><td>5</td><td>-</td>" in told
    assert "<th>score.fvd</th><td>-</td><td>-</td><td>-</td><td>a</td>" in told
    assert "steps" not in told
    assert "<li>four: nothing is said of how the videos were made.</li>" in told


def test_what_differs_between_the_rows_is_told_and_what_does_not_is_not(studied):
    told = page(studied, read_study(studied)).partition('<table class="differences">')[2].partition("</table>")[0]
    rows = [line.partition("</th>")[0] for line in told.split("<tr><th>")[1:]]
    assert rows == ["parameter", "weights", "M", "start", "conditioning.kind", "conditioning.beta_m", "conditioning.a"]


def test_the_configuration_that_made_the_scores_is_on_the_page_once(studied):
    assert page(studied, read_study(studied)).count("<summary>The whole configuration of") == 1
    other = page(asked(studied, experiment="a small study"), read_study(studied))
    assert other.count("<summary>The whole configuration of") == 2


def test_another_file_in_the_place_of_a_configuration_is_not_shown(own):
    Path(own.out, "scores/naive-11/config.json").write_text('{"a secret": "of somebody"}')
    Path(own.out, "scores/naive-12/config.json").write_text('{"seed": "no number"}')
    Path(own.out, "scores/naive-13/config.json").write_bytes(b"\xff")
    text = _settings(own, read_study(own))
    assert "a secret" not in text
    assert "no number" not in text
    assert text.count("<summary>The whole configuration of") == 2  # the study's and this one


def test_names_of_strangers_do_nothing_in_a_terminal(own):
    client = MlflowClient(store_uri(own))
    theirs = client.create_experiment("theirs", artifact_location=f"file://{own.out}/theirs")
    for name in ("\x1b[2Jgone", "a\u202eb"):
        made = client.create_run(theirs, run_name=name).info.run_id
        client.log_metric(made, "fvd", 1.0)
        client.set_tag(made, "cil.scores", "/nowhere/\x1b[2J")
    found = read_study(asked(own, experiment="theirs"))
    table = markdown(found, tabulate(found), [])
    assert "\\x1b[2Jgone" in table
    assert "a\\u202eb" in table
    assert "\x1b" not in table
    assert "\u202e" not in table


def test_dollar_signs_in_names_are_letters(studied):
    _, svg = next(plots(studied, study(arm("costs 5$ or $6", 1.0, 2.0), arm("$\\frac{$", 2.0, 3.0))))
    assert "costs 5$ or $6" in svg
    assert "$\\frac{$" in svg


def test_a_leakage_curve_of_another_kind_is_left_out(own):
    client, known = MlflowClient(store_uri(own)), ids(own)
    for seed, strange in [
        (11, {"t": ["a"], "motion": [1], "truth": [1]}),
        (12, {"t": [1, 2], "motion": [1, 2, 3], "truth": 1}),
    ]:
        client.log_dict(known[f"naive-{seed}"], strange, "leakage.json")
    of = read_study(own)
    assert leakage_of(own, of)["naive"]["motion"][2] == pytest.approx(of.arms["naive"].values("motion")[13] / 2)


def test_the_loss_is_left_out_where_a_manifest_is_of_another_kind(own):
    of = read_study(own)
    assert len(losses_of(own, of)["timenoise"]) == 3
    for name, text in [("timenoise-11", '{"identity": null}'), ("timenoise-12", '{"identity": {"weights": 5}}')]:
        Path(own.out, "videos", name, "manifest.json").write_text(text)
    assert len(losses_of(own, of)["timenoise"]) == 1


def test_rows_of_published_weights_are_told_apart_by_their_digest(own):
    client = MlflowClient(store_uri(own))
    theirs = client.create_experiment("published", artifact_location=f"file://{own.out}/theirs")
    for seed, digest in [(0, "aaa"), (1, "aaa"), (0, "bbb")]:
        made = client.create_run(
            theirs, run_name="p", tags={"cil.row": "before", "cil.weights": "published"}
        ).info.run_id
        for key, value in {"seed": seed, "weights": digest}.items():
            client.log_param(made, key, value)
        client.log_metric(made, "fvd", 300 + seed)
    found = read_study(asked(own, experiment="published"))
    assert {name: sorted(each.runs) for name, each in found.arms.items()} == {
        "before (digest=aaa)": [0, 1],
        "before (digest=bbb)": [0],
    }


def test_scores_of_single_videos_are_known_by_the_names_of_their_images(own):
    for name in ("naive-11", "timenoise-11"):
        kept = f"{own.out}/scores/{name}/scores.jsonl"
        lines = storage.read_rows(kept)
        storage.write_rows(
            kept, [line | {"name": f"image-{i}", "clip_id": f"{name}-{i}"} for i, line in enumerate(lines)]
        )
    found = read_study(own)
    assert "image-3" in found.arms["naive"].clips(11, "motion")
    assert found.arms["naive"].clips(11, "motion").keys() == found.arms["timenoise"].clips(11, "motion").keys()


def test_the_documented_ways_to_name_runs_work(studied, tmp_path):
    text = Path(__file__).parents[2].joinpath("docs/evaluation.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("    python -m jobs.compare")]
    found = []
    for command in commands:
        given = " ".join(command).replace("http://mlflow:5000", store_uri(studied)).replace("webvid", "a-small-study")
        given = given.replace("940.0", "850.0").replace("[ID,ID]", f"[{ids(studied)['base']},{ids(studied)['real']}]")
        three = ",".join(ids(studied)[name] for name in ("real", "naive-11", "timenoise-11"))
        given = given.replace("[ID,ID,ID]", f"[{three}]")
        overrides = re.split(r" (?=[\w.]+=)", given)
        config = load(None, [each.replace("a-small-study", "a small study") for each in overrides])
        found.append(len(read_study(config).arms))
    assert found == [1 + len(small_study.ROWS), 2, 2, 3]
