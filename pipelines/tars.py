"""What a tar shard of videos holds, by its headers: no video is read to find out, and nothing is ever extracted.

A sample is the members of one name but for what follows the last dot: a video, and its caption in .txt, else .json. All
that the .json says is kept. ustar, pax and GNU's long names are understood.
"""

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

WINDOW = 64 * 1024  # usually holds a sample's .txt and .json and the header of the next video: one request
LARGEST = 1024 * 1024  # bytes of a caption or of a long name; more is a damaged header, or no caption
BLOCK = 512
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
ReadAt = Callable[[int, int], bytes]  # (offset, size): fewer bytes at the end


class Member(NamedTuple):
    name: str  # bytes that are not UTF-8 as surrogates
    offset: int
    size: int  # -1: a link, which has no bytes here


class Sample(NamedTuple):
    name: str  # without extension; "" stands for the rest of a damaged tar
    caption: str
    offset: int
    size: int
    problem: str  # as a Video's
    extra: str = ""  # what the .json says


class Damaged(Exception):
    """The tar cannot be followed beyond `position`; `cut`: the last member is not whole."""

    def __init__(self, position: int, cut: bool = False) -> None:
        super().__init__(f"damaged at byte {position}")
        self.position, self.cut = position, cut


def samples(read_at: ReadAt) -> list[Sample]:
    """In the order of their videos. `Damaged` only where there is no tar at all.

    Of a damaged tar the samples before the damage are accepted. The one that the damage may have reached, because it
    lacks its end, its video or its caption, is `damaged_tar`; where there is none such, a sample without a name is.
    """
    window = _Window(read_at)
    videos: list[tuple[str, Member]] = []
    captions: dict[str, dict[str, str]] = {}
    last, damage = "", None
    try:
        for member in _members(window):
            last, extension = posixpath.splitext(member.name)
            extension = extension.lower()
            if extension in VIDEOS:
                videos.append((last, member))
            elif extension in (".txt", ".json"):
                whole = 0 <= member.size <= LARGEST
                data = window(member.offset, member.size) if whole else b""
                said = {".txt": text(data)} if extension == ".txt" else _of_json(data)
                captions.setdefault(last, {}).update(said)
    except Damaged as error:
        if not error.position:
            raise
        damage = error
    found = []
    for name, member in videos:
        problem = "unsafe_name" if _leaves(name) else "missing" if member.size < 0 else ""
        of = captions.get(name, {})
        found.append(Sample(name, _caption(of), member.offset, member.size, problem, of.get("extra", "")))
    named = {name for name, _ in videos}
    found += [
        Sample(name, _caption(of), 0, 0, "missing", of.get("extra", ""))
        for name, of in captions.items()
        if name not in named
    ]
    if not found and not damage:
        damage = Damaged(0)  # an empty tar is a download that failed
    if damage:
        reached = damage.cut or last not in named or not _caption(captions.get(last, {}))
        found = [s._replace(problem="damaged_tar") if reached and s.name == last else s for s in found]
        if not any(s.problem == "damaged_tar" for s in found):
            found.append(Sample("", "", damage.position, -1, "damaged_tar"))
    return found


def text(data: bytes) -> str:
    return data.decode("utf-8-sig", errors="replace").strip()


def _caption(of: dict[str, str]) -> str:
    return of.get(".txt") or of.get(".json") or ""


def _of_json(data: bytes) -> dict[str, str]:
    try:
        fields = json.loads(data, parse_constant=lambda _: None)  # NaN and Infinity, which Python writes, are no JSON
        extra = to_json(fields) if isinstance(fields, dict) else ""
    except (ValueError, RecursionError):
        return {}
    values = [fields.get(key) for key in ("caption", "text", "name")] if isinstance(fields, dict) else []
    said = next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")
    return {".json": said.encode("utf-8", "replace").decode(), "extra": extra}


def to_json(fields: dict[str, Any]) -> str:
    """The same text for the same fields, and none of none."""
    # JSON can write half a surrogate pair.
    return _encode(fields).encode("utf-8", "replace").decode() if fields else ""


