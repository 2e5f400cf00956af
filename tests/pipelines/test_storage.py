import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from pipelines import storage


def test_what_is_written_is_read_and_listed(tmp_path):
    uri = str(tmp_path / "a" / "b.bin")
    storage.write(uri, b"12")
    assert storage.read(uri) == b"12"
    assert storage.names(str(tmp_path / "a")) == {"b.bin"}
    assert storage.names(str(tmp_path / "nowhere")) == set()


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    uri = str(tmp_path / "b.bin")
    storage.write(uri, b"before")

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        storage.write(uri, b"after")
    assert storage.read(uri) == b"before"
    assert storage.names(str(tmp_path)) == {"b.bin"}


def test_a_file_is_put_whole_or_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "local").write_bytes(b"1" * 3_000_000)
    uri = str(tmp_path / "unet" / "b.bin")
    storage.put(tmp_path / "local", uri)
    assert Path(uri).read_bytes() == b"1" * 3_000_000

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    (tmp_path / "local").write_bytes(b"2")
    with pytest.raises(OSError, match="No space left"):
        storage.put(tmp_path / "local", uri)
    assert storage.names(str(tmp_path / "unet")) == {"b.bin"}
    assert storage.read(uri) == b"1" * 3_000_000


def _write_for_ever(uri: str) -> None:
    while True:
        for byte in (b"a", b"b"):
            storage.write(uri, byte * 5_000_000)


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    uri = str(tmp_path / "b.bin")
    storage.write(uri, b"a" * 5_000_000)
    for _ in range(3):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(uri,))
        writer.start()
        before = os.stat(uri).st_ino
        while os.stat(uri).st_ino == before:  # until it is in the middle of writing
            pass
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        data = storage.read(uri)
        assert len(data) == 5_000_000
        assert len(set(data)) == 1


def test_rows_go_to_json_lines_and_back(tmp_path):
    rows = [{"a": 1, "b": "ä\n"}, {"a": 2.5, "b": None}]
    storage.write_rows(str(tmp_path / "t.jsonl"), rows)
    assert storage.read_rows(str(tmp_path / "t.jsonl")) == rows


def test_ranges_are_read_and_there_is_nothing_behind_the_end(tmp_path):
    uri = str(tmp_path / "digits")
    storage.write(uri, b"0123456789")
    with storage.ranges(uri) as read_at:
        found = [read_at(*place) for place in ((0, 3), (3, 99), (7, -1), (10, 5), (99, 5), (2, 0))]
    assert found == [b"012", b"3456789", b"789", b"", b"", b""]
    assert storage.read_range(uri, 4, 2) == b"45"
    with pytest.raises(FileNotFoundError):
        storage.read_range(str(tmp_path / "none"), 0, 5)


def test_files_are_found_by_pattern_and_below_a_folder(tmp_path):
    for name in ("b.tar", "a.tar", "sub/c.tar", "sub/d.txt", "[a].tar", "folder.tar/x"):
        storage.write(f"{tmp_path}/{name}", b"x")
    patterns = ("*.tar", "**/*.tar", "*", "[a].tar", "[b].tar", "a.tar", "none.tar", "none/*.tar")
    found = {p: [uri.removeprefix(f"{tmp_path}/") for uri in storage.glob(f"{tmp_path}/{p}")] for p in patterns}
    assert found == {
        "*.tar": ["[a].tar", "a.tar", "b.tar"],
        "**/*.tar": ["[a].tar", "a.tar", "b.tar", "sub/c.tar"],
        "*": ["[a].tar", "a.tar", "b.tar"],
        "[a].tar": ["[a].tar"],
        "[b].tar": ["b.tar"],
        "a.tar": ["a.tar"],
        "none.tar": [],
        "none/*.tar": [],
    }
    assert storage.files_below(str(tmp_path)) == ["[a].tar", "a.tar", "b.tar", "folder.tar/x", "sub/c.tar", "sub/d.txt"]
    with pytest.raises(FileNotFoundError):
        storage.files_below(f"{tmp_path}/none")
