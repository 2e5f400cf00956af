"""Damaged and odd files, made here. A decoder gives the right frames of each, or says why not, and nothing else."""

import functools
import gzip
import io
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable

import av
import cv2
import numpy as np
import pytest
from test_video import audio_only, sequential, textured, turned, video

from pipelines.decoding import DecodePool
from pipelines.video import DECODERS, REASONS, BadVideo

SECONDS = 20  # in which each must be answered, on a busy machine


@functools.cache
def good() -> bytes:
    """ftyp, free, mdat, moov: the index comes last."""
    return video(textured(), **{"x264-params": "keyint=20"})


@functools.cache
def short(frames: int) -> bytes:
    """Encoded once: x264 may answer the same pictures otherwise another time."""
    return video(textured(frames))


@functools.cache
def index_first() -> bytes:
    """What qt-faststart makes of it, and what sites serve."""
    frames, index = good().index(b"mdat") - 4, good().index(b"moov") - 4
    moov = bytearray(good()[index:])
    at = moov.index(b"stco") + 8
    count = int.from_bytes(moov[at : at + 4], "big")
    offsets = struct.unpack_from(f">{count}I", moov, at + 4)
    struct.pack_into(f">{count}I", moov, at + 4, *(offset + len(moov) for offset in offsets))
    return good()[:frames] + bytes(moov) + good()[frames:index]


def patched(data: bytes, box: bytes, at: int, new: bytes) -> bytes:
    """Other bytes, `at` bytes after a box's type."""
    place = data.index(box) + 4 + at
    return data[:place] + new + data[place + len(new) :]


