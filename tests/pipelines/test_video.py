import io
from fractions import Fraction

import av
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


def video(frames: np.ndarray, codec: str = "libx264", pts: list[int] | None = None, **options: str) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=30, options={"threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[i], Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def sequential(data: bytes) -> np.ndarray:
    """Every frame, by the plainest way there is."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


VARIANTS = {
    "default": {},
    "b-pyramid": {"x264-params": "bframes=5:b-pyramid=normal:keyint=250"},
    "short closed gops": {"x264-params": "keyint=8:min-keyint=8"},
    "open gops": {"x264-params": "keyint=12:open-gop=1:bframes=3"},
    "no b-frames": {"x264-params": "bframes=0"},
    "intra only": {"x264-params": "keyint=1"},
}


# Where a GOP is open decord 0.6 seeks to a keyframe whose neighbours need the GOP before it, and gives wrong pictures.
PAIRS = [(d, v) for d in DECODERS for v in VARIANTS if (d, v) != ("decord", "open gops")]


@pytest.mark.parametrize(("decoder", "variant"), PAIRS)
@pytest.mark.parametrize("wanted", [[0], [59], range(3, 60, 8), range(20, 28), [40, 5, 40]], ids=str)
def test_both_decoders_give_the_frames_of_a_full_sequential_decode(decoder, variant, wanted):
    data = video(textured(), **VARIANTS[variant])
    np.testing.assert_array_equal(DECODERS[decoder](data).frames(wanted), sequential(data)[list(wanted)])


def test_a_variable_frame_rate_does_not_move_the_frames():
    pts = np.cumsum([1 + (i % 4 == 0) * 3 for i in range(60)]).tolist()
    data = video(textured(), pts=pts)
    decoder = PyAVDecoder(data)
    assert decoder.count == 60
    np.testing.assert_array_equal(decoder.frames([7, 31]), sequential(data)[[7, 31]])


def test_frames_that_nothing_needs_are_not_decoded():
    decoder = PyAVDecoder(video(textured(), **VARIANTS["b-pyramid"]))
    wanted = list(range(0, 60, 8))
    pts = {decoder._pts[i] for i in wanted}
    assert sum(1 for _ in decoder._decode(min(pts), pts)) < 45


def test_a_decoder_can_be_asked_twice():
    data = video(textured())
    decoder = PyAVDecoder(data)
    decoder.frames([50])
    np.testing.assert_array_equal(decoder.frames([2, 3]), sequential(data)[[2, 3]])


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


def test_audio_alone_has_no_video_stream():
    with pytest.raises(BadVideo) as error:
        PyAVDecoder(audio_only())
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
