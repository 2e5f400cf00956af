"""The networks of FVD and of the Inception Score, as the TorchScript files that are widely used, by their paths.

    features = Detector.features("i3d_torchscript.pt")(frames)       # uint8 [B, T, H, W, 3] -> float32 [B, D]
    probabilities = Detector.classes("c3d_ucf101.pt")(frames)        # [B, K], each row sums to 1

Both files take uint8 videos [B, C, T, H, W] and resize them by themselves. The I3D takes three keywords: `rescale`
(from 0..255 to -1..1), `resize` (to 224 x 224) and `return_features` (what stands before the softmax, which FVD is of;
else probabilities). The C3D takes none, and gives probabilities. Which it is, the file's own signature says.

A TorchScript file holds a program, and calling it runs that. It holds no Python, but load it from whom you trust.
"""

import hashlib
import textwrap
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

KEYWORDS = ("rescale", "resize", "return_features")


class Protocol(NamedTuple):
    """What published figures are of."""

    videos: int
    frames: int
    fps: float

    def indices(self, count: int, fps: float) -> list[int]:
        """Which frames of a video are seen: from its first one on, those nearest to this rate.

        A video of just so many frames is a clip as models make them: all are seen, at whatever rate its file plays.
        """
        if count == self.frames:
            return list(range(count))
        if not fps > 0:
            raise ValueError(f"its frame rate is unknown, and {self.frames} frames at {self.fps:g} fps are wanted")
        found = [int(k * fps / self.fps + 0.5) for k in range(self.frames)]
        if len(set(found)) < len(found):
            raise ValueError(f"{fps:g} fps, and {self.frames} frames at {self.fps:g} fps are wanted")
        if found[-1] >= count:
            told = f"{count} frames at {fps:g} fps"
            raise ValueError(f"{told}; {self.frames} at {self.fps:g} fps take the first {found[-1] + 1} of a video")
        return found


FVD = Protocol(2048, 16, 3.0)
INCEPTION_SCORE = Protocol(10_000, 16, 3.0)


@dataclass(frozen=True)
class Detector:
    path: str
    module: Any
    keywords: dict[str, bool]
    probabilities: bool
    device: torch.device | str = "cpu"

    @classmethod
    def features(cls, path: str | Path) -> "Detector":
        module = _loaded(path)
        if not set(KEYWORDS) <= _arguments(module):
            raise ValueError(f"{path}: its forward has no {', '.join(KEYWORDS)}; expected the I3D of FVD")
        return cls(str(path), module, dict.fromkeys(KEYWORDS, True), False)

    @classmethod
    def classes(cls, path: str | Path) -> "Detector":
        module = _loaded(path)
        wanted = {"rescale": True, "resize": True, "return_features": False}
        return cls(str(path), module, {k: v for k, v in wanted.items() if k in _arguments(module)}, True)

    def to(self, device: torch.device | str) -> "Detector":
        return replace(self, module=self.module.to(device), device=device)

    @property
    def identity(self) -> str:
        """Of the file's bytes, wherever it lies."""
        with Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[-1] != 3:
            raise ValueError(f"frames of {frames.dtype}, shape {list(frames.shape)}: uint8 [B, T, H, W, 3]")
        videos = rearrange(frames, "b t h w c -> b c t h w").contiguous().to(self.device)
        told = f"{self.path}, of videos {list(videos.shape)}"
        try:
            # Not profiled and compiled anew on the way: the second video is to be computed as the first one was.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                found = self.module(videos, **self.keywords)
        except (RuntimeError, torch.jit.Error) as error:  # the second one is what a network itself raises
            if "out of memory" in _last_line(error):  # the machine's fault, not this video's
                raise
            raise ValueError(f"{told}: {_last_line(error)}") from None
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(frames):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{told}: gives {shape}; expected [{len(frames)}, D]")
        found = found.float().cpu()
        if not torch.isfinite(found).all():
            raise ValueError(f"{told}: gives NaN or inf")
        if self.probabilities and (found.min() < 0 or (found.sum(1) - 1).abs().max() > 1e-3):
            sums = ", ".join(f"{float(total):.3g}" for total in found.sum(1)[:3])
            raise ValueError(f"{told}: gives no probabilities (rows sum to {sums}); expected a classifier with softmax")
        return found


def _loaded(path: str | Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which these files are published in
        try:
            return torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            if not Path(path).is_file():
                raise ValueError(f"{path}: no such file; expected a TorchScript network") from None
            raise ValueError(
                f"{path}: no TorchScript network ({textwrap.shorten(str(error).splitlines()[0], 120)})"
            ) from None


def _arguments(module: Any) -> set[str]:
    return {argument.name for argument in module.forward.schema.arguments}


def _last_line(error: Exception) -> str:
    """Of what TorchScript says, behind a listing of the program."""
    return str(error).strip().splitlines()[-1]
