"""The comparison's plots, as SVG that takes the page's own colour for its lines and letters."""

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines import storage
from pipelines.config import Config
from pipelines.study import METRICS, Arm, Estimate, Study
from pipelines.tracking import beside, read_file

INK = "#010203"  # becomes the text's colour, in light and in dark
COLOURS = ("#3f83c8", "#d9822b", "#2f9e77", "#c2539a", "#8a70d6", "#b8573f", "#84922e", "#3ba3b3")
STYLE: dict[Any, Any] = {
    **{f"{part}color": INK for part in ("axes.edge", "axes.label", "xtick.", "ytick.", "text.")},
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(linestyle=("-", ":", "--", "-.")) * plt.cycler(color=COLOURS),
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}
SWEPT = {
    "M": "M: where sampling starts",
    "conditioning.beta_m": "beta_m of TimeNoise",
    "conditioning.a": "a of TimeNoise",
}
OVER = ("motion", "frechet", "fvd")  # metrics that are drawn for each row, and over what is swept
LEAKAGE = "leakage.json"
LONGEST = 32  # letters of a row's name


def plots(config: Config, study: Study) -> Iterator[tuple[str, str]]:
    """What each shows in words, and its SVG. What cannot be drawn of these runs is left out."""
    shown = [name for name in OVER if any(arm.values(name) for arm in study.arms.values())]
    for name in shown:
        said = f"{METRICS[name].label}: every seed a dot, the mean with its interval"
        yield said, _figure(said, _plot_rows, study, name, height=1.3 + 0.28 * len(study.arms))
    for parameter, label in SWEPT.items():
        if lines := _lines(study, parameter):
            for name in shown:
                said = f"{METRICS[name].label} over {label}"
                yield said, _figure(said, _plot_curves, study, lines, name, label)
    if any(_motion(arm) for arm in study.arms.values()):
        said = "Distribution of the motion scores of single videos"
        yield said, _figure(said, _plot_distribution, study)
    if leaking := leakage_of(config, study):
        said = "Leakage: motion of the one-step prediction from x_t, against the truth"
        yield said, _figure(said, _plot_leakage, leaking)
    if losses := _losses(config, study):
        said = "Training loss by diffusion time: the last point, the mean of its seeds"
        yield said, _figure(said, _plot_loss, losses)


def _figure(said: str, draw: Callable[..., None], *arguments: Any, height: float = 3.2) -> str:
    matplotlib.use("svg")
    with plt.rc_context({**STYLE, "svg.hashsalt": said}):
        figure, axes = plt.subplots(figsize=(5.2, height), layout="constrained")
        draw(axes, *arguments)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True)
        plt.close(figure)
    svg = target.getvalue()[target.getvalue().index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # it names addresses
    return svg.replace("<svg", '<svg role="img"', 1)


def _interval(estimate: Estimate) -> list[list[float]]:
    """How far its ends are from the mean."""
    low, high = (estimate.mean if end is None else end for end in (estimate.low, estimate.high))
    return [[max(estimate.mean - low, 0)], [max(high - estimate.mean, 0)]]


def _draw_real(study: Study, metric: str, line: Callable[..., Any]) -> None:
    reals = [arm.estimate(metric) for arm in study.arms.values() if arm.is_real]
    if len(reals) == 1 and (real := reals[0]):
        line(real.mean, color=INK, linestyle="--", linewidth=1, label="real clips")


def _legend(axes: Axes) -> None:
    """Inside; of many lines below."""
    handles, labels = axes.get_legend_handles_labels()
    labels, figure = [_short(label) for label in labels], axes.get_figure()
    assert isinstance(figure, Figure)
    if len(handles) > len(COLOURS) + 1:
        figure.set_figheight(figure.get_figheight() + 0.08 * len(handles))
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    elif handles:
        axes.legend(handles, labels)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}"