def _leaves(name: str) -> bool:
    """Nothing is extracted, so such a name does no harm here; but a tar that has it is not to be trusted."""
    return name.startswith("/") or ".." in name.split("/") or bool(set(name) & set("\\\0"))


def _members(window: "_Window") -> Iterator[Member]:
    """Regular files and links. Ends at the block of zeros that ends a tar: without one, it is `Damaged`."""
    position = 0
    long_name: bytes | None = None
    records: dict[bytes, bytes] = {}  # of a pax header, for the next member
    while True:
        # With the last byte of the member before, which says that it is whole.
        before = min(position, 1)
        data = window(position - before, before + BLOCK)
        header = data[before:]
        if len(header) < BLOCK:
            raise Damaged(position, cut=len(data) < before)
        if not any(header):
            rest = window(position, WINDOW)
            if len(rest) == WINDOW or rest.strip(b"\0"):  # not the end but a hole in the file: who knows since where
                raise Damaged(position, cut=True)
            return
        size, kind = _number(header[124:136]), header[156:157]
        if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" ") or kind == b"S":
            raise Damaged(position)
        content = position + BLOCK
        if kind in b"LKxXg":
            if not 0 <= size <= LARGEST or len(data := window(content, size)) < size:
                raise Damaged(position)
            if kind == b"L":
                long_name = data.split(b"\0")[0]
            elif kind in b"xX":
                records = _records(data, position)
            position = _next(content, size)
            continue
        if b"size" in records:
            size = int(records[b"size"]) if re.fullmatch(rb"\d{1,18}", records[b"size"]) else -1
        if not 0 <= size < 2**62:
            raise Damaged(position)
        name = records.get(b"path") or long_name or _name(header)
        shown = name.decode("utf-8", "surrogateescape").removeprefix("./")
        sparse = any(key.startswith(b"GNU.sparse") for key in records)
        long_name, records = None, {}
        if kind in b"12" or sparse:
            yield Member(shown, content, -1)
        elif kind in b"0\0" + b"7" and not name.endswith(b"/"):
            yield Member(shown, content, size)
        position = content if kind in b"123456" else _next(content, size)


def _next(content: int, size: int) -> int:
    return content + -(-size // BLOCK) * BLOCK


def _name(header: bytes) -> bytes:
    name, prefix = (header[a:b].split(b"\0")[0] for a, b in ((0, 100), (345, 500)))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(field: bytes) -> int:
    """Octal, or binary where the first bit says so; -1: neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return -1


def _records(data: bytes, position: int) -> dict[bytes, bytes]:
    """Of a pax header: `length key=value`, one after another."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(data) and data[start]:
        space = data.find(b" ", start, start + 20)
        length = data[start : max(space, start)]
        end = start + int(length) if length.isdigit() else 0
        if not space < end <= len(data):
            raise Damaged(position)
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        records[key] = value
        start = end
    return records


class _Window:
    """Ranges of a file, read a window at a time."""

    def __init__(self, read_at: ReadAt) -> None:
        self._read_at, self._start, self._data, self._ended = read_at, 0, b"", False

    def __call__(self, offset: int, size: int) -> bytes:
        here = self._start <= offset and (self._ended or offset + size <= self._start + len(self._data))
        if not here:
            wanted = max(size, WINDOW)
            self._start, self._data = offset, self._read_at(offset, wanted)
            self._ended = len(self._data) < wanted
        start = offset - self._start
        return self._data[start : start + size]


def escaped(name: str) -> str:
    """`name` as a part of a videoid: what is not a letter, a digit or one of _ . - is %XX, and / is ~."""
    parts = (quote(part, safe="", errors="surrogateescape").replace("~", "%7E") for part in name.split("/"))
    return "~".join(parts)


def member_id(tar: str, name: str) -> str:
    """The videoid of a sample: the tar's name and its own, `00000~000000012`."""
    shard = posixpath.basename(tar).removesuffix(".tar")
    return f"{escaped(shard)}~{escaped(name)}" if name else escaped(shard)
