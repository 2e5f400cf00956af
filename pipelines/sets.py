"""The sets of videos that are scored: those of the study, and folders of files made elsewhere.

A video, its true clip and its conditional image have files of the same name, but for the seed in that of a video. Of
the study's videos the index says which image each began with. Where a name means several files, nothing is guessed.
"""

import hashlib
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cil.metrics.detectors import FVD, INCEPTION_SCORE
from pipelines import artifact, storage
from pipelines.artifact import Manifest
from pipelines.config import Config
from pipelines.errors import UserError, shown
from pipelines.generate import KIND as VIDEOS
from pipelines.generate import REAL, REFERENCE
from pipelines.images import ENDINGS, TABLES
from pipelines.scorer import VIDEO


@dataclass(frozen=True)
class Videos:
    """A set: in an order that says nothing of its content, the first so many are a sample."""

    uri: str
    fingerprint: str
    lines: list[dict[str, Any]]  # file, clip_id, name, and of the study's what else is known
    images: dict[str, str]  # by what is known of a video, the file with its conditional image
    clips: dict[str, str]  # and that of the true clip, as a line has it
    made: Manifest | None  # of the study's

    @property
    def identity(self) -> str:
        return artifact.fingerprint([self.fingerprint, [line["file"] for line in self.lines]])


def sets_of(config: Config) -> dict[str, Videos]:
    """The reference and the true clips, where there are any, and what is scored."""
    settings, sets, missing = config.score, dict[str, Videos](), []
    images = config.generate.images
    begun_with = images or ""
    if begun_with.lower().endswith(TABLES):
        images, begun_with = None, posixpath.dirname(begun_with)  # they may lie anywhere
    given = {REFERENCE: settings.reference, REAL: settings.real or images}
    for name in (REFERENCE, REAL, *config.evaluation_rows()):
        folder = storage.join(config.out, "videos", name)
        if uri := given.get(name):
            key = f"score.{name}" if getattr(settings, name) else "generate.images"
            sets[name] = _folder(key, uri, name == REAL)
        elif not _optional(config, name) or storage.exists(storage.join(folder, "manifest.json")):
            sets[name] = generated(artifact.read_manifest(folder, VIDEOS), begun_with)
        else:
            missing.append(name)
    if missing and sets.keys() - given.keys():
        print(f"scores: the study has no videos of {', '.join(missing)}; they are left out")
    for name, uri in settings.videos.items():
        sets[name] = _folder(f"score.videos.{name}", uri)
    if REFERENCE not in sets:
        print("scores: no score.reference, and no reference set of the study: no distances to it are measured")
    if REAL in sets:
        _say_overlap(sets)
    if settings.protocol == "paper":
        most = (INCEPTION_SCORE if settings.inception else FVD).videos
        for name, videos in sets.items():
            if name != REAL:  # true clips all: which of them have a video is another question for each set
                del videos.lines[most:]
    return sets


def _optional(config: Config, name: str) -> bool:
    """To images made elsewhere there are no true clips, and perhaps no cache."""
    return bool(config.score.videos) or (config.generate.images is not None and name in (REAL, REFERENCE))


def generated(made: Manifest, begun_with: str = "") -> Videos:
    """`begun_with`: where its images lie, if they were made elsewhere."""
    lines = named(storage.read_rows(storage.join(made.uri, "index.jsonl")))
    for line in lines:
        image = line.get("image")
        line["from"] = [storage.join(begun_with, image), image] if image else []
    lines.sort(key=lambda line: _hash(line["file"]))
    clips = {line["name"]: line["file"] for line in lines}
    images = {name: storage.inside(made.uri, file) for name, file in clips.items()}
    return Videos(made.uri, made.fingerprint, lines, images, clips, made)


def named(index: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the name that a video has beside others: of an image made elsewhere the one that it has there, with its
    ending if there is another one of that name."""
    unclear = _shared({line["image"] for line in index if line.get("image")})
    lines = []
    for line in index:
        image = line.get("image")
        name = (
            line["clip_id"].replace(":", "_") if not image else image if name_of(image) in unclear else name_of(image)
        )
        lines.append(line | {"name": name})
    return lines


def _folder(key: str, uri: str, pictures: bool = False) -> Videos:
    """Of files made elsewhere, known by their names, sizes and the times when they were written."""
    if not storage.exists(uri):
        raise UserError(f"{key}={uri}: there is nothing")
    endings = (*VIDEO, *ENDINGS) if pictures else VIDEO
    try:
        there = storage.versions_below(uri)
    except NotADirectoryError:
        raise UserError(f"{key}={uri}: is a file; expected is a folder of them") from None
    found = {file: told for file, told in there.items() if file.lower().endswith(endings)}
    if not found:
        raise UserError(f"{key}={uri}: holds no {'.mp4 and no picture' if pictures else '.mp4'}")
    files = sorted(found, key=lambda file: _hash(name_of(file)))
    videos = [file for file in files if file.lower().endswith(VIDEO)]
    pictures_there = [file for file in files if not file.lower().endswith(VIDEO)]
    clips, images = _named(key, uri, videos), _named(key, uri, pictures_there)
    # A picture before a video of the same name: it is the image itself.
    images = {name: storage.join(uri, file) for name, file in (clips | images).items()}
    lines = [{"file": file, "from": []} | dict.fromkeys(("clip_id", "name"), name_of(file)) for file in videos]
    return Videos(uri, artifact.fingerprint(sorted(found.items())), lines, images, clips, None)


def _named(key: str, uri: str, files: list[str]) -> dict[str, str]:
    """By their whole URI, their name with its ending, and their name without it, if that is one file's."""
    unclear = _shared(files)
    if unclear:
        several = ", ".join(sorted(file for file in files if name_of(file) in unclear)[:4])
        told = f"{len(unclear)} names mean several files each ({shown(several)} ...)"
        print(f"scores: {key}={uri}: {told}: no pair is guessed")
    names = {name_of(file): file for file in files if name_of(file) not in unclear}
    names |= {shown(file): file for file in files}  # as an index names it
    return names | {file: file for file in files} | {storage.join(uri, file): file for file in files}


def _shared(files: Iterable[str]) -> set[str]:
    """Names that several files have but for their ending."""
    return {name for name, count in Counter(map(name_of, files)).items() if count > 1}


def partner(line: dict[str, Any], files: dict[str, str]) -> str | None:
    """What belongs to a video: by the image that it began with, by its name, by its id."""
    return next((files[key] for key in (*line["from"], line["name"], line["clip_id"]) if key in files), None)


def name_of(file: str) -> str:
    return posixpath.splitext(file)[0]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _say_overlap(sets: dict[str, Videos]) -> None:
    for name, videos in sets.items():
        both = sum(partner(line, sets[REAL].images) is not None for line in videos.lines)
        if both < len(videos.lines) and name not in (REAL, REFERENCE):
            told = f"{both} of its {len(videos.lines)} videos have a true clip or a conditional image of their name"
            absent = "what is measured against these is absent" if not both else "the others count where none is needed"
            print(f"scores: {name}: {told} in {sets[REAL].uri}: {absent}")
