"""The comparison of a study's evaluate runs: a table with intervals, claims put to the test, and one page to look at.

Seeds are paired: the seed s of one row saw the same clips in the same order, with the same noise, as the seed s of
another. So claims are tested on the differences, seed by seed.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.config import ClaimConfig, Config
from pipelines.errors import UserError
from pipelines.generate import REAL
from pipelines.tracking import Run, runs

KIND = "comparison"
CONFIDENCE = 0.95
METRICS = {
    "motion": "motion score",
    "motion_error": "motion error",
    "speed": "speed px/frame",
    "static_share": "static share",
    "first_frame_error": "first-frame error",
    "frechet": "Frechet distance",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its t-interval (None for a single seed)."""

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        from scipy.stats import t

        n = len(values)
        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else None
        return cls(float(np.mean(values)), half, n)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half:.3f}" if self.half is not None else "")


@dataclass
class Arm:
    """A row of the table: the runs that differ in their seed only."""

    name: str
    runs: dict[int, Any] = field(default_factory=dict)  # seed -> MLflow run

    def values(self, metric: str) -> dict[int, float]:
        return {seed: run.data.metrics[metric] for seed, run in sorted(self.runs.items()) if metric in run.data.metrics}

    def estimate(self, metric: str) -> Estimate | None:
        values = list(self.values(metric).values())
        return Estimate.of(values) if values else None

    def table(self, seed: int) -> list[dict[str, Any]]:
        """The scores of every video."""
        return storage.read_rows(storage.join(self.runs[seed].data.tags["cil.scores"], "scores.jsonl"))


@dataclass(frozen=True)
class Verdict:
    claim: ClaimConfig
    difference: Estimate
    agree: int  # seeds in which the difference has the expected sign

    @property
    def word(self) -> str:
        d = self.difference
        if d.half is None:
            return "not tested (one seed)"
        towards = d.mean if self.claim.expected == "higher" else -d.mean
        if abs(d.mean) > d.half:
            return "holds" if towards > 0 else "the opposite holds"
        return "not shown"


def compare(config: Config) -> Manifest:
    from pipelines.page import render

    arms = read_arms(config)
    verdicts = [verdict for claim in config.compare.claims if (verdict := put_to_the_test(claim, arms))]
    fingerprints = {a.name: {s: r.data.tags["cil.fingerprint"] for s, r in a.runs.items()} for a in arms.values()}
    identity = {
        "runs": fingerprints,
        "compare": config.compare.model_dump(),
        "code": artifact.code("pipelines.compare", "pipelines.page"),
    }
    name = artifact.fingerprint(identity)
    made = Artifact(storage.join(config.out, "comparison", name), KIND, identity)
    table = markdown(arms, verdicts)
    if not made.finished:
        made.begin()
        page = render(config, arms, verdicts)
        storage.write(made.path("table.md"), table.encode())
        storage.write(made.path("index.html"), page.encode())
        run = Run(config, "comparison", "compare", name)
        run.text("comparison.html", page)
        run.text("table.md", table)
        run.finish()
        made.finish({"rows": len(arms)})
    print(f"\n{table}\nThe page: {made.path('index.html')}")
    return made.manifest()


def read_arms(config: Config) -> dict[str, Arm]:
    """Of the rows in the configuration, the newest finished evaluate run of each."""
    found: dict[str, Any] = {}
    for run in runs(config, "evaluate"):
        if run.info.status == "FINISHED":
            found.setdefault(run.data.tags["cil.row"], run)
    arms: dict[str, Arm] = {}
    rows = {REAL: (REAL, 0)} | {name: (row.arm, row.seed) for name, row in config.evaluation_rows().items()}
    for name, (arm, seed) in rows.items():
        if name in found:
            arms.setdefault(arm, Arm(arm)).runs[seed] = found[name]
        else:
            print(f"{KIND}: row {name} has no finished evaluate run in {config.tracking.experiment}; it is left out")
    if len(arms) < 2:
        raise UserError(f"the study {config.tracking.experiment} has {len(arms)} scored rows: run jobs.score first")
    return arms


def put_to_the_test(claim: ClaimConfig, arms: dict[str, Arm]) -> Verdict | None:
    if claim.row not in arms or claim.against not in arms:
        return None
    ours, theirs = arms[claim.row].values(claim.metric), arms[claim.against].values(claim.metric)
    if claim.against == REAL:  # the same for every seed
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[s] - theirs[s] for s in seeds]
    sign = 1 if claim.expected == "higher" else -1
    return Verdict(claim, Estimate.of(differences), sum(sign * d > 0 for d in differences))


def markdown(arms: dict[str, Arm], verdicts: list[Verdict]) -> str:
    """For the terminal, and for wherever Markdown goes."""
    rows = [["row", "seeds", *METRICS.values()]]
    for arm in arms.values():
        rows.append([arm.name, str(len(arm.runs)), *(str(arm.estimate(m) or "-") for m in METRICS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    lines += ["", f"Means over seeds, ± half of a {CONFIDENCE:.0%} t-interval.", ""]
    for v in verdicts:
        figures = f"{METRICS[v.claim.metric]} {v.difference.mean:+.3f}"
        half = f" ± {v.difference.half:.3f}" if v.difference.half is not None else ""
        lines.append(f"- {v.claim.says}: **{v.word}** ({figures}{half}, {v.agree} of {v.difference.seeds} seeds)")
    return "\n".join(lines) + "\n"
