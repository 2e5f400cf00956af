"""The one place that reads and writes files: a URI is a local path or s3://bucket/key. Writes are whole or absent."""

import errno
import fcntl
import glob as local_glob
import hashlib
import json
import os
import posixpath
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from pipelines.errors import UserError
from pipelines.secrets import redacted

# Seconds, not the seven minutes that botocore waits by default for an endpoint that accepts and never answers. Between
# attempts botocore waits, longer each time.
ATTEMPTS = 3
S3_LIMITS = {
    "connect_timeout": 3,
    "read_timeout": 4,
    "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
    "max_pool_connections": 64,  # of a process, all its threads together; 10 by default
}
NO_FILE = "is a pipe, a device or of /proc, and no file"
NO_FILES = ("/proc/", "/sys/")  # although they are said to be
TOLD = 2**30  # bytes of a table that a run of somebody else's may name
AT_ONCE = 16  # requests that keep a store busy
PATIENCE = 8  # seconds after which what broke off is not asked for again: less than botocore takes for a dead endpoint

T = TypeVar("T")


class Unfit(OSError):
    """No file, or too large a one: to try again would not help."""


def is_local(uri: str) -> bool:
    return "://" not in uri


def join(uri: str, *names: str) -> str:
    return posixpath.join(uri, *names)


def leaves(name: str) -> bool:
    """Whether a name that somebody else may have written is none of a file in the folder that it is joined to."""
    return not name or name.startswith("/") or ".." in name.split("/") or "://" in name or "\0" in name


def inside(uri: str, name: str) -> str:
    if leaves(name):
        raise UserError(f"{uri}: {name!r} is named as a file in it, and is none: this is not as we wrote it")
    return posixpath.join(uri, name)


def exists(uri: str) -> bool:
    if is_local(uri):
        return os.path.exists(uri)
    with _remote(uri) as remote:
        return bool(remote.exists(uri))


def read(uri: str, most: int | None = None) -> bytes:
    """`most`: bytes that somebody else's file may have; a larger one is Unfit."""
    if most is not None:
        data = read_range(uri, 0, most + 1)
        if len(data) > most:
            raise Unfit(errno.EFBIG, f"has more than the {most} bytes that are read", uri)
        return data
    if is_local(uri):
        return read_range(uri, 0, -1)
    with _remote(uri) as remote:
        # One request at a time, or it would ask for the size before.
        return _to_its_end(lambda: bytes(remote.cat_file(uri, max_concurrency=1)))


