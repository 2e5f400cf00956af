"""What jobs tell Ray while they run; every node's metrics port tells it on to Prometheus (docs/clusters.md).

    curl -s http://127.0.0.1:8080/metrics | grep ray_cil_     # of a node started with --metrics-export-port=8080

Prometheus puts `ray_` before a name and, of a counter, `_total` behind it. A process without Ray tells nothing.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    kind: Literal["Counter", "Gauge", "Histogram"]
    name: str
    about: str
    label: str  # its one label
    bounds: tuple[float, ...] = ()

    def __call__(self, value: float, of: str) -> None:
        """A counter rises by `value`, a gauge becomes it, a histogram has one more of it. `of`: the label's value."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized() or (self.kind == "Counter" and not value):
            return
        tell = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}[self.kind]
        getattr(self._of_ray, tell)(value, {self.label: of})

    @cached_property
    def _of_ray(self) -> Any:
        from ray.util import metrics

        bounds = {"boundaries": [*self.bounds]} if self.bounds else {}
        return getattr(metrics, self.kind)(self.name, self.about, tag_keys=(self.label,), **bounds)


# By these names the makers of parts tell them too.
COUNTED = {
    told: Metric("Counter", f"cil_{told}", about, "stage")
    for told, about in {
        "videos": "videos decoded for a cache, generated or scored, those that were rejected too",
        "clips": "clips put into a cache",
        "rejected_videos": "videos that gave nothing; the artifact's rejects have the reasons",
        "bytes": "bytes of the clips put into a cache",
    }.items()
}
PROGRESS = Metric("Gauge", "cil_progress", "share of what a job has to do that is done", "job")
BUSY = Metric(
    "Gauge", "cil_busy", "share of their time that the workers of a build decode, and that they encode", "work"
)
LOSS = Metric("Gauge", "cil_loss", "mean loss since the last point of the curve", "row")
SAMPLES_PER_SECOND = Metric("Gauge", "cil_samples_per_second", "clips trained on a second, by all workers", "row")
DATA_WAIT = Metric("Gauge", "cil_data_wait", "share of its time that the first worker waits for clips", "row")
# A histogram's sum is no measure in Ray: it takes each bucket's middle.
STEP_SECONDS = Metric(
    *("Histogram", "cil_step_seconds", "seconds of a training step, of the first worker", "row"),
    bounds=tuple(float(f"{digit}e{exponent}") for exponent in range(-2, 3) for digit in (1, 2, 5)),
)
CHECKPOINT_SECONDS = Metric(
    *("Gauge", "cil_checkpoint_seconds", "seconds that training stood still for the last checkpoint", "row")
)
METRICS = (
    *(*COUNTED.values(), PROGRESS, BUSY),
    *(LOSS, SAMPLES_PER_SECOND, DATA_WAIT, STEP_SECONDS, CHECKPOINT_SECONDS),
)


def count(stage: str, told: Mapping[str, float]) -> None:
    """What the maker of a part has told of it."""
    for name, metric in COUNTED.items():
        metric(told.get(name, 0), stage)
