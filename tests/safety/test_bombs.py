"""Small files that claim to be huge, or that would run something: each is refused in little memory."""

import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from cil.checkpoints import read
from cil.images import read_image
from cil.initial_noise import InitialNoise
from pipelines import images, storage
from pipelines.catalog import read_catalog
from pipelines.clips import MOST
from pipelines.config import CatalogConfig, load
from pipelines.decoding import _refuse_large
from pipelines.errors import UserError
from pipelines.images import read_images
from pipelines.secrets import environment_without

ROOT = Path(__file__).parents[2]

ROOM = 600  # MB that a refusal may take: a table may have 256 MiB, once as columns and once as rows


@pytest.fixture(autouse=True)
def _in_little_memory() -> Iterator[None]:
    """Peak memory of this process does not grow by more."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    yield
    assert _memory("VmHWM") - before < ROOM


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))


# -- weights and initial noise -----------------------------------------------------------------------------------------


def noise_of(mean: object) -> dict[str, object]:
    return {"Expectation_x_0": mean, "trCov_d": 1.0}


def saved(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


class Room:
    """Unpickled, takes memory."""

    def __reduce__(self) -> tuple:
        return bytearray, (2**33,)


class Runs:
    """Unpickled without care, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def deflated(data: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as after:
        for member in before.infolist():
            after.writestr(member.filename, before.read(member))
    return target.getvalue()


def overlapping(data: bytes, times: int = 40) -> bytes:
    """The largest member listed many times over under other names: all of them are the same bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        largest = max(members, key=lambda member: member.file_size)
        begin = archive.start_dir
    target = io.BytesIO(data[:begin])
    target.seek(begin)
    listed = [(each.filename, each) for each in members]
    listed += [(f"{largest.filename}{number:03}", largest) for number in range(times)]
    for name, each in listed:
        size = each.file_size
        fixed = (b"PK\1\2", 20, 20, 0, 0, 0, 0, each.CRC, size, size, len(name), 0, 0, 0, 0, 0, each.header_offset)
        target.write(struct.pack("<4s6H3L5H2L", *fixed) + name.encode())
    end = target.tell()
    target.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(listed), len(listed), end - begin, begin, 0))
    return target.getvalue()


ZEROS = torch.zeros(1)
BOMBS = {
    "an expanded view": lambda: saved(noise_of(ZEROS.expand(16, 4, 100000, 100000))),
    "an expanded view of long ago": lambda: saved(noise_of(ZEROS.expand(16, 4, 100000, 100000)), legacy=True),
    "a bytearray": lambda: saved(noise_of(torch.zeros(1, 1, 1, 1)) | {"more": Room()}),
    "a bytearray of long ago": lambda: saved(noise_of(torch.zeros(1, 1, 1, 1)) | {"more": Room()}, legacy=True),
    "a bytearray in a pickle": lambda: pickle.dumps({"a": Room()}, protocol=2),
    "compressed zeros": lambda: deflated(saved(noise_of(torch.zeros(16, 4, 1000, 200)))),
    "members that overlap": lambda: overlapping(saved(noise_of(torch.zeros(16, 4, 100, 100)))),
    "a storage larger than the file": lambda: saved(noise_of(torch.zeros(70000)), legacy=True).replace(
        (70000).to_bytes(4, "little"), (2**31 - 5).to_bytes(4, "little")
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_weights_and_initial_noise_take_no_more_memory_than_their_file_is_large(bomb, tmp_path):
    for name in ("a.pt", "a.ckpt", "a.bin"):
        path = tmp_path / name
        path.write_bytes(BOMBS[bomb]())
        for loading in (InitialNoise.load, read):
            with pytest.raises(ValueError, match=str(path)) as refused:
                loading(path)
            assert "\n" not in str(refused.value)


def test_many_names_of_one_small_storage_are_no_weights(tmp_path):
    shared = torch.zeros(1000)
    torch.save({f"weight {i}": shared for i in range(1000)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="claim 4000000 bytes and hold 4000"):
        read(tmp_path / "a.ckpt")
    torch.save({"a": shared, "tied": shared}, tmp_path / "b.ckpt")
    assert len(read(tmp_path / "b.ckpt")) == 2


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_payload_in_weights_or_initial_noise_is_not_run(name, form, tmp_path):
    path, made = tmp_path / name, tmp_path / "ran"
    bomb = noise_of(Runs(made))
    path.write_bytes(pickle.dumps(bomb, 2) if form == "pickle" else saved(bomb, legacy=form == "legacy"))
    for loading in (InitialNoise.load, read):
        with pytest.raises(ValueError, match=str(path)):
            loading(path)
        assert not made.exists()
    pickle.loads(pickle.dumps(bomb))
    assert made.exists()  # where one lets it


def test_an_index_of_pieces_names_none_outside_of_its_folder(tmp_path):
    torch.save({"a": ZEROS}, tmp_path / "secret.bin")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/model.bin.index.json").write_text('{"weight_map": {"a": "../secret.bin"}}')
    with pytest.raises(ValueError, match="names files outside its folder"):
        read(tmp_path / "in")


# -- pictures and tables -----------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes, **chunks: bytes) -> bytes:
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), **chunks, "IDAT": data, "IEND": b""}
    framed = (
        struct.pack(">I", len(d)) + n.encode() + d + struct.pack(">I", zlib.crc32(n.encode() + d))
        for n, d in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_a_picture_of_more_pixels_or_words_than_anybody_has_is_refused():
    nothing = zlib.compress(bytes(10**8), 9)  # 97 kB
    for bomb in (
        png(30000, 30000, nothing),
        png(8, 8, zlib.compress(bytes(72)), zTXt=b"a\0\0" + nothing),
        png(2**31 - 1, 2**31 - 1, b""),
    ):
        with pytest.raises(ValueError, match="expected one picture"):
            read_image(bomb, 8, 8)
    assert read_image(png(8, 8, nothing), 8, 8).shape == (8, 8, 3)  # what is behind its last row is not unpacked


def test_a_file_of_a_picture_or_a_caption_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "PICTURE", 10**6)
    for name, size in {"a.png": 2**40, "b.png": 9}.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # a hole, which takes no space
    assert {each.id: each.problem for each in read_images(str(tmp_path))} == {"a": "damaged", "b": ""}
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"cannot be read \(has more than the 1048576 bytes that are read\)"):
        read_images(str(tmp_path))
    (tmp_path / "v.mp4").write_bytes(b"")
    (tmp_path / "b.txt").rename(tmp_path / "v.txt")
    with pytest.raises(UserError, match=r"v\.txt: cannot be read"):
        read_catalog(CatalogConfig(folder=str(tmp_path)), "")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_that_unpacks_to_more_than_a_table_has_is_refused(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        long = pa.array(["x" * 2**20]).dictionary_encode()
        rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), long.dictionary)
        table = pa.table({"image": rows})
        pa.parquet.write_table(table, path, compression="zstd", store_schema=False)
        assert path.stat().st_size < 2**16  # 100 GB
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(UserError, match=r"hold more than 256 MiB|has more than"):
        read_images(str(path))


# -- videos ------------------------------------------------------------------------------------------------------------


def test_frames_of_more_bytes_than_a_worker_takes_are_refused_before_they_are_decoded():
    class Huge:
        size = (16384, 16384)

    with pytest.raises(ValueError, match=r"16 frames of 16384x16384 are 12\.9 GB, and 4\.29 GB are allowed"):
        _refuse_large(3 * 16 * 16384**2, MOST, range(16), Huge())


def test_the_file_of_a_video_that_is_too_large_costs_its_own_row(tmp_path, monkeypatch):
    from in_process import instead_of_ray

    from pipelines.cache import REJECTS, build_cache

    instead_of_ray(monkeypatch)
    monkeypatch.setattr("pipelines.clips.MOST", 10**6)
    with (tmp_path / "a.mp4").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "v.csv").write_text("videoid,name\na,c\n")
    small = ("family.preset=tiny", "family.frames=2", "family.height=16", "family.width=16")
    config = load(None, [*small, f"out={tmp_path}/out", f"catalog.csv={tmp_path}/v.csv", f"catalog.videos={tmp_path}"])
    (line,) = storage.read_rows(f"{build_cache(config).manifest.uri}/{REJECTS}")
    assert (line["reason"], line["message"]) == ("too_large", "has more than the 1000000 bytes that are read")


def test_a_process_that_decodes_a_strangers_video_has_none_of_our_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-nobody-may-see")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
    given = environment_without()
    assert "PATH" in given
    assert not {"a-secret-nobody-may-see", "hunter2hunter2"} & set(given.values())


# -- tars and configurations -------------------------------------------------------------------------------------------


def test_a_tar_that_claims_more_than_it_holds_takes_no_memory(tmp_path):
    import tarfile

    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = tarfile.TarInfo("a.txt")
        info.type, info.size = kind, 2**40
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
        table = read_catalog(CatalogConfig(tars=f"{tmp_path}/a.tar"), "") if kind == tarfile.REGTYPE else None
        if table:
            assert set(table.problems()) <= {"damaged_tar", "missing"}
        else:
            with pytest.raises(UserError, match=r"holds no videos|is no tar"):
                read_catalog(CatalogConfig(tars=f"{tmp_path}/a.tar"), "")


NAMES = "abcdefghi"
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise(NAMES)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "its aliases make 490329055 values"),
        ("a: &a [*a]", "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("out: 2001-99-99", "month must be in"),
        ("seed: " + "1" * 5000, "Exceeds the limit"),
        ("seed: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("seed: !!python/name:os.system", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable key"),
    ],
    ids=["aliases of aliases", "a circle", "deep", "no date", "no number", "a call", "a name", "a list as key"],
)
def test_a_configuration_that_is_an_attack_is_one_line(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=says) as refused:
        load("c.yaml")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_file_without_an_end_is_no_configuration():
    """In a process that may not take the machine's memory."""
    job = f"ulimit -v 8000000; exec {sys.executable} -m jobs.make_shapes --config /dev/zero"
    done = subprocess.run(["bash", "-c", job], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert (
        done.stderr
        == "make_shapes: --config /dev/zero: holds more than 1 MiB; name a YAML file such as jobs/configs/demo.yaml\n"
    )


@pytest.mark.parametrize("value", ["[" * 3000, "2001-99-99", "1" * 5000, "!!python/name:os.system", "*a", "&a [*a]"])
def test_an_override_that_is_an_attack_is_one_line(value):
    with pytest.raises(UserError, match="the value is not YAML"):
        load(None, [f"seed={value}"])
