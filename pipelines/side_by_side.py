"""Clips of the same image, prompt and seed in every row, small enough for a page.

A training's seed and a sample's own are two things. All rows are shown with the training's seed that most of them have,
and a column is one image, one prompt and one seed of a sample. What a row has not is a hole, and said.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cil.images import cover
from pipelines import storage
from pipelines.config import Config
from pipelines.decoding import DecodePool
from pipelines.scorer import VIDEO
from pipelines.sets import named
from pipelines.study import Arm, Study, seed_of
from pipelines.video import BadVideo, PyAVDecoder, encode

MOST, LARGEST = 240, 24 * 2**20  # clips of a page, and their bytes
WIDEST, LONGEST, HEAVIEST = 320, 64, 2**18  # pixels, frames and bytes of one: what has more is shown smaller
CRF = 23  # of what is shown smaller
PLAYED = (b"\x42", b"\x4d", b"\x64")  # H.264's Baseline, Main and High: 8 bits, 4:2:0
NOT_OURS = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError)  # somebody else's, or elsewhere


class Video(NamedTuple):
    uri: str
    prompt: str | None  # None: nobody knows


class Clip(NamedTuple):
    data: bytes
    fps: float
    smaller: bool  # than the video is


class Column(NamedTuple):
    image: str
    seed: int | None  # of the sample
    prompt: str | None


Videos = dict[str, dict[int | None, Video]]  # by the image's name and the sample's seed; None: nobody knows


@dataclass
class SideBySide:
    seed: int | None  # of the trainings
    rows: dict[str, list[bytes | None]]
    prompts: list[str] = field(default_factory=list)  # of the columns
    notes: list[str] = field(default_factory=list)


def side_by_side(config: Config, study: Study) -> SideBySide:
    arms = sorted(study.arms.values(), key=lambda arm: not arm.is_real)
    seed, shown, notes = _seeds(arms)
    there = {arm.name: _videos(arm, shown[arm.name], notes) for arm in arms}
    made = SideBySide(seed, {arm.name: [] for arm in arms}, notes=notes)
    if not any(there.values()):
        return SideBySide(None, {}, notes=["None of these runs names videos that can be read from here."])
    columns = _columns(there)[: config.compare.clips]
    holes: dict[tuple[str, str], list[str]] = {}
    rates: dict[float, list[str]] = {}
    smaller: dict[str, None] = {}
    size = 0
    for place, cells in enumerate(_cells(config, there, columns)):
        column = columns[place]
        clips = {name: cell for name, cell in cells.items() if isinstance(cell, Clip)}
        size += sum(len(clip.data) for clip in clips.values())
        if place and (size > LARGEST or (place + 1) * len(arms) > MOST):
            left = f"{len(columns) - place} of {len(columns)} images are left out"
            notes.append(f"{left}: a page shows at most {MOST} clips, and {LARGEST >> 20} MiB of them.")
            break
        made.prompts.append(_head(column, there))
        for name, cell in cells.items():
            made.rows[name].append(cell.data if isinstance(cell, Clip) else None)
            if isinstance(cell, str) and there[name]:  # of what has none at all it is said already
                holes.setdefault((name, cell), []).append(column.image)
        for name, clip in clips.items():
            if name not in rates.setdefault(clip.fps, []):
                rates[clip.fps].append(name)
            smaller |= {name: None} if clip.smaller else {}
    notes += [f"{name} {why} {', '.join(images)}." for (name, why), images in holes.items()]
    if len(rates) > 1:
        told = "; ".join(f"{fps:g} in {', '.join(names)}" for fps, names in sorted(rates.items()))
        notes.append(f"Clips have different frame rates: {told}.")
    if smaller:
        most = f"{WIDEST} pixels and {LONGEST} frames"
        notes.append(f"The videos of {', '.join(smaller)} are larger or longer; at most {most} of each are shown.")
    return made


def _seeds(arms: list[Arm]) -> tuple[int | None, dict[str, int | None], list[str]]:
    """The training's seed that most rows have, the one that each is shown with, and what has to be said."""
    trained = {arm.name: arm for arm in arms if not arm.is_real and _is_of_training(arm)}
    counted = Counter(seed for arm in trained.values() for seed in arm.runs)
    if not counted:
        return None, {arm.name: arm.first for arm in arms}, []
    common = min(counted, key=lambda seed: (-counted[seed], seed))
    shown: dict[str, int | None] = {arm.name: arm.first for arm in arms}
    notes = []
    for name, arm in trained.items():
        if common in arm.runs:
            shown[name] = common
        elif any(counted[seed] > 1 for seed in arm.runs):
            shown[name] = None
            notes.append(f"{name} has no run of seed {common}, which the others are shown with.")
        else:
            notes.append(f"{name} is shown with seed {arm.first}: it has no seed that another row has.")
    return common, shown, notes


