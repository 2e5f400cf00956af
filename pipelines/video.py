"""Videos from and to bytes. Frames are uint8 [T, H, W, 3] RGB.

Both decoders give the same frames, but see docs/log.md. PyAV is the faster one: packets are looked at first, and those
that hold a frame which is neither wanted nor referred to by another are never decoded.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, Protocol, get_args

import av
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image
from torch import Tensor

from cil.images import cover
from pipelines.errors import UserError

Reason = Literal[
    "missing",  # there is no such file
    "unsafe_name",  # its name would leave the folder of videos
    "duplicate_id",  # an earlier row has its id
    "not_a_video",  # nothing in it can be opened as a video
    "no_video_stream",  # sound alone, or a cover picture
    "unknown_codec",  # nothing decodes it, or it is encrypted
    "no_timestamps",  # frames without a time of their own, as in a raw stream
    "damaged",  # frames that are wanted cannot be decoded whole
    "hung",  # decoding took longer than the limit, and in another process than twice that
    "decoder_died",  # decoding crashed its process twice, or took more memory than there is
    "too_large",  # its file, or the frames that are wanted of it, have more bytes than a worker takes
    "too_short",  # fewer frames than a clip spans
    "not_finite",  # the encoder gave NaN or inf
    "no_frame_rate",  # unknown, and cache.fps asks for one
    "ragged_row",  # the csv's row has more or fewer fields than its header
    "damaged_tar",  # the file is empty or no tar, or the tar is damaged or cut off there
]
REASONS: tuple[str, ...] = get_args(Reason)


Crop = tuple[float, float, float, float]  # top, left, bottom, right, as shares of the picture


class BadVideo(Exception):
    """A property of the bytes: trying again would not help."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both, so that it can be pickled
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


class Decoder(Protocol):
    """An open video."""

    count: int
    fps: float
    size: tuple[int, int]  # height and width, as the file says, before its pictures are turned

    def __init__(self, data: bytes) -> None: ...

    def frames(self, wanted: Sequence[int]) -> np.ndarray: ...


class PyAVDecoder:
    """Packets are looked at first, frames are found by their pts, and only what they need is decoded.

    Pictures are upright: turned as the file says, by quarters. Sample aspect ratios are not applied. Damage that
    decodes without an error, as a few bytes inside an H.264 slice often do, cannot be seen.
    """

    def __init__(self, data: bytes) -> None:
        try:
            # Opening decodes a frame to know the stream better; what the header says is enough.
            container = av.open(io.BytesIO(data), "r", options={"skip_frame": "all", "protocol_whitelist": "none"})
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
                raise BadVideo("no_video_stream", "there is no video stream in it")
            if stream.codec_context is None:
                raise BadVideo("unknown_codec", "nothing here decodes its video stream")
            self._packets = [packet for packet in container.demux(stream) if packet.size]
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise BadVideo("not_a_video", _why(error)) from None
        self._container, self._context = container, stream.codec_context
        self._context.thread_count = 1  # the cores are kept busy by other workers' videos
        self._times = [packet.pts for packet in self._packets if packet.pts is not None]  # of each packet
        shown = [pts for packet, pts in zip(self._packets, self._times, strict=False) if not packet.is_discard]
        self._pts = sorted(set(shown))
        if not self._packets or (self._times and not shown):
            raise BadVideo("not_a_video", "there are no frames in it")
        if len(self._times) < len(self._packets) or len(self._pts) < len(shown):
            raise BadVideo("no_timestamps", "not every frame has a time of its own")
        self._length_size = _avcc_length_size(self._context)
        self.count = len(self._pts)
        self.fps = float(stream.average_rate or 0)
        self.size = self._context.height, self._context.width

    def frames(self, wanted: Sequence[int]) -> np.ndarray:
        pts = {self._pts[i] for i in wanted}
        start = self._start(pts)
        try:
            found = self._find(start, pts)
        except BadVideo:
            if not start:
                raise
            found = self._find(0, pts)  # a keyframe may be none, as where intra blocks refresh the picture
        if len({picture.shape for picture in found.values()}) > 1:
            raise BadVideo("damaged", "its frames change their size")
        return np.stack([found[self._pts[i]] for i in wanted])

    def _start(self, wanted: set[int]) -> int:
        """The last keyframe that is not after the first wanted frame: those shown before it may need another."""
        first = min(wanted)
        return max((i for i, p in enumerate(self._packets) if p.is_keyframe and self._times[i] <= first), default=0)

    def _find(self, start: int, wanted: set[int]) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        try:
            for frame in self._decode(start, wanted):
                if start and frame.pts == self._times[start] and not frame.key_frame:
                    raise BadVideo("damaged", "what its header calls a keyframe is none")
                if frame.pts in wanted and frame.pts not in found and not frame.is_corrupt:
                    found[frame.pts] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                if len(found) == len(wanted):
                    return found
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise BadVideo("damaged", _why(error)) from None
        raise BadVideo("damaged", f"{len(wanted) - len(found)} of {len(wanted)} frames cannot be decoded")

    def _decode(self, start: int, wanted: set[int]) -> Iterator[av.VideoFrame]:
        self._context.flush_buffers()
        end = max(i for i, p in enumerate(self._packets) if p.pts in wanted) + 1
        for packet in self._packets[start:end]:
            if packet.pts in wanted or not self._unreferenced(packet):
                yield from self._context.decode(packet)
        yield from self._context.decode(None)

    def _unreferenced(self, packet: av.Packet) -> bool:
        """The first slice says nal_ref_idc = 0: no other frame is predicted from this one."""
        return next((not header >> 5 & 3 for header in self._units(packet) if header & 0x1F in (1, 5)), False)

    def _units(self, packet: av.Packet) -> Iterator[int]:
        """The first byte of each NAL unit, where it is H.264 in avcC."""
        size, data, at = self._length_size, bytes(packet), 0
        while size and at + size < len(data):
            yield data[at + size]
            at += size + int.from_bytes(data[at : at + size], "big")


