import functools
import io
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import decord
import numpy as np
import pytest
import torch

from pipelines.errors import UserError
from pipelines.shapes import Shape
from pipelines.video import DECODERS, BadVideo, DecordDecoder, PyAVDecoder, decode_all, encode, fit


def textured(frames: int = 60, height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth noise that drifts, so that an encoder uses frames of every type."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((height, width, 3))
    for axis in (0, 1):
        noise = sum(np.roll(noise, k, axis) for k in range(-3, 4)) / 7**0.5
    base = np.clip(127 + 60 * noise, 0, 255)
    return np.stack([np.roll(base, (t, 2 * t), (0, 1)) for t in range(frames)]).astype(np.uint8)


def video(
    frames: np.ndarray,
    codec: str = "libx264",
    container: str = "mp4",
    pixels: str = "yuv420p",
    pts: list[int] | None = None,
    tag: str | None = None,
    colour: dict[str, int] | None = None,
    movflags: str = "",
    **options: str,
) -> bytes:
    target = io.BytesIO()
    if codec == "libx264":  # whose macroblock tree answers differently now and then (docs/log.md)
        options["x264-params"] = ":".join(filter(None, ["mbtree=0", options.get("x264-params")]))
    with av.open(target, "w", format=container, container_options={"movflags": movflags} if movflags else {}) as file:
        stream = file.add_stream(codec, rate=30, options={"threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for name, value in (colour or {}).items():
            setattr(stream.codec_context, name, value)
        if tag:
            stream.codec_context.codec_tag = tag
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[i], Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


def sequential(data: bytes) -> np.ndarray:
    """Every frame, by the plainest way there is."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def bare_decord(data: bytes) -> decord.VideoReader:
    return decord.VideoReader(io.BytesIO(data), num_threads=1)


def turned(data: bytes, degrees: int) -> bytes:
    """An mp4 whose header says that it is to be shown turned clockwise."""
    at = data.index(b"tkhd") + 44  # the display matrix of a version 0 box
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    return data[:at] + struct.pack(">9i", *matrix) + data[at + 36 :]


def x264(parameters: str, **more: object) -> Callable[[], bytes]:
    return lambda: video(textured(), **{"x264-params": parameters}, **more)


def x265(parameters: str, tag: str) -> Callable[[], bytes]:
    return lambda: video(textured(), "libx265", tag=tag, **{"x265-params": f"log-level=none:{parameters}"})


def unlisted(make: Callable[[], bytes]) -> Callable[[], bytes]:
    """An mp4 without the box that lists its keyframes, so that its header calls every frame one."""
    return lambda: make().replace(b"stss", b"skip")


VFR = np.cumsum([1 + (i % 4 == 0) * 3 for i in range(60)]).tolist()

# Of these decord gives the frames itself.
PLAIN: dict[str, Callable[[], bytes]] = {
    "default": x264(""),
    "b-pyramid": x264("bframes=5:b-pyramid=normal:keyint=250"),
    "short closed gops": x264("keyint=8:min-keyint=8"),
    "no b-frames": x264("bframes=0"),
    "intra only": x264("keyint=1"),
    "full range": x264("", pixels="yuvj420p"),
    "bt709": x264("", colour={"colorspace": 1, "color_primaries": 1, "color_trc": 1}),
    "fragments": x264("keyint=12", movflags="frag_keyframe+empty_moov"),
    "mkv": x264("keyint=12", container="matroska"),
    "flv": x264("keyint=12", container="flv"),
    "variable frame rate": x264("", pts=VFR),
    "turned": lambda: turned(video(textured()), 180),
}
# Of these bare decord 0.6 gives other frames, or none.
DECORD_ERRS: dict[str, Callable[[], bytes]] = {
    "open gops": x264("keyint=12:open-gop=1:bframes=3"),
    "open gops, mkv": x264("keyint=12:open-gop=1:bframes=3", container="matroska"),
    "open gops, hevc": x265("keyint=12", "hvc1"),
    "keyframes not listed": unlisted(x264("keyint=12")),
    "intra refresh": x264("intra-refresh=1:keyint=15:bframes=0"),
    "edit list": x264("keyint=12", pts=list(range(-10, 50))),
    "annex b": x264("keyint=12", container="mpegts"),
    "annex b, open gops": x264("keyint=12:open-gop=1:bframes=3", container="mpegts"),
    "interlaced": x264("tff=1:keyint=15"),
    "10 bit": x264("", pixels="yuv420p10le"),
    "vp9, odd size": lambda: video(textured(60, 63, 97), "libvpx-vp9", "webm"),
    "mpeg-4 b-frames": lambda: video(textured(), "mpeg4", g="12", bf="2"),
    "avi": lambda: video(textured(), "mpeg4", "avi", g="12", bf="2"),
    "mpeg-2": lambda: video(textured(), "mpeg2video", "mpegts", g="12", bf="2"),
    "av1": lambda: video(textured(), "libsvtav1", g="20"),
    "gif": lambda: video(textured(), "gif", "gif", "rgb8"),
}
OTHERS: dict[str, Callable[[], bytes]] = {
    "hevc hev1": x265("keyint=12:open-gop=0", "hev1"),
    "hevc hvc1": x265("keyint=12:open-gop=0", "hvc1"),
    "vp8": lambda: video(textured(), "libvpx", "webm", g="15"),
    "vp9 alt-ref": lambda: video(textured(), "libvpx-vp9", "webm", **{"lag-in-frames": "16", "auto-alt-ref": "1"}),
    "hevc, keyframes not listed": unlisted(x265("keyint=12:open-gop=0", "hvc1")),
    "mpeg-4, keyframes not listed": unlisted(lambda: video(textured(), "mpeg4", g="12")),
    "4:4:4": x264("", pixels="yuv444p"),
    "4:4:4, odd size": lambda: video(textured(60, 63, 97), pixels="yuv444p"),
    "mpeg-4": lambda: video(textured(), "mpeg4", g="12"),
    "mjpeg": lambda: video(textured(), "mjpeg", "mov", "yuvj420p"),
    "ffv1": lambda: video(textured(), "ffv1", "matroska"),
    "long gops": lambda: video(textured(300), **{"x264-params": "keyint=250:min-keyint=250:scenecut=0"}),
}
VIDEOS = PLAIN | DECORD_ERRS | OTHERS


@functools.cache
def made(name: str) -> tuple[bytes, np.ndarray]:
    data = VIDEOS[name]()
    frames = sequential(data)
    return data, np.rot90(frames, 2, (1, 2)) if name == "turned" else frames


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", VIDEOS)
def test_both_decoders_give_the_frames_of_a_full_sequential_decode(decoder, name):
    data, every = made(name)
    count = len(every)
    video = DECODERS[decoder](data)
    assert video.count == count
    last = count - 1
    for wanted in ([0], [last], range(3, count, 8), range(20, 28), [33, 34], [40, 5, 40], range(count)):
        for opened in (DECODERS[decoder](data), video):  # asked first, and after others
            np.testing.assert_array_equal(opened.frames(wanted), every[list(wanted)], f"{wanted}")


@pytest.mark.parametrize("name", VIDEOS)
def test_each_frame_alone_is_that_of_a_full_sequential_decode(name):
    data, every = made(name)
    decoder = PyAVDecoder(data)
    for i in range(0, len(every), 1 + len(every) // 60):
        np.testing.assert_array_equal(decoder.frames([i]), every[[i]], f"frame {i}")


@pytest.mark.parametrize("name", PLAIN)
def test_decord_itself_decodes_what_it_decodes_rightly(name):
    data, every = made(name)
    assert DecordDecoder(data)._reader is not None
    np.testing.assert_array_equal(bare_decord(data).get_batch(range(60)).asnumpy(), every)


@pytest.mark.parametrize("name", DECORD_ERRS)
def test_where_decord_alone_errs_it_is_not_asked(name):
    data, every = made(name)

    def right(wanted: Sequence[int]) -> bool:
        try:
            return np.array_equal(bare_decord(data).get_batch(wanted).asnumpy(), every[list(wanted)])
        except decord.DECORDError:
            return False

    assert not all(right(wanted) for wanted in ([0], range(3, 50, 8), [33, 34], range(len(every))))
    assert DecordDecoder(data)._reader is None


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_upright(decoder, degrees):
    data = video(textured(20), crf="1")
    upright = np.rot90(sequential(data), -degrees // 90, (1, 2))
    np.testing.assert_array_equal(DECODERS[decoder](turned(data, degrees)).frames(range(20)), upright)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("yuv", "declared"),
    [((81, 90, 240), {}), ((63, 102, 240), {"colorspace": 1}), ((76, 85, 255), {"color_range": 2})],
    ids=["bt601", "bt709", "full range"],
)
def test_colours_are_those_that_the_stream_declares(decoder, yuv, declared):
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=30, options={"threads": "1", "crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        red = av.VideoFrame(96, 64, "yuv420p")
        for plane, value in zip(red.planes, yuv, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        for name, value in declared.items():
            setattr(stream.codec_context, name, value)
            setattr(red, name, value)
        file.mux(stream.encode(red))
        file.mux(stream.encode(None))
    off = DECODERS[decoder](target.getvalue()).frames([0]).astype(int) - [255, 0, 0]
    assert abs(off).max() <= 3  # 8-bit rounding; the wrong matrix or range is 20 off


def test_an_edit_list_hides_the_frames_before_its_start():
    data, _ = made("edit list")
    for decoder in DECODERS.values():
        off = decoder(data).frames([0, 49]).astype(float) - textured()[[10, 59]]
        assert abs(off).mean() < 25  # chroma at half size and x264 take 17; the frame after it is 60 away


def test_frames_that_nothing_needs_are_not_decoded():
    decoder = PyAVDecoder(made("b-pyramid")[0])
    wanted = {decoder._pts[i] for i in range(0, 60, 8)}
    assert sum(1 for _ in decoder._decode(0, wanted)) < 45
    decoder = PyAVDecoder(made("short closed gops")[0])
    start = decoder._start({decoder._pts[50]})
    assert sum(1 for _ in decoder._decode(start, {decoder._pts[50]})) <= 8


def audio_only() -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
@pytest.mark.parametrize(
    "data", [b"", b"\0", b"<html>404</html>" * 50, video(textured(8))[:900]], ids=["empty", "nul", "text", "cut"]
)
def test_what_is_not_a_video_is_said_to_be_none(decoder, data):
    with pytest.raises(BadVideo) as error:
        decoder(data)
    assert error.value.reason == "not_a_video"


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
def test_audio_alone_has_no_video_stream(decoder):
    with pytest.raises(BadVideo) as error:
        decoder(audio_only())
    assert error.value.reason == "no_video_stream"


def test_damage_in_the_middle_is_found_and_never_half_accepted():
    whole = video(textured(60), **{"x264-params": "keyint=10"})
    data = bytearray(whole)
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    with pytest.raises(BadVideo) as error:
        PyAVDecoder(bytes(data)).frames(range(60))
    assert error.value.reason == "damaged"


def test_resizing_keeps_the_aspect_and_crops_to_the_centre():
    picture = np.zeros((1, 60, 200, 3), np.uint8)
    picture[:, :, 100:] = 200
    out = fit(picture, 30, 30)
    assert out.shape == (1, 30, 30, 3)
    assert out[0, :, :13].max() == 0
    assert out[0, :, 17:].min() == 200
    assert fit(picture, 60, 200).data_ptr() == torch.from_numpy(picture).data_ptr()


def test_a_square_stays_a_square():
    picture = np.zeros((1, 100, 160, 3), np.uint8)
    picture[:, 40:60, 70:90] = 255
    bright = fit(picture, 50, 64)[0, ..., 0] > 127
    assert bright.any(0).sum() == bright.any(1).sum() == 10


def test_equal_frames_give_equal_bytes_and_come_back_alike():
    frames = Shape(0, 1, 8, 32, True, 0.5, 2.5).render()
    data = encode(frames, 8)
    assert data == encode(frames, 8)
    assert decode_all(data).sub(torch.from_numpy(frames).float()).abs().mean() < 2
    assert DecordDecoder(data).count == PyAVDecoder(data).count == 8


def test_an_odd_size_is_refused():
    with pytest.raises(UserError, match="31x32"):
        encode(np.zeros((2, 31, 32, 3), np.uint8), 8)
