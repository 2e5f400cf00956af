"""Names that lead out of a folder, and files that are none: tried on everything that takes one from a stranger."""

import csv
import io
import json
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import boto3
import numpy as np
import pytest
import torch
from in_process import instead_of_ray

from cil.checkpoints import read
from cil.initial_noise import InitialNoise
from pipelines import storage
from pipelines.artifact import Manifest
from pipelines.cache import REJECTS, Cache, build_cache, read_cache
from pipelines.catalog import read_catalog
from pipelines.checkpoints import Stored
from pipelines.config import CatalogConfig, load
from pipelines.errors import UserError
from pipelines.generate import Sampler
from pipelines.images import read_images
from pipelines.scorer import Seen
from pipelines.sets import generated
from pipelines.study import Arm, Metric, Study
from pipelines.table import Cell, Column, as_csv
from pipelines.tars import samples
from pipelines.video import BadVideo, PyAVDecoder, encode

OUT = ["../secret", "/etc/passwd", "a/../../secret", "..", "s3://bucket/secret", "file:///etc/passwd", "a\0b", ""]


@pytest.mark.parametrize("name", OUT)
def test_a_name_of_a_file_in_an_artifact_leads_to_none_outside(tmp_path, name):
    folder = str(tmp_path)
    storage.write_rows(f"{folder}/index.jsonl", [{"file": name, "clip_id": "a:0"}])
    (tmp_path / "manifest.json").write_text(json.dumps({"shapes": {}, "shards": [name]}))
    readers = [
        lambda: storage.inside(folder, name),
        lambda: generated(Manifest(folder, "videos", "", {}, {}, {})),
        lambda: Stored(folder),
    ]
    if storage.leaves(f"{name}.arrow"):
        readers.append(lambda: Cache(folder, Manifest(folder, "snapshot", "", {}, {}, {})).path(name))
    for reader in readers:
        with pytest.raises(UserError, match="is named as a file in it, and is none"):
            reader()


def test_no_snapshot_is_looked_for_outside_of_the_cache(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/latest.json").write_text(json.dumps({"snapshot": "../../elsewhere"}))
    with pytest.raises(UserError, match="is named as a file in it, and is none"):
        read_cache(load(None, [f"out={tmp_path}"]))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "file:///etc/passwd", "."])
def test_a_row_of_a_table_of_images_names_none_outside_of_its_folder(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/t.csv").write_text(f"image,id\n{name},../../id\n")
    (picture,) = read_images(f"{tmp_path}/in/t.csv")
    assert (picture.problem, picture.digest) == ("unsafe_name", "")
    assert "/" not in picture.id


@pytest.mark.parametrize(("videoid", "page"), [("../x", ""), ("x", "../.."), ("x", "/etc"), ("..", "a"), ("a/b", "")])
def test_a_row_of_a_csv_and_a_member_of_a_tar_name_none_outside(tmp_path, videoid, page):
    (tmp_path / "v.csv").write_text(f"videoid,name,page_dir\n{videoid},c,{page}\n")
    (video,) = read_catalog(CatalogConfig(csv=f"{tmp_path}/v.csv", videos=str(tmp_path)), "").videos(0, 1)
    assert (video.problem, video.sources) == ("unsafe_name", ())
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(f"{page or '..'}/../x{videoid}.mp4"))
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        caption = tarfile.TarInfo("link.txt")
        caption.type, caption.linkname = tarfile.LNKTYPE, "/etc/passwd"
        tar.addfile(caption)
    data = shard.getvalue()
    found = samples(lambda offset, size: data[offset : offset + size])
    assert [(each.problem, each.caption) for each in found] == [("unsafe_name", ""), ("missing", "")]


# -- what is no file ---------------------------------------------------------------------------------------------------


def in_time(call: Callable[[], object], seconds: float = 5) -> BaseException | None:
    """What it raises. A call that hangs fails the test; its thread ends with the process."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert raised, "it hangs"
    return raised[0]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


KINDS = {
    "pipe": pipe,
    "endless device": link_to("/dev/zero"),
    "environment": link_to("/proc/self/environ"),
    "memory": link_to("/proc/self/mem"),
    "socket": bound,
}


@pytest.fixture(params=KINDS)
def special(request, tmp_path) -> Callable[[str], Path]:
    """special("a.png") -> a path that is no file."""

    def made(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        KINDS[request.param](path)
        return path

    return made


def test_what_is_no_file_is_never_read_and_never_waited_for(special, tmp_path):
    path = str(special("it"))
    calls = (
        lambda: storage.read(path),
        lambda: storage.read_range(path, 0, 10),
        lambda: storage.read_rows(path),
        lambda: storage.kept_copy(path),
    )
    for call in calls:
        assert isinstance(in_time(call), OSError)


def test_a_folder_of_videos_with_a_caption_that_is_none_is_refused_by_its_name(special, tmp_path):
    """/proc/self/environ as the caption of a video would be cached, and shown on the page."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"")
    special("videos/a.txt")
    raised = in_time(lambda: read_catalog(CatalogConfig(folder=f"{tmp_path}/videos"), ""))
    assert isinstance(raised, UserError | OSError)
    assert "a.txt" in str(raised)