def _is_of_training(arm: Arm) -> bool:
    run = arm.runs[arm.first]
    key, _ = seed_of(run)
    return key == "train.seed" or (key is not None and "cil.row" not in run.data.tags)


def _videos(arm: Arm, seed: int | None, notes: list[str]) -> Videos:
    if seed is None:
        return {}
    tags = arm.runs[seed].data.tags
    folder = tags.get("cil.videos", "")
    found: Videos = {}
    try:
        for line in named(storage.read_rows(storage.join(folder, "index.jsonl"), storage.TOLD)):
            if _is_below(line["file"]):
                prompt = str(line["caption"] or "") if "caption" in line else None
                found.setdefault(line["name"], {}).setdefault(
                    line.get("seed"), Video(storage.join(folder, line["file"]), prompt)
                )
        return found
    except NOT_OURS:
        pass
    try:  # a set that was made elsewhere
        for line in storage.read_rows(storage.join(tags["cil.scores"], "scores.jsonl"), storage.TOLD):
            if _is_below(line["file"]) and folder:
                found[line["name"]] = {None: Video(storage.join(folder, line["file"]), None)}
    except NOT_OURS:
        found = {}
    how = "is paired by the names of its files; its prompts and seeds are not known"
    notes.append(f"{arm.name} {how if found else 'names no videos that can be read from here'}.")
    return found


def _is_below(file: str) -> bool:
    """A video of the folder: whoever made a run may name any file of ours."""
    return file.lower().endswith(VIDEO) and not storage.leaves(file)


def _columns(there: dict[str, Videos]) -> list[Column]:
    """Of each image the seed that most rows have; first the images that most rows have."""
    columns, filled = [], {}
    for image in dict.fromkeys(image for videos in there.values() for image in videos):
        of_image = [videos[image] for videos in there.values() if image in videos]
        seeds = Counter(seed for own in of_image for seed in own if seed is not None)
        seed = seeds.most_common(1)[0][0] if seeds else None
        found = [video for own in of_image if (video := own.get(seed, own.get(None)))]
        prompts = Counter(video.prompt for video in found if video.prompt is not None)
        columns.append(Column(image, seed, prompts.most_common(1)[0][0] if prompts else None))
        filled[columns[-1]] = len(found)
    return sorted(columns, key=lambda column: -filled[column])


def _head(column: Column, there: dict[str, Videos]) -> str:
    several = any(len(own) > 1 for videos in there.values() for own in videos.values())
    return (column.prompt or "") + (f" (seed {column.seed})" if several and column.seed is not None else "")


def _cells(config: Config, there: dict[str, Videos], columns: list[Column]) -> Iterator[dict[str, Clip | str]]:
    """Column by column, of each row its clip, or why there is none. Whoever made a video, decoding it is bounded."""
    most = round(config.score.memory * 1e9)
    with DecodePool(PyAVDecoder, config.score.decode_seconds, most=most) as pool:
        for column in columns:
            yield {name: _clip(videos, column, pool) for name, videos in there.items()}


def _clip(videos: Videos, column: Column, pool: DecodePool) -> Clip | str:
    own = videos.get(column.image, {})
    video = own.get(column.seed, own.get(None))
    if video is None:
        return f"has no video of seed {column.seed} of" if own else "has no video of"
    if None not in (video.prompt, column.prompt) and video.prompt != column.prompt:
        return "was given another prompt for"
    try:
        return small(storage.read(video.uri, storage.TOLD), pool)
    except (BadVideo, *NOT_OURS):
        return "has a video that cannot be read from here of"


def small(data: bytes, pool: DecodePool) -> Clip:
    """As it is, or as an H.264 that is small and that every browser plays."""
    video = pool(data, lambda count, fps: range(min(count, LONGEST)))
    height, width = video.frames.shape[1:3]
    scale = min(WIDEST / max(height, width), 1)
    smaller = scale < 1 or video.count > LONGEST
    profile = data[data.find(b"avcC") + 5 :][:1]  # of H.264: browsers do not play all
    if b"avcC" in data and profile in PLAYED and len(data) <= HEAVIEST and not smaller:
        return Clip(data, video.fps, smaller)
    frames = cover(video.frames, *(max(round(side * scale / 2), 1) * 2 for side in (height, width)))
    return Clip(encode(frames, video.fps, CRF), video.fps, smaller)
