"""The videos of one part scored: each is decoded once, whatever is measured on it."""

import base64
import posixpath
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from cil.images import read_image
from cil.metrics import spectra
from cil.metrics.alignment import ClipSimilarity, psnr, ssim
from cil.metrics.consistency import warp_error
from cil.metrics.detectors import FVD, Detector
from cil.metrics.dynamics import FPS, fastest, is_dynamic
from cil.metrics.features import VelocityNet
from cil.metrics.motion import Flow, first_frame_error
from cil.metrics.raft import Raft
from pipelines import storage
from pipelines.decoding import Decoded, DecodePool, TooLarge
from pipelines.images import UNREADABLE
from pipelines.parts import Made
from pipelines.video import BadVideo, PyAVDecoder

VIDEO = (".mp4",)
KNOWN = ("clip_id", "file", "name")  # of a video, in its line
FEATURES = ("velocity", "fvd", "classes")  # columns of a part that no table of scores has: long, and for sets only


class Scorer:
    """Made once a worker. A line of a part has a video's scores, or the reason why there are none."""

    def __init__(
        self,
        net: str | None,
        detectors: dict[str, str],
        clip: str | None,
        measures: list[str],
        protocol: str,
        seconds: float,
        memory: float,
        gpu: bool,
        raft: str | None = None,
    ) -> None:
        """`net`: the folder of the feature net. `detectors`: files of `fvd` and `classes`."""
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        self.net = net and load_net(net)
        self.detectors = {name: load_detector(name, uri).to(device) for name, uri in detectors.items()}
        self.clip = clip and ClipSimilarity.load(storage.kept_copy(clip)).to(device)
        self.flow = Raft.load(storage.kept_copy(raft)).to(device) if raft else Flow
        self.measures = measures
        self.seen = Seen(protocol, seconds, memory)

    def __call__(self, plan: dict[str, Any]) -> Made:
        lines = []
        uris = [storage.join(plan["folder"], line["file"]) for line in plan["lines"]]
        for line, uri, decoded in zip(plan["lines"], uris, self.seen.ahead(uris), strict=True):
            known = {key: line[key] for key in KNOWN}
            try:
                lines.append(known | self.scores(*decoded.result(), uri, line["image"]))
            except BadVideo as error:
                lines.append(known | {"reason": error.reason, "message": str(error)[:500]})
            except ValueError as error:  # too short, too small, too large
                lines.append(known | {"reason": "unfit", "message": str(error)[:500]})
        rejected = sum("reason" in line for line in lines)
        return Made(storage.to_rows(lines), told={"videos": len(lines), "rejected_videos": rejected})

    def scores(self, frames: Tensor, fps: float, uri: str, image: str | None) -> dict[str, Any]:
        """`image`: the file with the conditional image, a picture or the true clip; of a true clip itself."""
        size = frames.shape[1:3]
        flow = self.flow(frames)
        found: dict[str, Any] = {"motion": flow.mean, "dynamic": is_dynamic(fastest(flow), min(size), fps or FPS)}
        if self.net:
            features, velocity = self.net(frames[None])
            found |= {"speed": float(velocity[0].norm()), "velocity": _text(features[0])}
        if image and "alignment" in self.measures:
            try:
                found |= self.alignment(frames[0], frames[0] if image == uri else self.seen.first(image, *size))
            except (BadVideo, ValueError) as problem:  # the video is as good as before
                found["image_problem"] = f"{posixpath.basename(image)}: {problem}"[:500]
        if "consistency" in self.measures:
            error, hidden = warp_error(frames, flow=flow, back=self.flow(frames.flip(0)))
            found |= {"warp_error": error if error == error else None, "hidden": hidden}
        if "spectra" in self.measures:
            if max(size) >= spectra.SMALLEST:
                found["spatial"] = _short(spectra.spatial_spectrum(frames))
            found["temporal"] = _short(spectra.temporal_spectrum(frames))
        return found | {name: _text(detector(frames[None])[0]) for name, detector in self.detectors.items()}

    def alignment(self, picture: Tensor, image: Tensor) -> dict[str, float]:
        found = {
            "first_frame_error": first_frame_error(picture[None], image),
            "psnr": psnr(picture, image),
            "ssim": ssim(picture, image),
        }
        return found | ({"clip_similarity": self.clip(picture, image)} if self.clip else {})


class Seen:
    """The frames of videos that are looked at, decoded in a process of its own: whoever made them."""

    def __init__(self, protocol: str, seconds: float, memory: float) -> None:
        """`memory`: GB of a video's frames, and of its file."""
        self.protocol, self._most = protocol, round(memory * 1e9)
        self._pool = DecodePool(PyAVDecoder, seconds, most=self._most)
        self.ahead = partial(self._pool.ahead, self)

    def __call__(self, uri: str) -> tuple[Tensor, float]:
        """And how many of them are a second; 0: nobody knows."""
        video = self._decoded(uri, FVD.indices if self.protocol == "paper" else lambda count, fps: range(count))
        return video.frames, FVD.fps if self.protocol == "paper" else video.fps

    def first(self, uri: str, height: int, width: int) -> Tensor:
        """A picture, or a video's first frame, cut to this size as conditional images are."""
        if uri.lower().endswith(VIDEO):
            return self._decoded(uri, lambda count, fps: [0], height, width).frames[0]
        return read_image(self._read(uri), height, width)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()

    def _decoded(
        self,
        uri: str,
        wanted: Callable[[int, float], Sequence[int]],
        height: int | None = None,
        width: int | None = None,
    ) -> Decoded:
        try:
            return self._pool(self._read(uri), wanted, height, width)
        except TooLarge as error:
            to_do = "cut it, take score.protocol=paper, or set score.memory higher and score anew"
            raise ValueError(f"{error}: {to_do}") from None

    def _read(self, uri: str) -> bytes:
        """No more of it than shows that it is too large."""
        try:
            return storage.read_range(uri, 0, self._most + 1)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise BadVideo("missing", "there is no such file any more") from None
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            raise BadVideo("damaged", f"it cannot be read: {error.strerror}") from None


def load_net(uri: str) -> VelocityNet:
    net = VelocityNet().eval().requires_grad_(False)
    net.load_state_dict(safetensors.torch.load(storage.read(storage.join(uri, "net.safetensors"))))
    return net


def load_detector(name: str, uri: str) -> Detector:
    return (Detector.features if name == "fvd" else Detector.classes)(storage.kept_copy(uri))


def _text(features: Tensor) -> str:
    return base64.b64encode(features.float().numpy().tobytes()).decode()


def features_of(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float32)


def _short(spectrum: Tensor) -> list[float]:
    return [float(f"{x:.6g}") for x in spectrum.tolist()]
