"""Videos from and to bytes. Frames are uint8 [T, H, W, 3] RGB.

Both decoders give the same frames, but see docs/log.md. PyAV is the faster one: packets are looked at first, and those
that hold a frame which is neither wanted nor referred to by another are never decoded.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, get_args

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.errors import UserError


Reason = Literal[
    "missing",  # there is no such file
    "unsafe_name",  # its name would leave the folder of videos
    "duplicate_id",  # an earlier row has its id
    "not_a_video",  # nothing in it can be opened as a video
    "no_video_stream",  # sound alone, or a cover picture
    "damaged",  # frames that are wanted cannot be decoded whole
    "hung",  # decoding took longer than the limit
    "decoder_died",  # decoding crashed its process, or took more memory than there is
    "too_short",  # fewer frames than a clip spans
    "not_finite",  # the encoder gave NaN or inf
]
REASONS: tuple[str, ...] = get_args(Reason)


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

    def __init__(self, data: bytes) -> None: ...

    def frames(self, wanted: Sequence[int]) -> np.ndarray: ...


class PyAVDecoder:
    def __init__(self, data: bytes) -> None:
        try:
            # Opening decodes a frame to know the stream better; what the header says is enough.
            container = av.open(io.BytesIO(data), "r", options={"skip_frame": "all"})
            if not container.streams.video:
                raise BadVideo("no_video_stream", "there is no video stream in it")
            stream = container.streams.video[0]
            self._packets = [p for p in container.demux(stream) if p.size and p.pts is not None]
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise BadVideo("not_a_video", str(error)) from None
        self._container, self._context = container, stream.codec_context
        self._context.thread_count = 1  # the cores are kept busy by other workers' videos
        self._pts: list[int] = sorted(p.pts for p in self._packets if p.pts is not None and not p.is_discard)
        self._length_size = _avcc_length_size(self._context)
        self.count = len(self._pts)
        self.fps = float(stream.average_rate or 0)

    def frames(self, wanted: Sequence[int]) -> np.ndarray:
        pts = {self._pts[i] for i in wanted}
        found: dict[int, np.ndarray] = {}
        try:
            for frame in self._decode(min(pts), pts):
                if frame.pts in pts and frame.pts not in found and not frame.is_corrupt:
                    found[frame.pts] = frame.to_ndarray(format="rgb24")
                if len(found) == len(pts):
                    break
        except (av.FFmpegError, ValueError) as error:
            raise BadVideo("damaged", str(error)) from None
        if len(found) < len(pts):
            raise BadVideo("damaged", f"{len(pts) - len(found)} of {len(pts)} frames cannot be decoded")
        if len({frame.shape for frame in found.values()}) > 1:
            raise BadVideo("damaged", "its frames change their size")
        return np.stack([found[self._pts[i]] for i in wanted])

    def _decode(self, first: int, wanted: set[int]) -> Iterator[av.VideoFrame]:
        # From the last keyframe that is not after the first wanted frame: none that follows it needs what was before.
        starts = [i for i, p in enumerate(self._packets) if p.is_keyframe and p.pts is not None and p.pts <= first]
        self._context.flush_buffers()
        end = max(i for i, p in enumerate(self._packets) if p.pts in wanted) + 1
        for packet in self._packets[starts[-1] if starts else 0 : end]:
            if packet.pts in wanted or not self._unreferenced(packet):
                yield from self._context.decode(packet)
        yield from self._context.decode(None)

    def _unreferenced(self, packet: av.Packet) -> bool:
        """H.264 in avcC: the first slice says nal_ref_idc = 0, so no other frame is predicted from this one."""
        if not self._length_size:
            return False
        data, at = bytes(packet), 0
        while at + self._length_size < len(data):
            length = int.from_bytes(data[at : at + self._length_size], "big")
            header = data[at + self._length_size]
            if header & 0x1F in (1, 5):
                return not header >> 5 & 3
            at += self._length_size + length
        return False


class DecordDecoder:
    def __init__(self, data: bytes) -> None:
        import decord

        self._error = decord.DECORDError
        try:
            self._reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
            self.count, self.fps = len(self._reader), float(self._reader.get_avg_fps())
        except (self._error, RuntimeError) as error:
            raise BadVideo("not_a_video", str(error).splitlines()[0]) from None

    def frames(self, wanted: Sequence[int]) -> np.ndarray:
        try:
            return self._reader.get_batch(list(wanted)).asnumpy()
        except (self._error, RuntimeError, IndexError) as error:
            raise BadVideo("damaged", str(error).splitlines()[0]) from None


DECODERS: dict[str, type[Decoder]] = {"pyav": PyAVDecoder, "decord": DecordDecoder}


def fit(frames: np.ndarray, height: int, width: int) -> Tensor:
    """Resized to cover height x width with its aspect kept, then cropped to the centre: no bars, no stretching."""
    x = torch.from_numpy(frames)
    if x.shape[1:3] == (height, width):
        return x
    scale = max(height / x.shape[1], width / x.shape[2])
    size = [max(height, round(x.shape[1] * scale)), max(width, round(x.shape[2] * scale))]
    x = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[:, top : top + height, left : left + width].contiguous()


def encode(frames: Tensor | np.ndarray, fps: int, crf: int = 10) -> bytes:
    """An H.264 mp4. One thread and no macroblock tree, so that equal frames give equal bytes (docs/log.md)."""
    pictures = np.ascontiguousarray(frames)
    if pictures.shape[1] % 2 or pictures.shape[2] % 2:
        raise UserError(f"{pictures.shape[1]}x{pictures.shape[2]}: H.264 needs an even height and width")
    target = io.BytesIO()
    options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return target.getvalue()


def decode_all(data: bytes) -> Tensor:
    video = PyAVDecoder(data)
    return torch.from_numpy(video.frames(range(video.count)))


def _avcc_length_size(context: av.CodecContext) -> int:
    """How many bytes the length of an H.264 NAL unit takes, or 0 where packets are not in avcC."""
    extra = context.extradata
    if context.name != "h264" or not extra or len(extra) < 5 or extra[0] != 1:
        return 0
    return (extra[4] & 3) + 1
