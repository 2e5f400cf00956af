"""The one place that reads and writes files: a URI is a local path or s3://bucket/key. Writes are whole or absent."""

import fcntl
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

# Seconds, not the seven minutes that botocore waits by default for an endpoint that accepts and never answers.
S3_LIMITS = {"connect_timeout": 3, "read_timeout": 20, "retries": {"total_max_attempts": 3}}


def is_local(uri: str) -> bool:
    return "://" not in uri


def join(uri: str, *names: str) -> str:
    return posixpath.join(uri, *names)


def exists(uri: str) -> bool:
    if is_local(uri):
        return os.path.exists(uri)
    with _remote(uri) as remote:
        return bool(remote.exists(uri))


def read(uri: str) -> bytes:
    if is_local(uri):
        return Path(uri).read_bytes()
    with _remote(uri) as remote:
        return bytes(remote.cat_file(uri))


def write(uri: str, data: bytes) -> None:
    """A reader sees all of `data` or what was there before, whatever is killed when."""
    if not is_local(uri):
        with _remote(uri) as remote:
            remote.pipe_file(uri, data)
        return
    with _in_place_of(uri) as file:
        file.write(data)


def put(local: Path, uri: str) -> None:
    """A file of any size, to stand at `uri` whole or not at all."""
    if is_local(uri):
        with local.open("rb") as source, _in_place_of(uri) as file:
            shutil.copyfileobj(source, file)
        return
    with _remote(uri) as remote:
        remote.put_file(str(local), uri)


@contextmanager
def _in_place_of(path: str) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole, and is gone if it never is."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".unfinished-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def kept_copy(uri: str) -> Path:
    """A local file or folder with what stands at `uri`: downloaded once for each machine and version."""
    if is_local(uri):
        return Path(uri)
    with _remote(uri) as remote:
        found = remote.find(uri, detail=True)
        if not found:
            raise FileNotFoundError(f"{uri}: there is nothing")
        version = repr(sorted((path, info.get("size"), info.get("ETag")) for path, info in found.items()))
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "cil")
        kept = cache / hashlib.sha256(version.encode()).hexdigest()[:16] / posixpath.basename(uri.rstrip("/"))
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{kept.parent.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a machine downloads; a killed one lets go
            if not kept.exists():
                unfinished = cache / f".unfinished-{kept.parent.name}"
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                remote.get(uri, str(unfinished / kept.name), recursive=True)
                os.replace(unfinished, kept.parent)
    return kept


def read_rows(uri: str) -> list[dict[str, Any]]:
    """A small table: JSON lines."""
    return [json.loads(line) for line in read(uri).splitlines()]


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


@contextmanager
def _remote(uri: str) -> Iterator[Any]:
    """An fsspec filesystem, imported only where one is needed. What goes wrong is an OSError, as on a disk."""
    import fsspec
    from botocore.exceptions import BotoCoreError

    # No cache of listings: other workers write beside us.
    filesystem = fsspec.filesystem(uri.split("://")[0], config_kwargs=S3_LIMITS, use_listings_cache=False)
    filesystem.retries = 1  # botocore tries again by itself
    try:
        yield filesystem
    except BotoCoreError as error:
        raise OSError(f"{uri}: {error}") from error
