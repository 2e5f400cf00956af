"""What evaluate runs say: rows with their seeds, estimates with intervals, and verdicts on claims.

By default the runs are those of the configuration's rows. With `compare.experiment`, `compare.filter` or `compare.runs`
they come from MLflow by themselves, whoever made them, and form rows by what they say of themselves.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import t

from cil.metrics.paired import Paired, paired
from pipelines import artifact, storage
from pipelines.config import ClaimConfig, Config
from pipelines.errors import UserError, shown
from pipelines.generate import REAL
from pipelines.score import KIND as SCORES
from pipelines.score import evaluation
from pipelines.tracking import answering, experiments, refuse_absent, refuse_unreachable, run_of, runs, search

CONFIDENCE = 0.95
EVALUATE = "evaluate"


class Metric(NamedTuple):
    label: str
    better: Literal["higher", "lower", "real"] | None  # real: the nearer to the real row's
    unit: str = ""


# More motion than the data's is no gain, so what counts for motion is how near it is to that of the real clips.
METRICS = {
    "motion": Metric("motion score", "real", "px/frame"),
    "motion_error": Metric("motion error", "lower", "px/frame"),
    "speed": Metric("speed", "real", "px/frame"),
    "static_share": Metric("static share", "real"),
    "first_frame_error": Metric("first-frame error", "lower"),
    "leakage": Metric("leakage", "lower"),
    "frechet": Metric("Frechet distance", "lower"),
    "fvd": Metric("FVD", "lower"),
    "is": Metric("IS", "higher"),
    "motion_off": Metric("off the true clip's motion", "lower", "px/frame"),
    "dynamic_degree": Metric("dynamic degree", "real"),
    "psnr": Metric("PSNR", "higher", "dB"),
    "ssim": Metric("SSIM", "higher"),
    "clip_similarity": Metric("CLIP similarity", "higher"),
    "warp_error": Metric("warp error", "lower"),
    "spectrum_space": Metric("spatial spectrum error", "lower", "dB"),
    "spectrum_time": Metric("temporal spectrum error", "lower", "dB"),
}
OF_VIDEOS = {"dynamic_degree": "dynamic", "motion_off": "motion_lack"}  # what a metric is a mean of, by another name
TRUE = "the true clips"
FRAMES, FLOW, REFERENCE, NET = "score.protocol", "score.raft", "score.reference", "score.feature_net"
MEASURED_BY: dict[str, tuple[str, ...]] = {  # parameters in which runs must agree, or figures are of different things
    **dict.fromkeys(METRICS, (FRAMES,)),
    **dict.fromkeys(("motion", "motion_off", "dynamic_degree"), (FRAMES, TRUE, FLOW)),
    "motion_error": (FRAMES, TRUE, FLOW, REFERENCE),  # which stands for true clips where there are none
    **dict.fromkeys(("spectrum_space", "spectrum_time"), (FRAMES, REFERENCE)),
    "frechet": (FRAMES, REFERENCE, NET),
    "static_share": (FRAMES, TRUE, FLOW, NET, "score.static_below"),
    "speed": (FRAMES, TRUE, NET),
    "warp_error": (FRAMES, FLOW),
    "fvd": (FRAMES, REFERENCE, "score.fvd"),
    "is": (FRAMES, "score.classes"),
    "clip_similarity": (FRAMES, "score.clip"),
    "leakage": (),
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its t-interval; of a single run the interval that was measured with it, if any."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        n, mean = len(values), float(np.mean(values))
        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else None
        return cls(mean, None, None, n) if half is None else cls(mean, mean - half, mean + half, n)

    @property
    def half(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def __format__(self, sign: str) -> str:
        size = abs(self.mean)
        places = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.01 or size == 0 else 5
        if self.half:  # of which at least one digit is told
            places = max(places, min(5, math.ceil(-math.log10(self.half))))
        said = f"{self.mean:{sign}.{places}f}"
        if self.low is None or self.high is None:
            return said
        if self.seeds > 1:
            return f"{said} ± {self.half:.{places}f}"
        return f"{said} [{self.low:.{places}f}, {self.high:.{places}f}]"

    def __str__(self) -> str:
        return format(self)


@dataclass
class Arm:
    """A row of the table: the runs that differ in their seed only."""

    name: str
    runs: dict[int, Any] = field(default_factory=dict)  # seed -> MLflow run
    videos: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # seed -> the scores of its videos
    real: "Arm | None" = None  # the true clips that it is measured against
    yardstick: str = ""  # what they are known by
    is_real: bool = False
    bases: dict[int, str] = field(default_factory=dict)  # seed -> the weights that its training begins from

    @property
    def first(self) -> int:
        return min(self.runs)

    def values(self, metric: str) -> dict[int, float]:
        """One for each seed. NaN and infinity are figures that are missing."""
        found = {seed: run.data.metrics.get(metric, math.nan) for seed, run in sorted(self.runs.items())}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def estimate(self, metric: str) -> Estimate | None:
        values = self.values(metric)
        if len(values) != 1:
            return Estimate.of(list(values.values())) if values else None
        ((seed, value),) = values.items()
        own = [self.runs[seed].data.metrics.get(f"{metric}_{end}") for end in ("low", "high")]
        low, high = own if all(end is not None and math.isfinite(end) for end in own) else (None, None)
        return Estimate(value, low, high, 1)

    def clips(self, seed: int, metric: str) -> dict[str, float]:
        """By conditional image; of several videos of one their mean."""
        found: dict[str, list[float]] = {}
        name = OF_VIDEOS.get(metric, metric)
        for scores in self.videos.get(seed, []):
            if name in scores:
                value = abs(scores[name]) if metric == "motion_off" else scores[name]
                found.setdefault(scores["clip_id"], []).append(value)
        return {clip: float(np.mean(values)) for clip, values in found.items()}

    def measured_by(self, metric: str) -> dict[str, str]:
        """What its figures of this metric depend on beside its videos. `-`: nothing is said."""
        told = self.runs[self.first].data.params | {TRUE: self.yardstick}
        return {name: told.get(name, "-") for name in MEASURED_BY.get(metric, ())}

    @property
    def parameters(self) -> dict[str, str]:
        """Of its runs; `row.M` is left out where there is `M`, and the size of a noise where there is none."""
        own = _own(self.runs[self.first])
        for kind in [key for key, value in own.items() if f".{key}".endswith(".conditioning.kind") and value == "none"]:
            own = {k: v for k, v in own.items() if k == kind or not k.startswith(kind.removesuffix("kind"))}
        return {k: v for k, v in own.items() if not any(k.endswith(f".{o}") and v == own[o] for o in own)}

    @property
    def weights(self) -> str:
        """The row of the training that its weights come from, or their URI."""
        run = self.runs[self.first]
        return _without_seed(run.data.tags.get("cil.weights", ""), *seed_of(run))


@dataclass
class Study:
    name: str
    arms: dict[str, Arm]
    notes: list[str]  # what is missing, in words


@dataclass(frozen=True)
class Verdict:
    claim: ClaimConfig
    differences: dict[int, float]  # one for each seed that both rows have
    bases: dict[int, str] = field(default_factory=dict)  # what these seeds begin from
    untested: str = ""  # why
    videos: Paired | None = None  # of one seed, where fewer than two are common

    @property
    def outcome(self) -> str:
        if self.untested:
            return "not tested"
        if self.videos:
            shown, mean = self.videos.p < 1 - CONFIDENCE, self.videos.mean
        else:
            d = Estimate.of(self._values)
            assert d.half is not None
            shown, mean = abs(d.mean) > d.half, d.mean
        word = ("holds" if self._sign * mean > 0 else "the opposite holds") if shown else "not shown"
        return f"{word}, of one seed" if self.videos else word

    @property
    def contrary(self) -> list[str]:
        """The bases of whose seeds the mean has the other sign than that of all, where the verdict is one."""
        if self.untested or self.videos or self.outcome == "not shown":
            return []
        mean = np.mean(self._values)
        return [base for base, own in self._by_base().items() if np.mean(own) * mean < 0]

    @property
    def word(self) -> str:
        if self.untested:
            return f"not tested ({self.untested})"
        return self.outcome + (f", but not from {' or '.join(self.contrary)}" if self.contrary else "")

    @property
    def p(self) -> float | None:
        """Of the same t-test; none where it is not made."""
        return t_test(self._values) if len(self.differences) > 1 and not self.untested else None

    @property
    def figures(self) -> str:
        label = METRICS[self.claim.metric].label
        if self.videos:
            v = self.videos
            return f"{label} {Estimate(v.mean, v.low, v.high, 1):+}, {v.pairs} videos, p {_written(v.p)}"
        if not self.differences:
            return "no figures"
        seeds = f"{self._agreeing(self._values)} seed{'s' if len(self.differences) > 1 else ''}"
        if len(by_base := self._by_base()) > 1:
            seeds += f" ({', '.join(f'{base}: {self._agreeing(own)}' for base, own in by_base.items())})"
        difference = Estimate.of(self._values)
        return f"{label} {difference:+}, {seeds}" + (f", p {_written(self.p)}" if self.p is not None else "")

    @property
    def _values(self) -> list[float]:
        return list(self.differences.values())

    def _by_base(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for seed, difference in self.differences.items():
            found.setdefault(self.bases.get(seed, "unknown"), []).append(difference)
        return dict(sorted(found.items()))

    def _agreeing(self, differences: list[float]) -> str:
        return f"{sum(self._sign * d > 0 for d in differences)} of {len(differences)}"

    @property
    def _sign(self) -> int:
        return 1 if self.claim.expected == "higher" else -1


def _written(p: float) -> str:
    return "below 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def t_test(differences: list[float]) -> float:
    """p of a mean of paired differences as far from 0 as theirs."""
    mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if spread == 0:
        return 0.0 if mean else 1.0
    return float(2 * t.sf(abs(mean) / spread * len(differences) ** 0.5, len(differences) - 1))


def holm(values: list[float], tests: int) -> list[float]:
    """p-values corrected for the number of tests, of which only these are told: the others as if they found nothing."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable")):
        highest = max(highest, min(1.0, (tests - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def put_to_the_test(claim: ClaimConfig, arms: dict[str, Arm]) -> Verdict:
    """Seed by seed, or where fewer than two are common video by video. The real row is the same for every seed."""
    metric, label = claim.metric, METRICS[claim.metric].label
    named = (claim.row, claim.against)
    if absent := [name for name in named if name not in arms]:
        return Verdict(claim, {}, untested=f"there are no runs of {' and '.join(absent)}")
    ours, theirs = (arms[name] for name in named)
    if lacking := [arm.name for arm in (ours, theirs) if not arm.values(metric)]:
        return Verdict(claim, {}, untested=f"no run of {' or '.join(lacking)} has the {label}")
    if unlike := differing([ours, theirs], metric):
        return Verdict(claim, {}, untested=f"they differ in {' and '.join(unlike)}")
    a, b = ours.values(metric), theirs.values(metric)
    if claim.row == REAL:
        a = dict.fromkeys(b, next(iter(a.values())))
    elif claim.against == REAL:
        b = dict.fromkeys(a, next(iter(b.values())))
    found = {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}
    bases = {seed: base for arm in (theirs, ours) for seed, base in arm.bases.items() if seed in found}
    if len(found) > 1:
        return Verdict(claim, found, bases)
    seed = f"{len(found)} common seed{'' if len(found) == 1 else 's'}"
    columns = one_of_each(ours, theirs, metric)
    try:
        return Verdict(claim, found, bases, videos=paired(columns[0], columns[1]))
    except ValueError:  # fewer than two videos in common
        return Verdict(claim, found, bases, untested=seed)


def differing(arms: list[Arm], metric: str) -> list[str]:
    """What their figures are measured by, where it is not the same."""
    told = [arm.measured_by(metric) for arm in arms]
    return [name for name in MEASURED_BY.get(metric, ()) if len({each[name] for each in told}) > 1]


def one_of_each(ours: Arm, theirs: Arm, metric: str) -> list[dict[str, float]]:
    """Scores of single videos, by image: of the first common seed, or of the first of each."""
    common = ours.runs.keys() & theirs.runs.keys()
    return [arm.clips(min(common) if common else arm.first, metric) for arm in (ours, theirs)]


def read_study(config: Config) -> Study:
    refuse_absent(config)
    refuse_unreachable(config)
    with answering(config):
        study = _of_runs(config) if config.compare.of_runs else _of_configuration(config)
    for arm in study.arms.values():
        for seed, run in sorted(arm.runs.items()):
            arm.videos[seed] = _videos(run, study.notes)
    if len(study.arms) == 1:
        study.notes.append(f"There is one row, {min(study.arms)}: nothing to compare it with.")
    for note in study.notes:
        print(f"comparison: {shown(note)}")
    return study


def _of_configuration(config: Config) -> Study:
    """The rows of the configuration that are scored: of each the evaluate run that its scores' manifest leads to."""
    found = {run.data.tags["cil.fingerprint"]: run for run in runs(config, EVALUATE)}
    wanted, trained = config.evaluation_rows(), config.training_rows()
    rows = {REAL: (REAL, 0)} | {name: (row.arm, row.seed) for name, row in wanted.items()}
    rows |= {name: (name, 0) for name in config.score.videos}
    study = Study(config.tracking.experiment, {}, [])
    for name, (arm, seed) in rows.items():
        folder = storage.join(config.out, "scores", name)
        if storage.exists(storage.join(folder, "manifest.json")):
            known_by = evaluation(config, artifact.read_manifest(folder, SCORES))
            if known_by in found:
                made = study.arms.setdefault(arm, Arm(arm, is_real=arm == REAL))
                made.runs[seed] = found[known_by]
                if name in wanted and (weights := trained.get(wanted[name].weights)) and weights.settings.weights:
                    made.bases[seed] = weights.settings.weights
                continue
        if config.score.videos and not storage.exists(storage.join(config.out, "videos", name)):
            continue  # sets made elsewhere, and no study beside them
        study.notes.append(f"{name}: has no scores in the study {study.name}; it is left out.")
    if not study.arms:
        raise UserError(f"the study {study.name} has no scored rows: run jobs.score first")
    for each in study.arms.values():
        each.real = study.arms.get(REAL)
    return study


def _of_runs(config: Config) -> Study:
    """A row is what differs in its seed only, and is measured against the same true clips."""
    wanted, notes = config.compare, list[str]()
    if wanted.runs:
        found = [run for run in (run_of(config, known_by, notes) for known_by in wanted.runs) if run]
        of = experiments(config, found)
        name = of[0] if len(of) == 1 else config.tracking.experiment
        if len(of) > 1:
            notes.append(f"The runs are of several experiments, {', '.join(of)}; this comparison stands in {name}.")
    else:
        name = wanted.experiment or config.tracking.experiment
        found = search(config, name, wanted.filter or "")
    rows: dict[tuple[str, ...], Arm] = {}
    for run in sorted(found, key=lambda r: (r.info.start_time, r.info.run_id)):
        stage, told = run.data.tags.get("cil.stage", EVALUATE), f"{run.info.run_name} ({run.info.run_id})"
        if stage != EVALUATE or not run.data.metrics:
            if wanted.runs or stage == EVALUATE:
                why = f"is a run of the stage {stage}" if stage != EVALUATE else "has no metrics"
                notes.append(f"{told} {why}; it is left out.")
            continue
        key, seed = seed_of(run)
        row = shown(_without_seed(run.data.tags.get("cil.row", run.info.run_name), key, seed))
        # What nobody has named a row is known by its parameters, if a seed is among them.
        called = row if "cil.row" in run.data.tags or key is None else ""
        own = sorted(f"{k}={v}" for k, v in _own(run).items())
        arm = rows.setdefault((called, _yardstick(run), *own), Arm(row, is_real=called == REAL))
        if seed in arm.runs:
            older = arm.runs[seed]
            notes.append(f"{told} says the same of itself as {older.info.run_id}; the newer one is taken.")
        arm.runs[seed] = run
    if not rows:
        asked = ", ".join(f"compare.{k}={v}" for k, v in wanted.model_dump(include=set(FROM_RUNS)).items() if v)
        found_instead = " ".join(notes) or "no evaluate run with metrics is there."
        raise UserError(f"{asked}: {found_instead} Run jobs.score, or widen what is asked for")
    reals = [(key, arm) for key, arm in rows.items() if arm.is_real]
    for (_, yardstick, *own), arm in rows.items():  # of several real rows the one that is measured as it is, if any
        near = [(len({*own} & {*others}), real) for (_, stick, *others), real in reals if stick == yardstick]
        arm.real, arm.yardstick = max(near, key=lambda each: each[0], default=(0, None))[1], yardstick
    if len({yardstick for _, yardstick, *_ in rows}) > 1:
        notes.append("Not all rows are known to be measured against the same true clips: compare within a study.")
    ordered = sorted(rows.values(), key=lambda arm: not arm.is_real)
    return Study(name, _named_apart(ordered), notes)


FROM_RUNS = ("experiment", "filter", "runs")


def _named_apart(arms: list[Arm]) -> dict[str, Arm]:
    """Those of one name say what differs between them."""
    named: dict[str, Arm] = {}
    for arm in arms:
        twins = [a.parameters for a in arms if a.name == arm.name]
        differing = {k: v for k, v in arm.parameters.items() if len({twin.get(k) for twin in twins}) > 1}
        told = ", ".join(f"{key.rpartition('.')[2]}={shown(value)}" for key, value in differing.items())
        name = f"{arm.name} ({told})" if told else arm.name
        same = sum(other == name or other.startswith(f"{name} #") for other in named)
        named[f"{name} #{same + 1}" if same else name] = arm
    for name, arm in named.items():
        arm.name = name
    return named


def seed_of(run: Any) -> tuple[str | None, int]:
    """The parameter that is its seed, and the seed: of the training, or where that says none the sampling's."""
    keys = sorted((k for k in run.data.params if k.rpartition(".")[2] == "seed"), key=lambda k: (k != "train.seed", k))
    for key in keys:
        if re.fullmatch(r"\d{1,18}", run.data.params[key]):
            return key, int(run.data.params[key])
    return None, 0


def _own(run: Any) -> dict[str, str]:
    """Its parameters but for the seed, and for the fingerprint of its weights, which differs with that."""
    key, seed = seed_of(run)
    own = {k: v for k, v in run.data.params.items() if k not in (key, "weights")}
    weights = run.data.tags.get("cil.weights", run.data.params.get("weights"))
    if weights is None:
        return own
    told = {"weights": _without_seed(weights, key, seed)}
    if "train.seed" not in run.data.params and "weights" in run.data.params:  # one name for many: published
        told["weights.digest"] = run.data.params["weights"]
    return told | own


def _without_seed(name: str, key: str | None, seed: int) -> str:
    return name if key is None else re.sub(rf".(-|[-_ ]seed[-_= ]?){seed}$", lambda found: found[0][0], name)


def _yardstick(run: Any) -> str:
    """What stands for the true clips that its scores are measured against."""
    try:
        manifest = storage.read_json(storage.join(run.data.tags["cil.scores"], "manifest.json"), storage.TOLD)
        return str(manifest["identity"]["real"])
    except (OSError, ValueError, ImportError, KeyError, TypeError):  # it is not ours, or is not here
        return str(run.info.experiment_id)


def _videos(run: Any, notes: list[str]) -> list[dict[str, Any]]:
    """The scores of every video, where they can be read."""
    lacks = "it has no distribution, and is not compared video by video"
    folder = run.data.tags.get("cil.scores")
    if folder is None:
        notes.append(f"{run.info.run_name}: names no scores of single videos; {lacks}.")
        return []
    try:
        lines = storage.read_rows(storage.join(folder, "scores.jsonl"), storage.TOLD)
        kept = [{k: v for k, v in line.items() if isinstance(v, int | float)} for line in lines]  # not its features
        return [
            scores | {"clip_id": line.get("name", line["clip_id"])} for scores, line in zip(kept, lines, strict=True)
        ]
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"{run.info.run_name}: {folder}/scores.jsonl cannot be read ({type(error).__name__}); {lacks}.")
        return []