def _plot_rows(axes: Axes, study: Study, metric: str) -> None:
    arms = [arm for arm in study.arms.values() if not arm.is_real]
    for place, arm in enumerate(arms):
        if estimate := arm.estimate(metric):
            values = list(arm.values(metric).values())
            axes.plot(values, [place] * len(values), "o", color="0.55", markersize=3.5)
            axes.errorbar(estimate.mean, place, xerr=_interval(estimate), fmt="D", color="C0", markersize=5, capsize=3)
    _draw_real(study, metric, axes.axvline)
    _legend(axes)
    axes.set_yticks(range(len(arms)), [_short(arm.name) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(METRICS[metric].label)


def _told(arm: Arm, parameter: str) -> str | None:
    """A parameter of the row by the end of its name: `M` is also `row.M`."""
    names = sorted((name for name in arm.parameters if f".{name}".endswith(f".{parameter}")), key=len)
    return arm.parameters[names[0]] if names else None


def _lines(study: Study, parameter: str) -> dict[str, list[tuple[float, Arm]]]:
    """Rows that differ in this parameter and in nothing else, in its order; none where no two rows do.

    A row that stands alone is a point beside the lines of the same weights.
    """
    found: dict[tuple[tuple[str, str], ...], dict[float, Arm]] = {}
    for arm in study.arms.values():
        value, of_training = _told(arm, parameter), parameter.startswith("conditioning")
        if arm.is_real or value is None or (of_training and _told(arm, "conditioning.kind") not in (None, "timenoise")):
            continue
        own = {k: v for k, v in arm.parameters.items() if k != "weights" and not f".{k}".endswith(f".{parameter}")}
        if not of_training:  # what else the training differs in, its name says
            own = {k: v for k, v in own.items() if not k.startswith(("train.", "conditioning."))} | {
                "weights": arm.weights
            }
        try:
            place = np.inf if value == "None" else float(value)  # sampling from the end of the process
        except ValueError:
            continue
        found.setdefault(tuple(sorted(own.items())), {})[place] = arm
    several = {dict(key).get("weights") for key, points in found.items() if len(points) > 1}
    found = {key: points for key, points in found.items() if dict(key).get("weights") in several}
    keys = [dict(key) for key in found]
    differing = [name for name in sorted(set[str]().union(*keys)) if len({key.get(name) for key in keys}) > 1]
    if any(f".{name}".endswith(".start") for name in differing):  # says more than its digest
        differing = [name for name in differing if name != "initial_noise"]
    return {
        ", ".join(str(key.get(name, "-")) for name in differing): sorted(points.items(), key=lambda point: point[0])
        for key, points in zip(keys, found.values(), strict=True)
    }


def _plot_curves(axes: Axes, study: Study, lines: dict[str, list[tuple[float, Arm]]], metric: str, label: str) -> None:
    values = sorted({value for points in lines.values() for value, _ in points})
    finite = [value for value in values if np.isfinite(value)]
    end = finite[-1] + ((finite[-1] - finite[0]) / (len(finite) - 1) if len(finite) > 1 else max(finite[-1] / 4, 1))
    for name, points in lines.items():
        told = [(value, e) for value, arm in points if (e := arm.estimate(metric))]
        if told:
            places = [value if np.isfinite(value) else end for value, _ in told]
            spread = np.hstack([_interval(estimate) for _, estimate in told])
            axes.errorbar(places, [e.mean for _, e in told], yerr=spread, fmt="o-", markersize=4, capsize=3, label=name)
    _draw_real(study, metric, axes.axhline)
    _legend(axes)
    axes.set_xticks(
        [v if np.isfinite(v) else end for v in values], [f"{v:g}" if np.isfinite(v) else "T" for v in values]
    )
    axes.set_xlabel(label)
    axes.set_ylabel(METRICS[metric].label)


def _motion(arm: Arm) -> list[float]:
    return [scores["motion"] for videos in arm.videos.values() for scores in videos if "motion" in scores]


def _plot_distribution(axes: Axes, study: Study) -> None:
    for arm in study.arms.values():
        if motion := np.sort(_motion(arm)).tolist():
            style: dict[str, Any] = {"color": INK, "linestyle": "--"} if arm.is_real else {}
            axes.plot(motion, (np.arange(len(motion)) + 1) / len(motion), label=arm.name, **style)
    axes.set_xlabel("motion score of a video")
    axes.set_ylabel("share of videos below")
    _legend(axes)


def leakage_of(config: Config, study: Study) -> dict[str, dict[str, list[float]]]:
    """Of each row that has such a curve, the mean over its seeds."""
    found = {}
    for arm in (arm for arm in study.arms.values() if not arm.is_real):
        curves = []
        for run in arm.runs.values():
            try:
                read = json.loads(read_file(config, run, LEAKAGE) or b"")
                curve = (np.asarray(read[key], float) for key in ("t", "motion", "truth"))
                curves.append(np.broadcast_arrays(*curve))
            except (ValueError, KeyError, TypeError):  # there is none, or somebody else means something else by it
                continue
        if same := [curve for curve in curves if np.array_equal(curve[0], curves[0][0])]:
            found[arm.name] = dict(zip(("t", "motion", "truth"), np.mean(same, axis=0).tolist(), strict=True))
    return found


def _plot_leakage(axes: Axes, curves: dict[str, dict[str, list[float]]]) -> None:
    for name, curve in curves.items():
        axes.plot(curve["t"], curve["motion"], marker=".", label=name)
    first = next(iter(curves.values()))
    axes.plot(first["t"], first["truth"], color=INK, linestyle="--", label="truth")
    axes.set_xlabel("diffusion time t")
    axes.set_ylabel("motion score")
    _legend(axes)


def _losses(config: Config, study: Study) -> dict[str, list[dict[float, float]]]:
    """By t, of the trainings whose weights the rows are sampled from: of pre-training only where there is no other."""
    compared = [run for arm in study.arms.values() for run in arm.runs.values()]
    trained = {run.data.tags.get("cil.fingerprint"): run for run in beside(config, compared, "train")}
    used = {}
    for arm in study.arms.values():
        for run in arm.runs.values():
            try:
                made = storage.read_json(storage.join(run.data.tags["cil.videos"], "manifest.json"), storage.TOLD)
                known_by = made["identity"]["weights"].rpartition("-")[0]  # behind it: averaged or raw
                used[known_by] = (arm.weights or arm.name, trained[known_by])
            except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
                continue  # not ours, not here, or the real clips
    fine_tuned = {k: v for k, v in used.items() if v[1].data.params.get("parent") != "random"}
    losses: dict[str, list[dict[float, float]]] = {}
    for name, run in (fine_tuned or used).values():
        buckets = {int(key[6:]) / 1000: v for key, v in run.data.metrics.items() if re.fullmatch(r"loss_t\d+", key)}
        if buckets:
            losses.setdefault(name, []).append(buckets)
    return losses


def _plot_loss(axes: Axes, losses: dict[str, list[dict[float, float]]]) -> None:
    for name, seeds in sorted(losses.items()):
        places = sorted(set.intersection(*(set(buckets) for buckets in seeds)))
        axes.plot(places, [np.mean([buckets[t] for buckets in seeds]) for t in places], marker=".", label=name)
    axes.set_xlabel("diffusion time t (where a tenth of it begins)")
    axes.set_ylabel("training loss")
    _legend(axes)
