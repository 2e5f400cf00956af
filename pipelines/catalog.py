"""What is to be encoded: rows of WebVid csvs, samples in tar shards, files in folders, or all of them together.

Rows stand in a table of Arrow columns, in a file without a name that is mapped into memory: of ten million the kernel
keeps what it has room for. They become `Video`s a slice at a time.

A videoid is a csv's own; of a tar's sample its shard and its name, `00000~000000012`; of a file in a folder its path
there without extension, `cats~one`. In the last two / is ~, and what is not a letter, a digit or one of _ . - is %XX.
"""

import csv
import hashlib
import io
import json
import posixpath
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipelines import storage, tables, tars
from pipelines.ahead import ahead
from pipelines.artifact import code
from pipelines.config import CatalogConfig
from pipelines.errors import UserError, shown
from pipelines.secrets import redacted, tells_secret

COLUMNS = ("videoid", "name")
BLOCK = 1 * 1024 * 1024  # bytes of a csv parsed at once
LONGEST = 131072  # bytes of a caption: more are rows that an open quote has swallowed
END = "\0the end of the csv\0"  # as a row behind the last one: what is still open there has swallowed it
THREADS = 16  # that wait for a disk or for S3

# Why a video is rejected without being looked at.
PROBLEMS = {
    "": "",
    "unsafe_name": "a name that is empty, or that would leave the folder of videos",
    "duplicate_id": "an earlier row has this videoid",
    "ragged_row": "the row of the csv has more or fewer fields than the header",
    "damaged_tar": "the file is empty or no tar, or the tar is damaged or cut off here",
    "missing": "the tar has this sample's caption, but no video",
}
CODES = {problem: code for code, problem in enumerate(PROBLEMS)}
UNSAFE_ID = r"^\.{0,2}$|[/\\:\x00]"
UNSAFE_PAGE = r"^/|//|/$|(^|/)\.{1,2}(/|$)|[\\:\x00]"

SCHEMA = pa.schema(
    {
        "videoid": pa.large_string(),
        "caption": pa.large_string(),
        "extra": pa.large_string(),  # whatever else is said of it, in JSON
        "place": pa.large_string(),  # under its root: a page folder, a tar, or the file
        "root": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "problem": pa.int8(),
        "file": pa.int32(),  # of the csvs
        "row": pa.int32(),  # in that csv, whose header is row 1
    }
)

WHERE = ("place", "root", "file", "row")


@dataclass(frozen=True)
class Video:
    """One row of the plan."""

    videoid: str
    caption: str
    sources: tuple[str, ...]  # full URIs where its file may stand, the likelier first; none of a name that is unsafe
    offset: int = 0  # in that file, of a tar's member
    size: int = -1  # -1: the whole file
    problem: str = ""  # why it is rejected without being looked at, one of PROBLEMS
    extra: str = ""  # in JSON: the csv's other columns, or the .json of a tar's sample


class Root(NamedTuple):
    """Where files stand: of a csv in any of its folders, under the page folder or not; else in the one folder."""

    folders: tuple[str, ...]
    csv: bool = False


