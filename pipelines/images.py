"""Conditional images that no cache holds: of a folder, of a table, or of a folder of prompts as the authors have them.

    a folder    its .png, .jpg, .webp ..., at any depth; the caption of cat.png in cat.txt, if there is one
    prompts     a folder with test_prompts.txt: a line for each of its images, in the order of their names
    a table     .csv or .parquet with the column image: a path in the table's folder, or s3://; and if it likes id,
                prompt, fps and seed, which hold for this image alone

What cannot be an image stays in the list with the reason, and becomes a reject.
"""

import csv
import errno
import hashlib
import io
import math
import posixpath
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipelines import storage
from pipelines.errors import UserError, shown
from pipelines.secrets import tells_secret
from pipelines.tars import LARGEST as CAPTION
from pipelines.tars import escaped, text

KEY = "generate.images"
PROMPTS = "test_prompts.txt"
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2"),
    *(".ppm", ".pgm"),
)
TABLES = (".csv", ".parquet")
# Each a property of this file; the last two are of storage.Unfit.
UNREADABLE = {errno.EISDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG}
PICTURE, TABLE = 2**30, 2**28  # bytes of a picture's file, and of a table, also when it is unpacked
LONGEST = 200  # of an id, as a file's name has 255 bytes at most
OPTIONAL = ("id", "prompt", "fps", "seed")


@dataclass(frozen=True)
class Picture:
    """An image by its file, which is not yet looked into."""

    id: str  # a file's name
    name: str  # as the folder or the table has it
    uri: str
    prompt: str = ""
    fps: float | None = None
    seed: int | None = None
    digest: str = ""  # of the file
    problem: str = ""  # why it cannot be one: missing, unsafe_name


def read_images(uri: str) -> list[Picture]:
    """At least one. Each file is read once, as a set of videos is known by what its images hold."""
    try:
        found = _table(uri) if _ending(uri) in TABLES else _folder(uri)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, storage.Unfit) as error:
        expected = "a folder of images, or a .csv or .parquet"
        raise UserError(f"{KEY}={uri}: cannot be read ({error.strerror or error}); expected is {expected}") from None
    with ThreadPoolExecutor(storage.AT_ONCE) as pool:
        return list(pool.map(_looked_for, _told_apart(found)))


def _folder(uri: str) -> list[Picture]:
    names = storage.files_below(uri)
    images = [name for name in names if _ending(name) in ENDINGS and not posixpath.basename(name).startswith(".")]
    if not images:
        said = f"none of its {len(names)} files is one" if names else "it is empty, or not there"
        raise UserError(f"{KEY}={uri}: has no images ({said}); expected are {', '.join(ENDINGS)}")
    there = set(names)
    if PROMPTS in there:
        prompts = [
            line.strip() for line in text(storage.read(storage.join(uri, PROMPTS), TABLE)).splitlines() if line.strip()
        ]
        if len(prompts) != len(images):
            raise UserError(f"{KEY}={uri}: {len(images)} images and {len(prompts)} lines of {PROMPTS}; one each")
    else:
        files = [f"{posixpath.splitext(name)[0]}.txt" for name in images]
        with ThreadPoolExecutor(storage.AT_ONCE) as pool:
            texts = pool.map(
                lambda file: storage.read(storage.join(uri, file), CAPTION) if file in there else b"", files
            )
            prompts = [text(data) for data in texts]
    return [
        Picture(posixpath.splitext(name)[0], name, storage.join(uri, name), prompt)
        for name, prompt in zip(images, prompts, strict=True)
    ]


def _table(uri: str) -> list[Picture]:
    rows = _parquet(uri) if _ending(uri) == ".parquet" else _csv(uri)
    if not rows:
        raise UserError(f"{KEY}={uri}: has no rows")
    return [_of_row(f"{KEY}={uri}: row {number}", posixpath.dirname(uri), row) for number, row in enumerate(rows, 1)]