def packets(data: bytes) -> list[tuple[int, int]]:
    """Where each packet is, and its size."""
    with av.open(io.BytesIO(data)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def with_packet(data: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    at, size = packets(data)[number]
    changed = change(data[at : at + size])
    assert len(changed) == size
    return data[:at] + changed + data[at + size :]


def zeroed(data: bytes, share: float, size: int) -> bytes:
    at = int(len(data) * share)
    return data[:at] + bytes(size) + data[at + size :]


def noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


def picture(extension: str) -> bytes:
    return cv2.imencode(extension, textured(1)[0])[1].tobytes()


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("a.mp4", good())
    return target.getvalue()


def tarred() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as file:
        member = tarfile.TarInfo("a.mp4")
        member.size = len(good())
        file.addfile(member, io.BytesIO(good()))
    return target.getvalue()


def cover_alone() -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=16000, layout="mono")
        cover = file.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 96, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        file.mux(cover.encode(av.VideoFrame.from_ndarray(textured(1)[0], format="rgb24")))
        file.mux(cover.encode(None))
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        heard.sample_rate = 16000
        file.mux(sound.encode(heard))
        file.mux(sound.encode(None))
    return target.getvalue()


def remuxed(keep: Callable[[int], bool]) -> bytes:
    """Some of the good video's packets, in a file of their own."""
    target = io.BytesIO()
    with av.open(io.BytesIO(good())) as source, av.open(target, "w", format="mp4") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size and keep(number):
                packet.stream = stream
                file.mux(packet)
    return target.getvalue()


@functools.cache
def small() -> bytes:
    return video(textured(30), container="mpegts", bf="0")


@functools.cache
def large() -> bytes:
    return video(textured(30, 96, 128), container="mpegts", bf="0")


def sizes_change() -> bytes:
    """One stream whose pictures become larger."""
    target = io.BytesIO()
    with av.open(target, "w", format="mpegts") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for data, start in ((small(), 0), (large(), 30)):
            with av.open(io.BytesIO(data)) as source:
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packet.pts = packet.dts = packet.dts + 3000 * start + 9000
                        file.mux(packet)
    return target.getvalue()


def noise_for_frames() -> bytes:
    start, end = good().index(b"mdat"), good().index(b"moov") - 4
    return patched(good(), b"mdat", 0, noise(end - start - 4))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@functools.cache
def webm() -> bytes:
    return video(textured(), "libvpx-vp9", "webm")


@functools.cache
def ts() -> bytes:
    return video(textured(), container="mpegts")


@functools.cache
def gif() -> bytes:
    return video(textured(), "gif", "gif", "rgb8")


@functools.cache
def early() -> bytes:
    return video(textured(), pts=list(range(-10, 50)))


Expected = str | tuple[int, Callable[[], np.ndarray]]  # a reason, or how many frames and what they are


def first(count: int, of: Callable[[], bytes] = good) -> Expected:
    """What is left of a video: its first frames."""
    return count, functools.cache(lambda: sequential(of()))


ZOO: dict[str, tuple[Callable[[], bytes], Expected]] = {
    "no bytes": (lambda: b"", "not_a_video"),
    "one byte": (lambda: b"\0", "not_a_video"),
    "zeros": (lambda: bytes(20_000), "not_a_video"),
    "random bytes": (lambda: noise(50_000), "not_a_video"),
    "text": (lambda: b"This video is not available.\n" * 100, "not_a_video"),
    "html": (lambda: b"<!DOCTYPE html><html><body>404</body></html>" * 50, "not_a_video"),
    "json": (lambda: b'{"error": "forbidden"}', "not_a_video"),
    "zip": (zipped, "not_a_video"),
    "tar": (tarred, "not_a_video"),
    "gzip": (lambda: gzip.compress(good()), "not_a_video"),
    "jpeg": (lambda: picture(".jpg"), first(1, lambda: picture(".jpg"))),
    "png": (lambda: picture(".png"), (1, lambda: textured(1)[..., ::-1])),
    "gif": (gif, first(60, gif)),
    "sound alone": (audio_only, "no_video_stream"),
    "cover alone": (cover_alone, "no_video_stream"),
    "header alone": (lambda: good()[:32], "not_a_video"),
    "cut before its index": (lambda: good()[: len(good()) * 3 // 4], "not_a_video"),
    "cut in its index": (lambda: good()[:-300], "not_a_video"),
    "no index": (lambda: good()[: good().index(b"moov") - 4], "not_a_video"),
    "index first": (index_first, first(60)),
    "index first, cut in half": (lambda: half(index_first()), first(21)),
    "index first, cut in its last frame": (lambda: index_first()[:-40], first(60)),
    "index first, cut behind it": (lambda: index_first()[: index_first().index(b"mdat") + 4], "not_a_video"),
    "webm cut in half": (lambda: half(webm()), first(10, webm)),
    "ts cut in half": (lambda: half(ts()), first(30, ts)),
    "zeros in the middle": (lambda: zeroed(good(), 0.5, 3000), "damaged"),
    "noise for frames": (noise_for_frames, "damaged"),
    "first packet zeros": (lambda: with_packet(good(), 0, lambda p: bytes(len(p))), "damaged"),
    "first packet noise": (lambda: with_packet(good(), 0, lambda p: p[:5] + noise(len(p) - 5)), "damaged"),
    "one frame": (lambda: short(1), first(1, lambda: short(1))),
    "shorter than a clip": (lambda: short(9), first(9, lambda: short(9))),
    "65535 x 65535": (lambda: patched(good(), b"avc1", 24, b"\xff" * 4), first(60)),  # the codec knows better
    "gif of 65535 x 65535": (lambda: gif()[:6] + b"\xff" * 4 + gif()[10:], "damaged"),
    "png of 65535 x 65535": (lambda: patched(picture(".png"), b"IHDR", 0, b"\0\0\xff\xff" * 2), "damaged"),
    "index of 4 GB": (lambda: patched(good(), b"moov", -8, b"\xff" * 4), first(60)),
    "index of no size": (lambda: patched(good(), b"moov", -8, b"\0\0\0\1"), "no_video_stream"),
    "duration of 2^32": (lambda: patched(good(), b"mvhd", 16, b"\xff" * 4), first(60)),
    "4 billion times": (lambda: patched(good(), b"stts", 4, b"\xff" * 4), "not_a_video"),
    "4 billion sizes": (lambda: patched(good(), b"stsz", 8, b"\xff" * 4), "not_a_video"),
    "frames beyond its end": (lambda: patched(good(), b"stco", 8, b"\x7f\xff\xff\xff"), "not_a_video"),
    "no parameter sets": (lambda: patched(good(), b"avcC", 6, bytes(20)), "damaged"),
    "noise for parameter sets": (lambda: patched(good(), b"avcC", 6, noise(20)), "damaged"),
    "no frames": (lambda: remuxed(lambda number: False), "not_a_video"),
    "frames of no bytes": (lambda: patched(good(), b"stsz", 12 + 4 * 30, bytes(16)), "damaged"),
    "frame of 2 GB": (lambda: patched(good(), b"stsz", 12 + 4 * 30, b"\x7f\xff\xff\xff"), first(30)),
    "sizes change": (sizes_change, "damaged"),
    "encrypted": (lambda: good().replace(b"avc1", b"encv"), "unknown_codec"),
    "unknown codec": (lambda: good().replace(b"avc1", b"zzzz"), "unknown_codec"),
    "times below 0": (early, first(50, early)),
    "times that repeat": (lambda: patched(good(), b"stts", 12, bytes(4)), "no_timestamps"),
    "no times": (lambda: video(textured(), container="h264"), "no_timestamps"),
    "turned": (lambda: turned(good(), 90), (60, lambda: np.rot90(sequential(good()), -1, (1, 2)))),
    "two files": (lambda: good() + good(), first(60)),
    "text behind": (lambda: good() + b"<html>" * 100, first(60)),
    "text before": (lambda: b"HTTP/1.1 200 OK\r\n\r\n" + good(), "not_a_video"),
}


def clip(count: int) -> list[int]:
    """Without the last frame, which a cut may have gone through."""
    return list(range(3, count - 1, 4)) or [0]


def outcome(decode: Callable[[bytes], np.ndarray], data: bytes) -> np.ndarray | str:
    try:
        return decode(data)
    except BadVideo as error:
        return "an internal word" if re.search("Errno|<none>|^$", str(error)) else error.reason


def assert_expected(found: np.ndarray | str, expected: Expected) -> None:
    if isinstance(found, str) or isinstance(expected, str):
        found = found if isinstance(found, str) else f"{len(found)} frames"
        assert found == expected
        assert found in REASONS
    else:
        np.testing.assert_array_equal(found, expected[1]()[clip(expected[0])])


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ZOO)
def test_right_frames_or_a_reason(decoder, name):
    make, expected = ZOO[name]
    data = make()

    def decode(data: bytes) -> np.ndarray:
        video = DECODERS[decoder](data)
        return video.frames(clip(video.count))

    assert_expected(outcome(decode, data), expected)


@functools.cache
def undamaged() -> list[np.ndarray]:
    return [*sequential(good()), *sequential(small()), *sequential(large())]


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ZOO)
def test_a_frame_of_it_is_whole_or_refused(decoder, name):
    make, expected = ZOO[name]
    try:
        video = DECODERS[decoder](make())
    except BadVideo:
        return
    # Some have lost frames and count only those that are left.
    every = iter(undamaged() if isinstance(expected, str) or name == "frame of 2 GB" else expected[1]())
    for i in range(video.count):
        frame = outcome(lambda _, i=i: video.frames([i]), b"")
        if not isinstance(frame, str):
            assert any(np.array_equal(frame[0], other) for other in every), (
                f"frame {i} is none of the undamaged video's"
            )


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_process_of_its_own_answers_the_same(decoder):
    with DecodePool(DECODERS[decoder], SECONDS) as pool:
        process = pool._children[0]._process
        for make, expected in ZOO.values():
            found = outcome(lambda data: pool(data, lambda count, fps: clip(count), 64, 96).frames.numpy(), make())
            if make is not ZOO["turned"][0]:  # it would be made to fit
                assert_expected(found, expected)
        assert pool._children[0]._process is process


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n"]
)
def test_a_list_of_other_files_reads_none_of_them(decoder, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.ts").write_bytes(ts())
    with pytest.raises(BadVideo) as error:
        DECODERS[decoder](text.format("secret.ts").encode())
    assert error.value.reason == "not_a_video"
