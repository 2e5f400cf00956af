"""The sets of videos that are scored: those of the study, and folders of files made elsewhere.

A video, its true clip and its conditional image have files of the same name, but for the seed in that of a video.
"""

import hashlib
import posixpath
from dataclasses import dataclass
from typing import Any

from cil.metrics.detectors import FVD, INCEPTION_SCORE
from pipelines import artifact, storage
from pipelines.artifact import Manifest
from pipelines.config import Config
from pipelines.errors import UserError
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
    images: dict[str, str]  # by name, the file with the conditional image
    made: Manifest | None  # of the study's

    @property
    def identity(self) -> str:
        return artifact.fingerprint([self.fingerprint, [line["file"] for line in self.lines]])


def sets_of(config: Config) -> dict[str, Videos]:
    """The reference and the true clips, where there are any, and what is scored."""
    settings, sets, missing = config.score, dict[str, Videos](), []
    images = config.generate.images
    if images and images.lower().endswith(TABLES):
        images = None  # whose images may lie anywhere
    given = {REFERENCE: settings.reference, REAL: settings.real or images}
    for name in (REFERENCE, REAL, *config.evaluation_rows()):
        folder = storage.join(config.out, "videos", name)
        if uri := given.get(name):
            key = f"score.{name}" if getattr(settings, name) else "generate.images"
            sets[name] = _folder(key, uri, name == REAL)
        elif not _optional(config, name) or storage.exists(storage.join(folder, "manifest.json")):
            sets[name] = generated(artifact.read_manifest(folder, VIDEOS))
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
        asked = {line["name"] for name, videos in sets.items() if name not in given for line in videos.lines[:most]}
        for name, videos in sets.items():
            if name == REAL:  # of more true clips than are seen, those of the videos that are
                videos.lines.sort(key=lambda line: line["name"] not in asked)
            del videos.lines[most:]
    return sets


def _optional(config: Config, name: str) -> bool:
    """To images made elsewhere there are no true clips, and perhaps no cache."""
    return bool(config.score.videos) or (config.generate.images is not None and name in (REAL, REFERENCE))


def generated(made: Manifest) -> Videos:
    index = storage.read_rows(storage.join(made.uri, "index.jsonl"))
    # Of an image made elsewhere the name that it has there.
    names = [name_of(line["image"]) if "image" in line else line["clip_id"].replace(":", "_") for line in index]
    lines = [line | {"name": name} for line, name in zip(index, names, strict=True)]
    lines.sort(key=lambda line: _hash(line["file"]))
    images = {line["name"]: storage.join(made.uri, line["file"]) for line in lines}
    return Videos(made.uri, made.fingerprint, lines, images, made)


def _folder(key: str, uri: str, pictures: bool = False) -> Videos:
    """Of files made elsewhere, known by their names and sizes."""
    if not storage.exists(uri):
        raise UserError(f"{key}={uri}: there is nothing")
    endings = (*VIDEO, *ENDINGS) if pictures else VIDEO
    sizes = {file: size for file, size in storage.sizes_below(uri).items() if file.lower().endswith(endings)}
    if not sizes:
        raise UserError(f"{key}={uri}: holds no {'.mp4 and no picture' if pictures else '.mp4'}")
    files = sorted(sizes, key=lambda file: _hash(name_of(file)))
    videos = [file for file in files if file.lower().endswith(VIDEO)]
    # A picture before a video of the same name: it is the image itself.
    images = {name_of(file): storage.join(uri, file) for file in [*videos, *(f for f in files if f not in set(videos))]}
    lines = [{"file": file} | dict.fromkeys(("clip_id", "name"), name_of(file)) for file in videos]
    return Videos(uri, artifact.fingerprint(sorted(sizes.items())), lines, images, None)


def name_of(file: str) -> str:
    return posixpath.splitext(file)[0]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _say_overlap(sets: dict[str, Videos]) -> None:
    for name, videos in sets.items():
        both = sum(line["name"] in sets[REAL].images for line in videos.lines)
        if both < len(videos.lines) and name not in (REAL, REFERENCE):
            told = f"{both} of its {len(videos.lines)} videos have a true clip or a conditional image of their name"
            absent = "what is measured against these is absent" if not both else "the others count where none is needed"
            print(f"scores: {name}: {told} in {sets[REAL].uri}: {absent}")