def test_a_catalog_that_is_none_is_refused_by_its_name(special):
    for key, name in {"csv": "a.csv", "tars": "a.tar"}.items():
        path = special(name)
        raised = in_time(lambda: read_catalog(CatalogConfig(**{key: str(path)}), ""))
        assert f"catalog.{key}={path}" in str(raised)


def test_a_picture_that_is_none_costs_its_own_row(special, tmp_path):
    special("pictures/a.png")
    (tmp_path / "pictures/b.png").write_bytes(b"good enough to be read")
    found: list = []
    assert in_time(lambda: found.extend(read_images(f"{tmp_path}/pictures"))) is None
    assert {picture.id: picture.problem for picture in found} == {"a": "damaged", "b": ""}


def test_weights_and_initial_noise_that_are_none_are_refused(special):
    for name, open_it in {"a.ckpt": read, "b.pt": InitialNoise.load}.items():
        path = special(name)
        if not path.is_file():  # those of /proc end
            assert isinstance(in_time(lambda: open_it(path)), ValueError | OSError)


def test_a_video_that_is_none_costs_its_own_row(special, settings_of_one, tmp_path):
    path = special("videos/a.mp4")
    assert settings_of_one(path) in ("not_a_video", "too_large", "missing")


@pytest.fixture
def settings_of_one(tmp_path, monkeypatch):
    """settings_of_one(path) -> why the one video of a catalog is rejected, where its part is made."""

    def reason(path: Path) -> str:
        instead_of_ray(monkeypatch)
        (tmp_path / "v.csv").write_text(f"videoid,name\n{path.stem},c\n")
        small = ("family.preset=tiny", "family.frames=2", "family.height=16", "family.width=16")
        places = (f"out={tmp_path}/out", f"catalog.csv={tmp_path}/v.csv", f"catalog.videos={path.parent}")
        made: list = []
        assert in_time(lambda: made.append(build_cache(load(None, [*small, *places]))), 30) is None
        (line,) = storage.read_rows(f"{made[0].manifest.uri}/{REJECTS}")
        return line["reason"]

    return reason


def test_a_video_that_is_scored_and_is_none_is_refused(special):
    seen = object.__new__(Seen)
    seen._most = 10**6
    raised = in_time(lambda: seen._read(str(special("a.mp4"))))
    assert isinstance(raised, Exception)
    assert "cannot be read" in str(raised) or "No such device" in str(raised)


def test_no_other_protocol_than_s3_is_spoken():
    """A run in MLflow names where its scores are, whoever made it."""
    for uri in ("http://127.0.0.1:9/x", "file:///etc/passwd", "github://a:b@/x", "simplecache::s3://b/x", "ftp://h/x"):
        assert isinstance(in_time(lambda: storage.read(uri)), OSError)
        assert isinstance(in_time(lambda: storage.read_rows(uri)), OSError)


@pytest.mark.parametrize("hostile", ["=HYPERLINK(1)", "+1", "-1+cmd", "@SUM(1)", "\t=1"])
def test_a_table_has_no_formulas_of_strangers(hostile):
    column = Column(hostile, Metric(hostile, None), {hostile: Cell(None)}, set())
    rows = list(csv.reader(io.StringIO(as_csv(Study("study", {hostile: Arm(hostile)}, []), [column]))))
    assert rows[0][2] == rows[1][0] == f"'{hostile}"


def test_a_key_of_a_bucket_is_downloaded_to_no_place_outside(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    boto3.client("s3").put_object(Bucket="webvid", Key="weights/../../../../escaped.bin", Body=b"escaped")
    boto3.client("s3").put_object(Bucket="webvid", Key="weights/good.bin", Body=b"good")
    with pytest.raises(UserError, match="is named as a file in it, and is none"):
        storage.kept_copy("s3://webvid/weights")
    assert storage.kept_copy("s3://webvid/weights/good.bin").read_bytes() == b"good"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".bin"] == ["good.bin"]


def test_a_clip_of_a_strangers_cache_writes_no_video_outside(tmp_path):
    made = object.__new__(Sampler)
    made.family = SimpleNamespace(decode=lambda latents: torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match="is named as a file in it, and is none"):
        made.write(str(tmp_path / "videos"), {"file": "../../outside_0.mp4", "fps": 8}, torch.zeros(2))
    assert list(tmp_path.rglob("*.mp4")) == []


@pytest.fixture
def asked() -> Iterator[tuple[str, list[object]]]:
    """An address, and who has called there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        callers: list[object] = []

        def answer() -> None:
            with suppress(OSError):  # closed
                while True:
                    callers.append(listening.accept())

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", callers
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile mine.mp4\n",  # the one that FFmpeg by itself would follow
        "ffconcat version 1.0\nfile http://{address}/mine.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nmine.mp4\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nhttp://{address}/mine.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["a script of a file", "a script of an address", "a list of a file", "a list of an address", "a stream"],
)
def test_a_video_that_is_a_list_of_others_opens_none_of_them(script, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "mine.mp4").write_bytes(encode(frames, 8))
    address, callers = asked
    with pytest.raises(BadVideo):
        PyAVDecoder(script.format(address=address).encode())
    assert callers == []