def read_range(uri: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on (-1: all), or as many as there are: none behind the end."""
    with ranges(uri) as read_at:
        return read_at(offset, size)


@contextmanager
def ranges(uri: str) -> Iterator[Callable[[int, int], bytes]]:
    """read_range for many ranges of one file, which is opened once."""
    if is_local(uri):
        with open_file(uri) as file:
            yield lambda offset, size: _at(file, offset, size)
        return
    with _remote(uri) as remote:
        yield lambda offset, size: _fetched(remote, uri, offset, size)


def open_file(path: str) -> FileIO:
    """To read, if it is one: a pipe may never answer, a device never end, and /proc tells of this process."""
    try:
        file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            raise Unfit(errno.EINVAL, NO_FILE, path) from None
        raise
    try:
        kind = os.fstat(file.fileno()).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(kind) or os.readlink(f"/proc/self/fd/{file.fileno()}").startswith(NO_FILES):
            raise Unfit(errno.EINVAL, NO_FILE, path)
    except OSError:
        file.close()
        raise
    return file


def _at(file: FileIO, offset: int, size: int) -> bytes:
    left = max(0, os.fstat(file.fileno()).st_size - offset)
    size = left if size < 0 else min(size, left)  # Python takes memory for as much as is asked for
    file.seek(offset)
    data = file.read(size) or b""
    while 0 < len(data) < size and (more := file.read(size - len(data))):  # one read gives 2 GiB at most
        data += more
    return data


def _fetched(remote: Any, uri: str, offset: int, size: int) -> bytes:
    if not size:
        return b""
    try:
        return _to_its_end(lambda: bytes(remote.cat_file(uri, start=offset, end=None if size < 0 else offset + size)))
    except OSError as error:
        # S3 has no empty ranges: it refuses one that begins behind the end.
        answer = getattr(error.__cause__, "response", {})
        if answer.get("Error", {}).get("Code") in ("InvalidRange", "416"):
            return b""
        raise


def write(uri: str, data: bytes | bytearray) -> None:
    """A reader sees all of `data` or what was there before, whatever is killed when."""
    if not is_local(uri):
        with _remote(uri) as remote:
            remote.pipe_file(uri, data)
        return
    with creating(uri) as path:
        path.write_bytes(data)


def remove(uri: str) -> None:
    if is_local(uri):
        Path(uri).unlink(missing_ok=True)
        return
    with _remote(uri) as remote:
        remote.rm(uri)


def remove_folder(uri: str) -> None:
    """One that is empty; a store has no folders."""
    if is_local(uri):
        with suppress(OSError):  # somebody else writes to it
            os.rmdir(uri)


def put(local: Path, uri: str) -> None:
    """A file of any size, to stand at `uri` whole or not at all."""
    if is_local(uri):
        with creating(uri) as path:
            shutil.copyfile(local, path)
        return
    with _remote(uri) as remote:
        remote.put_file(str(local), uri)


@contextmanager
def creating(uri: str) -> Iterator[Path]:
    """A path to write to, which takes the place of `uri` when it is whole, and is gone if it never is."""
    if not is_local(uri):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, posixpath.basename(uri))
            yield path
            put(path, uri)
        return
    folder = os.path.dirname(uri)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".unfinished-")
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, uri)
    except BaseException:
        os.unlink(temporary)
        raise


def kept_copy(uri: str) -> Path:
    """A local file or folder with what stands at `uri`: downloaded once for each machine and version."""
    if is_local(uri):
        if os.path.exists(uri) and not os.path.isdir(uri):
            open_file(uri).close()
        return Path(uri)
    with _remote(uri) as remote:
        found = remote.find(uri, detail=True)
        if not found:
            raise FileNotFoundError(f"{uri}: there is nothing")
        root = remote._strip_protocol(uri).rstrip("/")
        for path in found.keys() - {root}:
            inside(uri, path.removeprefix(f"{root}/"))  # a key may be anything, and becomes a path here
        version = repr(sorted((path, info.get("size"), info.get("ETag")) for path, info in found.items()))
        cache = downloads()
        kept = cache / hashlib.sha256(version.encode()).hexdigest()[:16] / posixpath.basename(uri.rstrip("/"))
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{kept.parent.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a machine downloads; a killed one lets go
            if not kept.exists():
                unfinished = cache / f".unfinished-{kept.parent.name}"
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                _to_its_end(lambda: remote.get(uri, str(unfinished / kept.name), recursive=True))
                os.replace(unfinished, kept.parent)
    return kept


def kept_result(uri: str, code: str, make: Callable[[], bytes]) -> bytes:
    """What `make` finds out about the file at `uri`: kept on this machine for each version of it, and of our `code`."""
    if is_local(uri):
        return make()
    with _remote(uri) as remote:
        info = remote.info(uri)
    version = repr((uri, info.get("size"), info.get("ETag"), code))
    kept = downloads() / f"{hashlib.sha256(version.encode()).hexdigest()[:16]}.kept"
    if not kept.exists():
        write(str(kept), make())
    return kept.read_bytes()


def downloads() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "cil")


def read_json(uri: str, most: int | None = None) -> Any:
    return _parsed(read(uri, most))


def read_rows(uri: str, most: int | None = None) -> list[dict[str, Any]]:
    """A small table: JSON lines."""
    return [_parsed(line) for line in read(uri, most).splitlines()]


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_rows(uri: str, rows: list[dict[str, Any]]) -> None:
    write(uri, to_rows(rows))


def to_rows(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def names(uri: str) -> set[str]:
    """The names of the files in a folder; none where there is no such folder."""
    if is_local(uri):
        return {e.name for e in os.scandir(uri)} if os.path.isdir(uri) else set()
    with _remote(uri) as remote, suppress(FileNotFoundError):
        return {posixpath.basename(path) for path in remote.ls(uri, detail=False)}
    return set()


def glob(uri: str) -> list[str]:
    """The URIs of the files that match * ? [a-z] **, sorted. A file with just this name is meant before a pattern."""
    if not local_glob.has_magic(uri):
        return [uri] if exists(uri) else []
    if is_local(uri):
        if os.path.isfile(uri):
            return [uri]
        return sorted(path for path in local_glob.glob(uri, recursive=True) if os.path.isfile(path))
    with _remote(uri) as remote:
        if remote.isfile(uri):
            return [uri]
        found = remote.glob(uri, detail=True)
        return sorted(remote.unstrip_protocol(path) for path, info in found.items() if info["type"] == "file")


def files_below(uri: str) -> list[str]:
    """The names, relative to this folder, of all files in it and in its folders, sorted."""
    if not is_local(uri):
        with _remote(uri) as remote:
            skipped = len(remote._strip_protocol(uri).rstrip("/")) + 1
            return sorted(path[skipped:] for path in remote.find(uri) if path[skipped:] and not path.endswith("/"))
    found: list[str] = []
    walked = {os.path.realpath(uri)}  # links are followed, but not in circles
    for folder, inner, inside in os.walk(uri, onerror=_raise, followlinks=True):
        start = os.path.relpath(folder, uri)
        found += inside if start == "." else (f"{start}/{name}" for name in inside)
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(inner)}
        inner[:] = [name for name, path in real.items() if path not in walked]
        walked.update(real.values())
    return sorted(found)


def versions_below(uri: str) -> dict[str, list[Any]]:
    """Of the same files the bytes of each, and what is another one when it is written anew: its time, or its ETag."""
    if is_local(uri):
        paths = {name: os.path.join(uri, name) for name in files_below(uri)}
        stats = {name: os.stat(path) if os.path.exists(path) else os.lstat(path) for name, path in paths.items()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    with _remote(uri) as remote:
        skipped = len(remote._strip_protocol(uri).rstrip("/")) + 1
        found = {path[skipped:]: info for path, info in remote.find(uri, detail=True).items()}
        kept = {name: info for name, info in sorted(found.items()) if name and not name.endswith("/")}
        return {name: [int(info["size"]), info.get("ETag")] for name, info in kept.items()}


def _raise(error: OSError) -> None:
    """What os.walk would pass over: a folder that cannot be read is not an empty one."""
    raise error


def _to_its_end(fetch: Callable[[], T]) -> T:
    """botocore asks again until an answer begins. One that breaks off in its middle is for us to ask for again."""
    from aiohttp import ClientError
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    begin = time.monotonic()
    for attempt in range(1, ATTEMPTS):
        try:
            return fetch()
        except (HTTPClientError, IncompleteReadError, ClientError, TimeoutError, ConnectionError):
            if time.monotonic() - begin > PATIENCE:
                raise
            time.sleep(random.uniform(0.1, 0.3) * 2**attempt)
    return fetch()


@contextmanager
def _remote(uri: str) -> Iterator[Any]:
    """An fsspec filesystem, imported only where one is needed. What goes wrong is an OSError, as on a disk."""
    if not uri.startswith("s3://"):  # what a run of somebody else's names may be of any protocol that fsspec knows
        raise Unfit(errno.EINVAL, "neither a local path nor s3://", uri)
    import fsspec
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    # No cache of listings: other workers write beside us.
    filesystem = fsspec.filesystem("s3", config_kwargs=S3_LIMITS, use_listings_cache=False)
    filesystem.retries = 1  # botocore tries again by itself
    try:
        yield filesystem
    except TimeoutError as error:  # fsspec's says nothing
        raise TimeoutError(f"{uri}: {error or 'an answer stopped in its middle'}") from error
    except (BotoCoreError, ClientError) as error:
        raise OSError(redacted(f"{uri}: {error}")) from error  # it quotes the endpoint's address