class DecordDecoder(PyAVDecoder):
    """decord where it gives the frames of a sequential decode, and PyAV elsewhere, so that both always agree.

    decord 0.6 seeks to keyframes that do not stand for themselves, counts frames that an edit list hides, errs in
    MPEG-TS, MPEG-4 and AVI, turns other pictures than 8-bit 4:2:0 into RGB by other means, and has no AV1.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reader: Any = None
        if self._plain():
            import decord

            self._failures = (decord.DECORDError, RuntimeError, AssertionError)
            keys = [i for i, pts in enumerate(self._times) if self._packets[i].is_keyframe]
            with contextlib.suppress(*self._failures):
                reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
                self._reader = reader if [len(reader), *reader.get_key_indices()] == [self.count, *keys] else None

    def frames(self, wanted: Sequence[int]) -> np.ndarray:
        if self._reader is not None:
            with contextlib.suppress(*self._failures):
                return self._reader.get_batch(list(wanted)).asnumpy()
        return super().frames(wanted)

    def _plain(self) -> bool:
        """H.264 in avcC, every frame shown, in closed GOPs, 8-bit 4:2:0 of an even size, not interlaced."""
        if not self._length_size or len(self._packets) > self.count:
            return False
        earliest = self._pts[-1]
        for packet, pts in zip(reversed(self._packets), reversed(self._times), strict=True):
            if packet.is_keyframe and (pts > earliest or 5 not in (header & 0x1F for header in self._units(packet))):
                return False  # 5: an IDR picture; a recovery point has none
            earliest = min(earliest, pts)
        try:
            first = next(self._decode(0, {self._times[0]}))
        except (av.FFmpegError, StopIteration):
            return False
        even = first.width % 2 == first.height % 2 == 0
        return first.format.name in ("yuv420p", "yuvj420p") and even and not first.interlaced_frame


DECODERS: dict[str, type[Decoder]] = {"pyav": PyAVDecoder, "decord": DecordDecoder}


def fit(frames: np.ndarray, height: int, width: int, crop: tuple[float, float, float, float] | None = None) -> Tensor:
    """`crop`: what is kept of the picture. Then no bars, no stretching: cil.images.cover."""
    x = torch.from_numpy(frames)
    if crop is not None:
        top, left, bottom, right = (round(share * x.shape[1 + i % 2]) for i, share in enumerate(crop))
        x = x[:, top : max(bottom, top + 1), left : max(right, left + 1)]
    return cover(x, height, width)


def encode(frames: Tensor | np.ndarray, fps: float, crf: int = 10) -> bytes:
    """An H.264 mp4. One thread and no macroblock tree, so that equal frames give equal bytes (docs/log.md)."""
    pictures = np.ascontiguousarray(frames)
    if pictures.shape[1] % 2 or pictures.shape[2] % 2:
        raise UserError(f"{pictures.shape[1]}x{pictures.shape[2]}: H.264 needs an even height and width")
    target = io.BytesIO()
    options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return target.getvalue()


def sheet(clips: Sequence[Tensor]) -> bytes:
    """A PNG: of each clip a row, with its first, middle and last frame."""
    rows = [torch.cat([clip[0], clip[len(clip) // 2], clip[-1]], dim=1) for clip in clips]
    picture = io.BytesIO()
    Image.fromarray(torch.cat(rows).numpy()).save(picture, "PNG")
    return picture.getvalue()


def decode_all(data: bytes) -> Tensor:
    video = PyAVDecoder(data)
    return torch.from_numpy(video.frames(range(video.count)))


def _why(error: Exception) -> str:
    """Without FFmpeg's number, and the name that it gives to what is no file."""
    return (isinstance(error, av.FFmpegError) and error.strerror) or str(error)


def _avcc_length_size(context: av.CodecContext) -> int:
    """How many bytes the length of an H.264 NAL unit takes, or 0 where packets are not in avcC."""
    extra = context.extradata
    if context.name != "h264" or not extra or len(extra) < 5 or extra[0] != 1:
        return 0
    return (extra[4] & 3) + 1
