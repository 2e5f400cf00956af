"""What the evaluate runs of a study say: rows with their seeds, estimates with intervals, and verdicts on claims."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import t

from pipelines import artifact, storage
from pipelines.config import ClaimConfig, Config
from pipelines.errors import UserError
from pipelines.generate import REAL
from pipelines.score import KIND as SCORES
from pipelines.score import evaluation
from pipelines.tracking import runs

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
        n = len(values)
        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else None
        return cls(float(np.mean(values)), half, n)

    def __format__(self, sign: str) -> str:
        return f"{self.mean:{sign}.3f}" + (f" ± {self.half:.3f}" if self.half is not None else "")

    def __str__(self) -> str:
        return format(self)


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
    differences: list[float]  # one for each seed that both rows have

    @property
    def word(self) -> str:
        if len(self.differences) < 2:
            return f"not tested ({len(self.differences)} common seeds)"
        d = Estimate.of(self.differences)
        assert d.half is not None
        if abs(d.mean) <= d.half:
            return "not shown"
        return "holds" if self._sign * d.mean > 0 else "the opposite holds"

    @property
    def figures(self) -> str:
        if not self.differences:
            return "no figures"
        agree = sum(self._sign * d > 0 for d in self.differences)
        difference = Estimate.of(self.differences)
        return f"{METRICS[self.claim.metric]} {difference:+}, {agree} of {len(self.differences)} seeds"

    @property
    def _sign(self) -> int:
        return 1 if self.claim.expected == "higher" else -1


def read_arms(config: Config) -> dict[str, Arm]:
    """The rows of the configuration that are scored: of each the evaluate run that its scores' manifest leads to."""
    found = {run.data.tags["cil.fingerprint"]: run for run in runs(config, "evaluate")}
    rows = {REAL: (REAL, 0)} | {name: (row.arm, row.seed) for name, row in config.evaluation_rows().items()}
    arms: dict[str, Arm] = {}
    for name, (arm, seed) in rows.items():
        folder = storage.join(config.out, "scores", name)
        if storage.exists(storage.join(folder, "manifest.json")):
            known_by = evaluation(config, artifact.read_manifest(folder, SCORES))
            if known_by in found:
                arms.setdefault(arm, Arm(arm)).runs[seed] = found[known_by]
                continue
        print(f"comparison: row {name} has no scores in the study {config.tracking.experiment}; it is left out")
    if len(arms) < 2:
        raise UserError(f"the study {config.tracking.experiment} has {len(arms)} scored rows: run jobs.score first")
    return arms
