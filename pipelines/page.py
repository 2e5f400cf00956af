"""The comparison as one self-contained HTML page: table, verdicts, plots and clips side by side."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from pipelines import artifact, storage
from pipelines.config import Config
from pipelines.generate import REAL
from pipelines.study import CONFIDENCE, METRICS, Arm, Verdict
from pipelines.tracking import runs
from pipelines.weights import KIND as WEIGHTS

TEMPLATE = Path(__file__).with_name("page.html")


def render(config: Config, arms: dict[str, Arm], verdicts: list[Verdict]) -> str:
    seeds = max(len(arm.runs) for arm in arms.values())
    return Template(TEMPLATE.read_text()).substitute(
        title=html.escape(config.tracking.experiment),
        seeds=f"{seeds} seed{'s' if seeds > 1 else ''}",
        confidence=f"{CONFIDENCE:.0%}",
        static=config.score.static_below,
        table=_table(arms),
        verdicts="\n".join(_verdict(v) for v in verdicts) or "<li>No claims were configured.</li>",
        motion=_figure(_plot_rows, arms, "motion"),
        frechet=_figure(_plot_rows, arms, "frechet"),
        distribution=_figure(_plot_distribution, arms),
        loss=_figure(_plot_loss, config),
        clips=_clips(config, arms),
        settings=html.escape(config.model_dump_json(indent=1)),
    )


def _table(arms: dict[str, Arm]) -> str:
    head = "".join(f"<th>{html.escape(label)}</th>" for label in METRICS.values())
    body = ""
    for arm in arms.values():
        cells = "".join(f"<td>{arm.estimate(m) or '-'}</td>" for m in METRICS)
        body += f"<tr><th>{html.escape(arm.name)}</th><td>{len(arm.runs)}</td>{cells}</tr>\n"
    return f"<thead><tr><th>row</th><th>seeds</th>{head}</tr></thead><tbody>{body}</tbody>"


def _verdict(v: Verdict) -> str:
    return f"<li>{html.escape(v.claim.says)}: <b>{v.word}</b> <span>({html.escape(v.figures)})</span></li>"


def _figure(draw: Callable[..., None], *arguments: Any) -> str:
    matplotlib.use("svg")
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cil", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
        draw(axes, *arguments)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
        plt.close(figure)
    return target.getvalue()[target.getvalue().index("<svg") :]


def _plot_rows(axes: Axes, arms: dict[str, Arm], metric: str) -> None:
    """Every seed a dot, the mean with its interval, and the real clips as a line."""
    shown = [arm for arm in arms.values() if arm.name != REAL]
    for place, arm in enumerate(shown):
        values, estimate = list(arm.values(metric).values()), arm.estimate(metric)
        if estimate is None:
            continue
        axes.plot(values, [place] * len(values), "o", color="0.6", markersize=4)
        axes.errorbar(estimate.mean, place, xerr=estimate.half or 0, fmt="D", color="C0", markersize=5, capsize=3)
    if REAL in arms and (real := arms[REAL].estimate(metric)):
        axes.axvline(real.mean, color="C2", linestyle="--", label="real clips")
        axes.legend()
    axes.set_yticks(range(len(shown)), [arm.name for arm in shown])
    axes.invert_yaxis()
    axes.set_xlabel(METRICS[metric])


def _plot_distribution(axes: Axes, arms: dict[str, Arm]) -> None:
    for arm in arms.values():
        motion = np.sort([row["motion"] for seed in arm.runs for row in arm.table(seed)])
        style: dict[str, Any] = {"color": "black", "linewidth": 2} if arm.name == REAL else {}
        axes.plot(motion, (np.arange(len(motion)) + 1) / len(motion), label=arm.name, **style)
    axes.set_xlabel("motion score of a video")
    axes.set_ylabel("share of videos below")
    axes.legend(fontsize=7)


def _plot_loss(axes: Axes, config: Config) -> None:
    """The last loss in each bucket of t, of the training rows: the mean over seeds."""
    rows = config.training_rows()
    fine_tuned = {name: row for name, row in rows.items() if row.settings.weights} or rows
    found = {run.data.tags["cil.fingerprint"]: run for run in runs(config, "train")}
    curves: dict[str, list[list[float]]] = {}
    for name, row in fine_tuned.items():
        weights = storage.join(config.out, "weights", name)
        known_by = artifact.read_manifest(weights, WEIGHTS).fingerprint
        if known_by in found:
            metrics = found[known_by].data.metrics
            curves.setdefault(row.arm, []).append([metrics[key] for key in sorted(metrics) if key.startswith("loss_t")])
    for arm, values in sorted(curves.items()):
        if len({len(v) for v in values}) == 1:
            axes.plot(np.linspace(0, 1, len(values[0])), np.mean(values, axis=0), marker=".", label=arm)
    axes.set_xlabel("diffusion time t")
    axes.set_ylabel("training loss")
    axes.legend(fontsize=7)


def _clips(config: Config, arms: dict[str, Arm]) -> str:
    """The same conditional images in every row; each row's first seed."""
    chosen = [row["clip_id"] for row in arms[REAL].table(0)][: config.compare.clips] if REAL in arms else []
    lines = ""
    for arm in arms.values():
        folder = arm.runs[min(arm.runs)].data.tags["cil.videos"]
        cells = "".join(f"<td>{_video(storage.join(folder, clip.replace(':', '_') + '.mp4'))}</td>" for clip in chosen)
        lines += f"<tr><th>{html.escape(arm.name)}</th>{cells}</tr>\n"
    return lines


def _video(uri: str) -> str:
    if not storage.exists(uri):
        return "no video"
    data = base64.b64encode(storage.read(uri)).decode()
    return f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline></video>'
