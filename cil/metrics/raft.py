"""The optical flow of videos by RAFT, where its weights are given: a `Flow` as DIS makes one (`cil.metrics.motion`).

    raft = Raft.load("raft-things.pth")         # Princeton's, or torchvision's raft_large_C_T_SKHT_V2-*.pth
    flow = raft(frames)                         # uint8 [T, H, W, 3]; flow.mean is the motion score

Not in `motion.py`, on whose text the identity of latent caches depends.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cil.checkpoints import digest, load_into, naming, read
from cil.metrics.motion import Flow
from cil.nets.raft import RAFT, SHRUNK, from_published

SMALLEST = 121  # pixels, which are padded to 128: of the coarsest correlations there are two by two then
HELD = 2**26  # correlations that are in memory at a time, 4 bytes each, if those of one pair are not more
PAIRS = 8  # of frames that are looked at together


class RaftFlow(Flow):
    def __init__(self, frames: Tensor, fields: list[np.ndarray]) -> None:
        import cv2

        self.pictures = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in np.ascontiguousarray(frames.numpy())]
        self.fields = fields
        self._scale = np.float32(1), np.float32(1)


class Raft:
    def __init__(self, net: RAFT, iterations: int) -> None:
        self.net, self.iterations = net, iterations

    @classmethod
    def load(cls, path: str | Path) -> Self:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; expected RAFT's weights")
        with torch.device("meta"):
            net = RAFT()
        state = read(path)
        with naming(path):
            state, iterations = from_published(state)
            load_into(net, state, dtype=torch.float32, wanted="RAFT")
        return cls(net.eval().requires_grad_(False), iterations)

    def to(self, device: torch.device | str) -> Self:
        self.net.to(device)
        return self

    @property
    def identity(self) -> str:
        """Of the weights and of how often they are used: both shape a flow."""
        return digest(self.net.state_dict() | {"iterations": torch.tensor(self.iterations)})

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> RaftFlow:
        """Pairs are looked at a few at a time; how many depends on their size alone."""
        height, width = frames.shape[1:3]
        if len(frames) < 2 or min(height, width) < SMALLEST:
            told = f"needs 2 frames of {SMALLEST}x{SMALLEST} or more"
            raise ValueError(f"frames {tuple(frames.shape)}: a motion score by RAFT {told}")
        top, left = (-side % SHRUNK // 2 for side in (height, width))
        bottom, right = (-side % SHRUNK - before for side, before in ((height, top), (width, left)))
        pixels = ((height + top + bottom) // SHRUNK) * ((width + left + right) // SHRUNK)
        pairs = min(PAIRS, max(1, HELD // pixels**2))
        device = next(self.net.parameters()).device
        fields: list[np.ndarray] = []
        for begin in range(0, len(frames) - 1, pairs):
            some = rearrange(frames[begin : begin + pairs + 1], "t h w c -> t c h w").to(device)
            padded = F.pad(some.float() / 127.5 - 1, (left, right, top, bottom), mode="replicate")
            flow = self.net(padded, self.iterations)[..., top : top + height, left : left + width]
            fields.extend(rearrange(flow, "t two h w -> t h w two").contiguous().cpu().numpy())
        return RaftFlow(frames, fields)
