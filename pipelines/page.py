"""The comparison as one self-contained HTML page: verdicts, table, clips side by side, plots, and what differs."""

import base64
import html
from pathlib import Path
from string import Template

from pipelines import storage
from pipelines.config import Config
from pipelines.plots import plots
from pipelines.side_by_side import SideBySide, side_by_side
from pipelines.study import CONFIDENCE, Study, Verdict, holm
from pipelines.table import SIGNS, Cell, Column, holes, legend

TEMPLATE = Path(__file__).with_name("page.html")
LONG = 36  # letters of a name that takes several lines
ENOUGH = 10  # seeds; with fewer, a comparison is indicative
KINDS = {"holds": "yes", "the opposite holds": "no"}
COUNTED = {
    "holds": "hold",
    "the opposite holds": "hold the other way round",
    "not shown": "not shown",
    "holds, of one seed": "hold of one seed",
    "the opposite holds, of one seed": "hold the other way round of one seed",
    "not shown, of one seed": "not shown of one seed",
    "not tested": "not tested",
}


def render(config: Config, study: Study, columns: list[Column], verdicts: list[Verdict]) -> str:
    missing, shown = [*study.notes, *holes(study, columns)], side_by_side(config, study)
    return Template(TEMPLATE.read_text()).substitute(
        title=html.escape(study.name),
        status=html.escape(_status(study, verdicts)),
        note=f"<p>{html.escape(config.compare.note)}</p>" if config.compare.note else "",
        summary=html.escape(_summary(verdicts)),
        verdicts=_verdicts(verdicts),
        table=_table(study, columns),
        legend=html.escape(" ".join(legend(columns))),
        missing=_missing(missing),
        about=_about(shown),
        clips=_clips(shown),
        holes=_list(shown.notes),
        plots="\n".join(
            f"<figure>{svg}<figcaption>{html.escape(said[0].upper() + said[1:])}</figcaption></figure>"
            for said, svg in plots(config, study)
        ),
        differences=_differences(study),
        settings=_settings(config, study),
    )


def _status(study: Study, verdicts: list[Verdict]) -> str:
    """What is tested on the fewest seeds decides; without a test, the two rows that have the most."""
    tested = [max(len(v.differences), 1) for v in verdicts if v.outcome != "not tested"]
    seeds = min(tested or sorted(len(arm.runs) for arm in study.arms.values())[-2:])
    bases = sorted({base for arm in study.arms.values() for base in arm.bases.values()})
    begun = f" They begin from {len(bases)} bases, {', '.join(bases)}." if len(bases) > 1 else ""
    if seeds >= ENOUGH:
        return f"{len(study.arms)} rows, compared on {seeds} seeds or more.{begun}"
    return (
        f"Indicative: {seeds} seed{'' if seeds == 1 else 's'} at the fewest. With fewer than {ENOUGH}, how other seeds "
        f"would come out is known poorly, and a difference that is not shown may still be there.{begun}"
    )


def _summary(verdicts: list[Verdict]) -> str:
    """The verdicts in a sentence, and what is left of them when their number is allowed for."""
    if not verdicts:
        return "No claims were written down before these runs were measured, so none is put to the test."
    words = [v.outcome for v in verdicts]
    said = [f"{words.count(word)} {told}" for word, told in COUNTED.items() if word in words]
    partly = sum(bool(v.contrary) for v in verdicts)
    but = f" {partly} of these not from every base." if partly else ""
    tested = [v.p for v in verdicts if v.p is not None]
    shown = sum(p < 1 - CONFIDENCE for p in holm(tested, len(tested)))
    alone = sum(word in KINDS for word in words)
    left = f"{shown} of these {alone}" if alone > 1 else f"{shown} of this one"
    corrected = f" Tested one by one; with Holm's correction for {len(tested)} tests, {left} would be left."
    claims = f"{len(verdicts)} claim{'s' if len(verdicts) > 1 else ''}"
    return f"{claims}: {', '.join(said)}.{but}" + (corrected if alone else "")


def _verdicts(verdicts: list[Verdict]) -> str:
    if not verdicts:
        return ""
    rule = (
        f"A claim holds where the {CONFIDENCE:.0%} t-interval of the differences, paired by seed, does not contain 0."
    )
    if any(v.videos for v in verdicts):
        rule += (
            " Where fewer than two seeds are common, videos of one seed are compared by sign flips; this says nothing "
            "of other seeds."
        )
    lines = "\n".join(map(_verdict, verdicts))
    return f'<ul class="verdicts">\n{lines}\n</ul>\n<p class="quiet">{rule}</p>'


def _verdict(v: Verdict) -> str:
    kind = "open" if v.contrary else KINDS.get(v.outcome, "open")
    says = f"{html.escape(v.claim.says)}: <b>{html.escape(v.word)}</b> <span>({html.escape(v.figures)})</span>"
    return f'<li class="{kind}">{says}</li>'


