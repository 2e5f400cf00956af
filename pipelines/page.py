"""The comparison as one self-contained HTML page: verdicts, table, clips side by side, plots, and what differs."""

import base64
import html
import posixpath
from pathlib import Path
from string import Template

from pipelines import storage
from pipelines.config import Config
from pipelines.generate import REAL
from pipelines.plots import plots
from pipelines.study import CONFIDENCE, Arm, Study, Verdict, holm
from pipelines.table import SIGNS, Cell, Column, holes, legend

TEMPLATE = Path(__file__).with_name("page.html")
ENOUGH = 10  # seeds; with fewer, a comparison is indicative
KINDS = {"holds": "yes", "the opposite holds": "no"}
COUNTED = {
    "holds": "hold",
    "the opposite holds": "hold the other way round",
    "not shown": "not shown",
    "not tested": "not tested",
}


def render(config: Config, study: Study, columns: list[Column], verdicts: list[Verdict]) -> str:
    missing = [*study.notes, *holes(study, columns)]
    return Template(TEMPLATE.read_text()).substitute(
        title=html.escape(study.name),
        status=html.escape(_status(study)),
        note=f"<p>{html.escape(config.compare.note)}</p>" if config.compare.note else "",
        summary=html.escape(_summary(verdicts)),
        verdicts=_verdicts(verdicts),
        table=_table(study, columns),
        legend=html.escape(" ".join(legend(columns))),
        missing=_missing(missing),
        clips=_clips(config, study),
        plots="\n".join(
            f"<figure>{svg}<figcaption>{html.escape(said[0].upper() + said[1:])}</figcaption></figure>"
            for said, svg in plots(config, study)
        ),
        differences=_differences(study),
        settings=_settings(config, study),
    )


def _status(study: Study) -> str:
    seeds = max(len(arm.runs) for arm in study.arms.values())
    counted = f"{seeds} seed{'s' if seeds > 1 else ''}"
    if seeds >= ENOUGH:
        return f"{len(study.arms)} rows, of up to {counted}."
    return (
        f"Indicative: {counted} of each row at the most. With fewer than {ENOUGH}, how other seeds would come out "
        "is known poorly, and a difference that is not shown may still be there."
    )


def _summary(verdicts: list[Verdict]) -> str:
    """The verdicts in a sentence, and what is left of them when their number is allowed for."""
    if not verdicts:
        return "No claims were written down before these runs were measured, so none is put to the test."
    words = [v.word.partition(" (")[0] for v in verdicts]
    said = [f"{words.count(word)} {told}" for word, told in COUNTED.items() if word in words]
    tested = [v.p for v in verdicts if v.p is not None]
    shown = sum(p < 1 - CONFIDENCE for p in holm(tested, len(tested)))
    alone = sum(word in KINDS for word in words)
    left = f"{shown} of these {alone}" if alone > 1 else f"{shown} of this one"
    corrected = f" Tested one by one; with Holm's correction for {len(tested)} tests, {left} would be left."
    return f"{len(verdicts)} claims: {', '.join(said)}." + (corrected if alone else "")


def _verdicts(verdicts: list[Verdict]) -> str:
    if not verdicts:
        return ""
    rule = (
        f"A claim holds where the {CONFIDENCE:.0%} t-interval of the differences, paired by seed, does not contain 0."
    )
    lines = "\n".join(map(_verdict, verdicts))
    return f'<ul class="verdicts">\n{lines}\n</ul>\n<p class="quiet">{rule}</p>'


def _verdict(v: Verdict) -> str:
    kind = KINDS.get(v.word, "open")
    says = f"{html.escape(v.claim.says)}: <b>{html.escape(v.word)}</b> <span>({html.escape(v.figures)})</span>"
    return f'<li class="{kind}">{says}</li>'


def _table(study: Study, columns: list[Column]) -> str:
    labels = ["row", "seeds", *("\u00a0".join(column.label.rsplit(" ", 1)) for column in columns)]  # no arrow alone
    head = "".join(f'<th><button type="button">{html.escape(label)}</button></th>' for label in labels)
    body = ""
    for place, arm in enumerate(study.arms.values()):
        cells = "".join(_cell(column.cells[arm.name]) for column in columns)
        kind = ' class="real"' if arm.name == REAL else ""
        seeds = len(arm.runs)
        name = html.escape(arm.name)
        body += f'<tr{kind}><th data-value="{place}">{name}</th><td data-value="{seeds}">{seeds}</td>{cells}</tr>\n'
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


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