def _csv(uri: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(storage.read(uri, TABLE).decode("utf-8-sig", errors="replace"), newline=""))
    try:
        columns = list(reader.fieldnames or ())
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{KEY}={uri}: is no csv ({error})") from None
    _refuse_without_images(uri, columns)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            wanted = len(reader.fieldnames or ())
            raise UserError(f"{KEY}={uri}: row {number} has not as many fields as the header, {wanted}")
    return rows


def _parquet(uri: str) -> list[dict[str, Any]]:
    data = storage.read(uri, TABLE)
    try:
        file = pa.parquet.ParquetFile(pa.BufferReader(data))
        columns = file.schema_arrow.names
        _refuse_without_images(uri, columns)
        wanted = [name for name in ("image", *OPTIONAL) if name in columns]
        rows: list[dict[str, Any]] = []
        size = 0
        for batch in file.iter_batches(16, columns=wanted):  # a few bytes can stand for gigabytes
            size += batch.nbytes
            if size > TABLE:
                raise UserError(f"{KEY}={uri}: its columns {', '.join(wanted)} hold more than {TABLE >> 20} MiB")
            rows += batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{KEY}={uri}: is no parquet file ({' '.join(str(error).split())})") from None
    return rows


def _refuse_without_images(uri: str, columns: list[str]) -> None:
    if "image" not in columns:
        raise UserError(f"{KEY}={uri}: has no column image; found are {', '.join(columns) or 'none'}")
    if others := [name for name in columns if name not in ("image", *OPTIONAL)]:
        print(
            f"{KEY}: {shown(', '.join(others))} of {shown(posixpath.basename(uri))} are not read, only image, "
            f"{', '.join(OPTIONAL)}"
        )


def _of_row(place: str, folder: str, row: dict[str, Any]) -> Picture:
    def number(key: str, least: float, whole: bool = False) -> Any:
        given = row.get(key)
        if given is None or given == "" or given != given:  # NaN is how pandas writes nothing
            return None
        try:
            value = float(given)
        except (ValueError, TypeError):
            value = math.nan
        if not least <= value < math.inf or (whole and value % 1):
            kind = "whole number" if whole else "number"
            raise UserError(f"{place}: {key}={given}: a {kind} of at least {least}, or nothing")
        return int(value) if whole else value

    if not isinstance(row["image"], str | None):
        raise UserError(f"{place}: image is a {type(row['image']).__name__}; expected is the path of a file")
    name = (row["image"] or "").strip()
    below = posixpath.normpath(name)
    unsafe = not name or posixpath.isabs(below) or below.split("/")[0] in ("..", ".") or "\0" in name
    remote = name.startswith("s3://")
    uri = name if remote else storage.join(folder, below)
    given = "" if row.get("id") is None else str(row["id"])
    return Picture(
        id=given or posixpath.splitext(posixpath.basename(name) if remote else below)[0],
        name=name if remote or unsafe else below,
        uri=uri,
        prompt=str(row.get("prompt") or ""),
        fps=number("fps", 0.1),
        seed=number("seed", 0, whole=True),
        problem="unsafe_name" if tells_secret(name) or (not remote and (unsafe or "://" in name)) else "",
    )


def _told_apart(pictures: list[Picture]) -> list[Picture]:
    """With ids that are names of files, the second of one name with -2 behind it, the third with -3."""
    given = {escaped(picture.id) for picture in pictures}
    taken: set[str] = set()
    apart = []
    for picture in pictures:
        name = own = escaped(picture.id) or "image"
        if len(own) > LONGEST:
            name = own = f"{own[:LONGEST]}-{hashlib.sha256(own.encode()).hexdigest()[:8]}"
        count = 1
        while name in taken or (count > 1 and name in given):
            count += 1
            name = f"{own}-{count}"
        taken.add(name)
        apart.append(replace(picture, id=name))
    return apart


def _looked_for(picture: Picture) -> Picture:
    if picture.problem:
        return picture
    try:
        return replace(picture, digest=hashlib.sha256(storage.read(picture.uri, PICTURE)).hexdigest())
    except (FileNotFoundError, NotADirectoryError):
        return replace(picture, problem="missing")
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        return replace(picture, problem="damaged")


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1].lower()