@dataclass(frozen=True)
class Catalog:
    table: pa.Table  # sorted by videoid, then in order of appearance
    digest: str  # of the rows and of where each stands in its root, not of where the roots are
    source: str
    roots: tuple[Root, ...]
    csvs: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def problems(self) -> Counter[str]:
        """How many videos are rejected without being looked at, by the reason."""
        found = {each["values"]: each["counts"] for each in self.table["problem"].value_counts().to_pylist()}
        return Counter({problem: count for problem, count in found.items() if problem})

    def videos(self, start: int, stop: int) -> list[Video]:
        columns = self.table.slice(start, max(0, stop - start)).to_pydict()
        return [self._video(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def with_sources(self, rejects: list[dict[str, Any]], rows: np.ndarray) -> list[dict[str, Any]]:
        """Rejects of these rows, each with where its file may stand, or what names it so, wherever the roots are."""
        if not rejects:
            return []
        wanted = pa.array({reject["videoid"] for reject in rejects}, pa.large_string())
        mine = tables.taken(self.table, rows)
        chosen = replace(self, table=mine.filter(pc.is_in(mine["videoid"], wanted)))
        found: defaultdict[tuple[str, str], deque[str]] = defaultdict(deque)
        named = zip(chosen.videos(0, len(chosen)), *(chosen.table[name].to_pylist() for name in WHERE), strict=True)
        for video, *where in named:
            said = self._named_by(video, *where) if video.problem else self._may_stand(video, *where)
            found[video.videoid, video.problem].append(shown(said))
        told = []
        for reject in rejects:
            sources = found[reject["videoid"], reject["reason"]] or found[reject["videoid"], ""]
            told.append(reject | {"source": sources.popleft() if sources else ""})
        return told

    def _named_by(self, video: Video, place: str, root: int, file: int, row: int) -> str:
        if self.roots[root].csv:
            return f"{posixpath.basename(self.csvs[file])} row {row}"
        member = unquote(video.videoid.partition("~")[2].replace("~", "/"))
        is_tar = posixpath.splitext(place)[1].lower() not in tars.VIDEOS
        return place + (f": {member}" if is_tar and member else "")

    def _may_stand(self, video: Video, place: str, root: int, *_: int) -> str:
        below = [f"{folder.rstrip('/')}/" for folder in self.roots[root].folders]
        names = (source.removeprefix(each) for source in video.sources for each in below if source.startswith(each))
        return " or ".join(dict.fromkeys(names))

    def _video(
        self,
        videoid: str,
        caption: str,
        extra: str,
        place: str,
        root: int,
        offset: int,
        size: int,
        problem: str,
        **where: int,
    ) -> Video:
        folders, is_csv = self.roots[root]
        names = [place]
        if is_csv:
            names = [f"{place}/{videoid}.mp4", f"{videoid}.mp4"] if place else [f"{videoid}.mp4"]
        if problem in ("unsafe_name", "ragged_row"):
            names = []
        # Not posixpath.join, which would let a name with a leading / take the folder's place.
        sources = tuple(f"{folder.rstrip('/')}/{name}" for folder in folders for name in names)
        return Video(videoid, caption, sources, offset, size, problem, extra)


def read_catalog(config: CatalogConfig, default: str) -> Catalog:
    """Every row of every source; `default` is the data set of jobs.make_shapes."""
    given = {key: _many(getattr(config, key)) for key in ("csv", "tars", "folder")}
    source = " ".join(f"catalog.{key}={','.join(uris)}" for key, uris in given.items() if uris)
    folders = _many(config.videos) or (storage.join(default, "videos"),)
    if not source:
        uri = storage.join(default, "videos.csv")
        if not storage.exists(uri):
            raise UserError(
                f"catalog.csv={uri}: there is no such file (python -m jobs.make_shapes writes one to try with)"
            )
        given["csv"], source = (uri,), f"catalog.csv={uri}"
    elif config.videos and not given["csv"]:
        raise UserError(f"catalog.videos={','.join(folders)}: goes with catalog.csv, which names the files in it")

    copies: list[tuple[Path, list[str]]] = []
    if given["csv"]:
        given["csv"] = tuple(_matching("csv", given["csv"], "a csv with the columns videoid and name"))
        copies = [_copied_csv(uri) for uri in given["csv"]]
        for folder in folders:
            if storage.is_local(folder) and not storage.exists(folder):
                raise UserError(
                    f"catalog.videos={folder}: there is no such folder; "
                    f"the files of {given['csv'][0]} are looked for in it"
                )
    shards = _matching("tars", given["tars"], "tar shards, for example /data/shards/*.tar") if given["tars"] else []
    parents = sorted({_split(uri)[0] for uri in shards})
    roots = [Root(folders, csv=True)] if given["csv"] else []
    root_of = {parent: len(roots) + i for i, parent in enumerate(parents)}
    roots += (Root((folder,)) for folder in (*parents, *given["folder"]))

    def read() -> Iterator[pa.Table]:
        for number, (file, header) in enumerate(copies):
            yield _read_csv(given["csv"][number], file, header, subset, number)
        yield from _read_tars(shards, root_of, subset)
        for number, folder in enumerate(given["folder"]):
            yield subset.of(_read_folder(folder, len(roots) - len(given["folder"]) + number))

    subset = _Subset(config.subset)
    found = tables.spooled(SCHEMA, read())
    if not len(found):
        chosen = f" of which catalog.subset={config.subset} leaves any" if config.subset else ""
        raise UserError(f"{source}: holds no videos{chosen}")
    table = _sorted(found, config.limit)
    return Catalog(table, _digest(table), source, tuple(roots), given["csv"])


def _many(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()


def _split(uri: str) -> tuple[str, str]:
    folder, _, name = uri.rpartition("/")
    return folder or "/", name


def _matching(key: str, patterns: tuple[str, ...], expected: str) -> list[str]:
    """Each file once, in the order of the patterns."""
    found: dict[str, None] = {}
    for pattern in patterns:
        with _named(key, pattern):
            files = storage.glob(pattern)
        if not files:
            said = "no file matches" if set("*?[") & set(pattern) else "there is no such file"
            raise UserError(f"catalog.{key}={pattern}: {said}; expected is {expected}")
        found |= dict.fromkeys(files)
    for uri in found:
        if not _is_utf8(uri):
            raise UserError(f"catalog.{key}={uri!a}: the name is not UTF-8; rename the file")
    return list(found)


@contextmanager
def _named(key: str, uri: str) -> Iterator[None]:
    """What only the user can mend, by the key and the value that led to it; what may pass stays an OSError."""
    try:
        yield
    except IsADirectoryError:
        raise UserError(f"catalog.{key}={uri}: is a folder, and a file is expected") from None
    except OSError as error:
        said = " ".join(str(error).split()).removeprefix(f"{uri}: ")  # which storage has named already
        if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | storage.Unfit):
            raise UserError(f"catalog.{key}={uri}: cannot be read: {said}") from None
        raise OSError(f"catalog.{key}={uri}: {said}") from error


def _is_utf8(name: str) -> bool:
    """Names of other bytes come from Python as surrogates, which no table can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# csv


def _copied_csv(uri: str) -> tuple[Path, list[str]]:
    """And its header: what is wrong there is said before anything else."""
    with _named("csv", uri):
        file = storage.kept_copy(uri)
        return file, _header(file, uri)


def _read_csv(uri: str, file: Path, header: list[str], subset: "_Subset", number: int) -> pa.Table:
    """By pyarrow, or where that refuses (a ragged row) by Python's csv, which tells the row from the others."""

    def read(parsed: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
        row = 2
        for columns in parsed:
            table = _csv_rows(columns, file=number, row=np.arange(row, row + len(columns["videoid"])))
            row += len(table)
            yield subset.of(_plausible(table, uri))

    with _named("csv", uri):
        try:
            return tables.spooled(SCHEMA, read(_parse_fast(file, header)))
        except pa.ArrowInvalid:
            return tables.spooled(SCHEMA, read(_parse_row_by_row(file, header, uri)))


def _plausible(table: pa.Table, uri: str) -> pa.Table:
    longest = pc.max(pc.binary_length(table["caption"])).as_py() or 0
    if longest > LONGEST:
        raise _open_quote(uri, f"a name of {longest} bytes")
    return table


def _header(file: Path, uri: str) -> list[str]:
    header = next(_rows(file, uri), [])
    if not header:
        raise UserError(f"catalog.csv={uri}: is empty; its first row names columns, {' and '.join(COLUMNS)} among them")
    for column in COLUMNS:
        if header.count(column) > 1:
            raise UserError(f"catalog.csv={uri}: has the column {column} {header.count(column)} times")
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        found = ascii(shown(", ".join(header))[:200])
        raise UserError(f"catalog.csv={uri}: has no column {', '.join(missing)}; found are {found} in its first row")
    return header


def _rows(file: Path, uri: str) -> Iterator[list[str]]:
    """Those that are not empty, the header first."""
    number = 0
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            for row in csv.reader(chain(lines, [END])):
                number += bool(row)
                if row and row[-1].endswith(END):
                    if row != [END]:
                        raise _open_quote(uri, f"row {number} opens a quote that nothing closes")
                    return
                if row:
                    yield row
        except csv.Error as error:
            raise _open_quote(uri, f"row {number + 1}: {error}") from None


def _open_quote(uri: str, found: str) -> UserError:
    return UserError(f"catalog.csv={uri}: is no csv ({found}); is a quoted field left open?")


def _parse_fast(file: Path, header: list[str]) -> Iterator[dict[str, pa.Array]]:
    """Columns by their names."""
    wanted = {name: f"f{i}" for i, name in enumerate(header) if name}
    end = ",".join(END if name == "videoid" else "" for name in header)
    with file.open("rb") as stream:
        batches = pyarrow.csv.open_csv(
            _Followed(stream, f"\n{end}\n".encode()),
            # The header is read as a row, so that no name in it, twice or not UTF-8, is a reason to refuse.
            pyarrow.csv.ReadOptions(autogenerate_column_names=True, block_size=BLOCK, use_threads=False),
            pyarrow.csv.ParseOptions(newlines_in_values=True),
            pyarrow.csv.ConvertOptions(
                include_columns=list(wanted.values()), column_types=dict.fromkeys(wanted.values(), pa.binary())
            ),
        )
        is_header, ended = True, False
        for batch in batches:
            if is_header and batch.num_rows:
                batch, is_header = batch.slice(1), False
            columns = {name: _decoded(batch[column]) for name, column in wanted.items()}
            if batch.num_rows and columns["videoid"][-1].as_py() == END:
                columns, ended = {name: column[:-1] for name, column in columns.items()}, True
            yield columns
    if not ended:
        raise pa.ArrowInvalid("a quote is open")


class _Followed(io.RawIOBase):
    """A file with something behind it."""

    def __init__(self, file: BinaryIO, then: bytes) -> None:
        self._file, self._then = file, then

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if data := self._file.read(size):
            return data
        data, self._then = self._then[:size], self._then[size:]
        return data


def _decoded(column: pa.Array) -> pa.Array:
    try:
        return column.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([value.decode("utf-8", "replace") for value in column.to_pylist()], pa.large_string())


def _parse_row_by_row(file: Path, header: list[str], uri: str) -> Iterator[dict[str, Any]]:
    rows = islice(_rows(file, uri), 1, None)
    while batch := list(islice(rows, tables.ROWS)):
        ragged = np.array([len(row) != len(header) for row in batch])
        whole = [[*row, *[""] * len(header)] for row in batch]
        columns = {
            name: pa.array([row[i] for row in whole], pa.large_string()) for i, name in enumerate(header) if name
        }
        yield columns | {"": ragged}


def _csv_rows(columns: dict[str, Any], **where: Any) -> pa.Table:
    """`columns` by their names; without one, which rows are ragged."""
    videoids, captions, ragged = columns.pop("videoid"), columns.pop("name"), columns.pop("", False)
    unsafe = pc.match_substring_regex(videoids, UNSAFE_ID)
    pages = columns.pop("page_dir", pa.repeat(pa.scalar("", pa.large_string()), len(videoids)))
    unsafe = pc.or_(unsafe, pc.match_substring_regex(pages, UNSAFE_PAGE))
    problems = np.where(unsafe, CODES["unsafe_name"], np.where(ragged, CODES["ragged_row"], 0)).astype(np.int8)
    extra = _extra(columns) if columns else [""] * len(videoids)
    return _table(
        videoid=videoids,
        caption=captions,
        extra=extra,
        place=pages,
        root=0,
        offset=0,
        size=-1,
        problem=problems,
        **where,
    )


def _extra(columns: dict[str, pa.Array]) -> list[str]:
    """Of each row the fields that are not empty: always the same text for the same fields."""
    names = sorted(columns)
    rows = zip(*(columns[name].to_pylist() for name in names), strict=True)
    told = ({name: value for name, value in zip(names, row, strict=True) if value} for row in rows)
    return [tars.to_json(fields) for fields in told]


# tars and folders


def _read_tars(uris: list[str], root_of: dict[str, int], subset: "_Subset") -> Iterator[pa.Table]:
    begins = []
    for read in ahead(lambda uri: _read_tar(uri, root_of[_split(uri)[0]]), uris, THREADS):
        table, begin = read.result()
        begins.append(begin)
        yield subset.of(table)
    if begins and all(begins):
        raise UserError(f"catalog.tars={uris[0]}: is no tar; it begins with {begins[0]}")


def _read_tar(uri: str, root: int) -> tuple[pa.Table, str]:
    """And how the file begins, where it is no tar."""

    def samples() -> bytes:
        with storage.ranges(uri) as read_at:
            try:
                return json.dumps([tars.samples(read_at), ""]).encode()
            except tars.Damaged:
                return json.dumps([[tars.Sample("", "", 0, -1, "damaged_tar")], repr(read_at(0, 24))]).encode()

    with _named("tars", uri):
        read, begins = json.loads(storage.kept_result(uri, code("pipelines.tars"), samples))
    found = [tars.Sample(*each) for each in read]
    table = _table(
        videoid=[tars.member_id(uri, sample.name) for sample in found],
        caption=[sample.caption for sample in found],
        extra=[sample.extra for sample in found],
        place=[_split(uri)[1]] * len(found),
        root=root,
        offset=[sample.offset for sample in found],
        size=[sample.size for sample in found],
        problem=[CODES[sample.problem] for sample in found],
    )
    return table, begins


def _read_folder(uri: str, root: int) -> pa.Table:
    with _named("folder", uri):
        names = storage.files_below(uri)
    there = set(names)
    videos = [name for name in names if posixpath.splitext(name)[1].lower() in tars.VIDEOS]
    if not videos:
        said = f"of its {len(names)} files none has" if names else "there are no files below it; expected are"
        raise UserError(f"catalog.folder={uri}: {said} {', '.join(tars.VIDEOS)}")
    stems = [posixpath.splitext(name)[0] for name in videos]

    def caption(stem: str) -> str:
        if f"{stem}.txt" not in there:
            return ""
        with _named("folder", file := f"{uri.rstrip('/')}/{stem}.txt"):
            return tars.text(storage.read(file, tars.LARGEST))

    return _table(
        videoid=[tars.escaped(stem) for stem in stems],
        caption=[read.result() for read in ahead(caption, stems, THREADS)],
        extra=[""] * len(stems),
        place=[name.encode("utf-8", "replace").decode() for name in videos],
        root=root,
        offset=0,
        size=-1,
        problem=[0 if _is_utf8(name) else CODES["unsafe_name"] for name in videos],
    )


def _table(**given: Any) -> pa.Table:
    """Columns from arrays, lists, or one number for all rows."""
    columns = []
    for field in SCHEMA:
        values = given.get(field.name, 0)
        if isinstance(values, int):
            values = np.full(len(given["videoid"]), values)
        if field.name == "extra":
            values = _without_secrets(pa.array(values, field.type))
        columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=SCHEMA)


def _without_secrets(values: pa.Array) -> pa.Array:
    """Signed links stand in csvs, and what is cached is passed on."""
    if not pc.any(pc.match_substring_regex(values, r"://\S*[@?#]")).as_py():  # as of ten million links
        return values
    return pa.array([redacted(v) if tells_secret(v) else v for v in values.to_pylist()], values.type)


class _Subset:
    """A share of the videos, as a function of the videoid alone."""

    def __init__(self, share: str | None) -> None:
        self._below = None
        if share:
            part, whole = re.split("/", share)
            self._below = 2**64 * int(part) // int(whole)

    def of(self, table: pa.Table) -> pa.Table:
        below = self._below
        if below is None:
            return table
        return table.filter(pa.array([_place_of(v) < below for v in table["videoid"].to_pylist()], pa.bool_()))


def _place_of(videoid: str) -> int:
    return int.from_bytes(hashlib.sha256(f"subset/{videoid}".encode()).digest()[:8], "big")


def _sorted(table: pa.Table, limit: int | None) -> pa.Table:
    """By videoid, and then in order of appearance."""
    order = pc.sort_indices(table["videoid"])[:limit].to_numpy()
    table = tables.spooled(SCHEMA, tables.in_order(table, order))
    problems = _with_duplicates(table["videoid"], table["problem"].to_numpy())
    return table.set_column(SCHEMA.names.index("problem"), "problem", problems)


def _with_duplicates(videoids: pa.ChunkedArray, codes: np.ndarray) -> pa.Array:
    """Of the rows with one id, the first that nothing else rejects keeps it."""
    codes = codes.copy()
    other = np.ones(len(videoids), bool)
    other[1:] = pc.not_equal(videoids.slice(1), videoids.slice(0, len(videoids) - 1)).to_numpy()
    ids = np.cumsum(other, dtype=np.int32)
    good = np.flatnonzero(codes == 0)
    codes[good[np.diff(ids[good], prepend=0) == 0]] = CODES["duplicate_id"]
    return pa.DictionaryArray.from_arrays(pa.array(codes), list(PROBLEMS))


def _digest(table: pa.Table) -> str:
    """Of what a row says and its place below its root, whatever the chunks and dictionaries."""
    digest = hashlib.sha256()
    for start in range(0, table.num_rows, tables.ROWS):
        for name in ("videoid", "caption", "extra", "place", "offset", "size", "problem"):
            values = table[name].slice(start, tables.ROWS).combine_chunks()
            if name in ("offset", "size"):
                digest.update(values.to_numpy())
                continue
            values = values.cast(pa.large_string())  # of `problem`, a dictionary
            digest.update(pc.binary_length(values).to_numpy())
            offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
            digest.update(memoryview(values.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    return digest.hexdigest()[:16]