def _clips(config: Config, study: Study) -> str:
    """The same conditional images in every row, the real clips first; of each row the seed that most have."""
    seeds = [seed for arm in study.arms.values() for seed in arm.runs]
    common = max(sorted(set(seeds)), key=seeds.count)
    arms = sorted(study.arms.values(), key=lambda arm: arm.name != REAL)
    made = {arm.name: _index(arm, common if common in arm.runs else arm.first) for arm in arms}
    there = [clips for clips in made.values() if clips]
    if not there:
        return "<tbody><tr><td>None of these runs names videos that can be read from here.</td></tr></tbody>"
    everywhere = [clip for clip in reversed(there[0]) if all(clip in clips for clips in there)]
    chosen = (everywhere or [*reversed(there[0])])[: config.compare.clips]
    prompts = [next((clips[clip][1] for clips in there if clip in clips), "") for clip in chosen]
    head = "".join(f'<th class="prompt">{html.escape(prompt)}</th>' for prompt in prompts)
    lines = f"<thead><tr><th></th>{head}</tr></thead><tbody>\n"
    for name, clips in made.items():
        cells = "".join(f"<td>{_video(clips[clip][0]) if clip in clips else '-'}</td>" for clip in chosen)
        lines += f"<tr><th>{html.escape(name)}</th>{cells}</tr>\n"
    return f"{lines}</tbody>"


def _index(arm: Arm, seed: int) -> dict[str, tuple[str, str]]:
    """By clip: where its video is, and its prompt."""
    folder = arm.runs[seed].data.tags.get("cil.videos", "")
    try:
        lines = storage.read_rows(storage.join(folder, "index.jsonl"))
        return {  # of several videos of an image the first
            line["clip_id"]: (storage.join(folder, line["file"]), str(line.get("caption") or ""))
            for line in reversed(lines)
            if _is_below(line["file"])
        }
    except (OSError, ValueError, ImportError, KeyError, TypeError):  # somebody else's, or elsewhere
        return {}


def _is_below(file: str) -> bool:
    """A video of the folder: whoever made a run may name any file of ours."""
    return file.endswith(".mp4") and not posixpath.isabs(file) and ".." not in file.split("/") and "://" not in file


def _video(uri: str) -> str:
    try:
        data = base64.b64encode(storage.read(uri)).decode()
    except (OSError, ValueError, ImportError):
        return "-"
    return f'<video src="data:video/mp4;base64,{data}" loop muted playsinline></video>'


def _differences(study: Study) -> str:
    """Parameter x row, of what is not the same everywhere."""
    arms = [arm for arm in study.arms.values() if arm.name != REAL]
    told = {arm.name: {"weights": arm.weights} | arm.parameters for arm in arms}
    names = dict.fromkeys(name for parameters in told.values() for name in parameters)
    differing = {name: [_given(told[arm.name].get(name)) for arm in arms] for name in names}
    differing = {name: values for name, values in differing.items() if len(set(values)) > 1}
    if not differing:
        return "<tbody><tr><td>Nothing that the runs say of themselves differs between the rows.</td></tr></tbody>"
    head = "".join(f"<th>{html.escape(arm.name)}</th>" for arm in arms)
    body = ""
    for name, values in differing.items():
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        body += f"<tr><th>{html.escape(name)}</th>{cells}</tr>\n"
    return f"<thead><tr><th>parameter</th>{head}</tr></thead><tbody>{body}</tbody>"


def _given(value: str | None) -> str:
    return "-" if value in (None, "", "None") else str(value)


def _settings(config: Config, study: Study) -> str:
    """The configurations that the scores were made with, as they stand beside them; each once."""
    found: dict[str, list[str]] = {}
    for arm in study.arms.values():
        for run in arm.runs.values():
            try:
                text = storage.read(storage.join(run.data.tags["cil.scores"], "config.json")).decode()
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