def _table(study: Study, columns: list[Column]) -> str:
    labels = ["row", "seeds", *("\u00a0".join(column.label.rsplit(" ", 1)) for column in columns)]  # no arrow alone
    head = "".join(f'<th><button type="button">{html.escape(label)}</button></th>' for label in labels)
    body = ""
    for place, arm in enumerate(study.arms.values()):
        cells = "".join(_cell(column.cells[arm.name]) for column in columns)
        kind = ' class="real"' if arm.is_real else ""
        seeds = len(arm.runs)
        name = _head(arm.name, f' data-value="{place}"')
        body += f'<tr{kind}>{name}<td data-value="{seeds}">{seeds}</td>{cells}</tr>\n'
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def _head(name: str, more: str = "") -> str:
    kind = ' class="long"' if len(name) > LONG else ""
    return f"<th{kind}{more}>{html.escape(name)}</th>"


def _cell(cell: Cell) -> str:
    value = "" if cell.estimate is None else repr(cell.estimate.mean)
    told = f' title="p {cell.p:.3g} against the best, corrected"' if cell.p is not None else ""
    shown = "-" if cell.estimate is None else str(cell.estimate)
    kind = f' class="{cell.mark}"' if cell.mark else ""
    return f'<td data-value="{value}"{kind}{told}>{shown}<i>{SIGNS[cell.mark].strip()}</i></td>'


def _missing(notes: list[str]) -> str:
    if not notes:
        return ""
    lines = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<details class="missing" open><summary>What is missing ({len(notes)})</summary><ul>{lines}</ul></details>'


def _about(shown: SideBySide) -> str:
    if not shown.prompts:
        return ""
    seed = f" Trainings are those of seed {shown.seed}." if shown.seed is not None else ""
    return f"In each column the same image, prompt and seed.{seed}"


def _clips(shown: SideBySide) -> str:
    if not shown.prompts:
        return ""
    head = "".join(f'<th class="prompt">{html.escape(prompt)}</th>' for prompt in shown.prompts)
    lines = f"<thead><tr><th></th>{head}</tr></thead><tbody>\n"
    for name, clips in shown.rows.items():
        cells = "".join(f"<td>{_video(clip)}</td>" for clip in clips)
        lines += f"<tr>{_head(name)}{cells}</tr>\n"
    region = '<div class="wide" tabindex="0" role="region" aria-label="Clips">'
    return f'{region}<table class="clips">\n{lines}</tbody></table></div>'


def _video(clip: bytes | None) -> str:
    if clip is None:
        return "-"
    data = base64.b64encode(clip).decode()
    return f'<video src="data:video/mp4;base64,{data}" loop muted playsinline></video>'


def _list(notes: list[str]) -> str:
    lines = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes if note)
    return f'<ul class="quiet">{lines}</ul>' if lines else ""


def _differences(study: Study) -> str:
    """Parameter x row, of what is not the same everywhere. Sets made elsewhere say nothing of how they were made."""
    arms = [arm for arm in study.arms.values() if not arm.is_real]
    told = {arm.name: ({"weights": arm.weights} if arm.weights else {}) | arm.parameters for arm in arms}
    silent = [name for name, own in told.items() if all(key.startswith("score.") for key in own)]
    lines = ""
    for name in dict.fromkeys(name for own in told.values() for name in own):
        asked = [arm.name for arm in arms if arm.name not in silent or name.startswith("score.")]
        if len({_given(told[arm].get(name)) for arm in asked}) > 1:
            cells = "".join(f"<td>{html.escape(_given(own.get(name)))}</td>" for own in told.values())
            lines += f"<tr>{_head(name)}{cells}</tr>\n"
    of_silent = f"{', '.join(silent)}: nothing is said of how the videos were made." if silent else ""
    if not lines:
        return f"<p>Nothing that the runs say of themselves differs between the rows.</p>\n{_list([of_silent])}"
    head = "".join(map(_head, told))
    table = f"<thead><tr><th>parameter</th>{head}</tr></thead><tbody>{lines}</tbody>"
    region = '<div class="wide" tabindex="0" role="region" aria-label="What differs">'
    return f'{region}<table class="differences">{table}</table></div>\n{_list([of_silent])}'


def _given(value: str | None) -> str:
    return "-" if value in (None, "", "None") else str(value)


def _settings(config: Config, study: Study) -> str:
    """The configurations that the scores were made with, as they stand beside them; each once."""
    found: dict[str, list[str]] = {}
    for arm in study.arms.values():
        for run in arm.runs.values():
            try:
                text = storage.read(storage.join(run.data.tags["cil.scores"], "config.json"), storage.TOLD).decode()
                told = Config.model_validate_json(text)  # another file of that name may hold anything
                found.setdefault(told.model_dump_json(indent=1), []).append(arm.name)
            except (OSError, ValueError, ImportError, KeyError):
                continue
    found.setdefault(config.model_dump_json(indent=1), []).append("this comparison")
    return "\n".join(
        f"<details><summary>The whole configuration of {html.escape(', '.join(dict.fromkeys(names)))}</summary>"
        f'<pre tabindex="0">{html.escape(text)}</pre></details>'
        for text, names in found.items()
    )
