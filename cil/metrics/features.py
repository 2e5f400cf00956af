"""The features of the Frechet distance: a small net that learned, on real clips, to read the velocity off a video."""

import torch
from einops import rearrange
from torch import Tensor, nn

FEATURES = 32


class VelocityNet(nn.Module):
    """Three 3-D convolutions.

    uint8 frames [B, T, H, W, 3] -> features [B, FEATURES] and velocity [B, 2] (right, down) in pixels a frame.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 16, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2)),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv3d(16, 32, 3, stride=(1, 2, 2), padding=1),
            nn.GroupNorm(4, 32),
            nn.SiLU(),
            nn.Conv3d(32, FEATURES, 3, padding=1),
            nn.GroupNorm(4, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, 2)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        grey = rearrange(frames.float().mean(-1) / 127.5 - 1, "b t h w -> b 1 t h w")
        features = self.body(grey).mean(dim=(2, 3, 4))
        return features, self.head(features)


def train_velocity_net(frames: Tensor, velocity: Tensor, steps: int, seed: int, batch: int = 32) -> VelocityNet:
    """Learned from real clips [N, T, H, W, 3] and their velocities [N, 2]; a function of its arguments."""
    if len(frames) < 2:
        raise ValueError(f"{len(frames)} clips with a known velocity: the feature net needs at least 2")
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = VelocityNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(frames), (batch,), generator=random)
        x, v = frames[chosen], velocity[chosen].float()
        # A mirrored clip moves the mirrored way: four times the data.
        for axis, component in ((3, 0), (2, 1)):
            if torch.rand((), generator=random) < 0.5:
                x, v = x.flip(axis), v * torch.tensor([-1.0 if c == component else 1.0 for c in (0, 1)])
        loss = (net(x)[1] - v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)
