"""Small moving shapes: a stand-in for WebVid that anybody can make, in WebVid's own format.

A textured disc on a textured ground, lit from above. Neither the direction nor the speed of the disc can be read off
the first frame, so a model that copies the image shows discs that stand still: conditional image leakage.
"""

import re
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Shape:
    """One video: its pictures are a function of this alone."""

    seed: int
    index: int
    frames: int
    size: int
    moving: bool
    min_speed: float  # pixels a frame
    max_speed: float

    def __post_init__(self) -> None:
        random = self._random("motion")
        angle, speed = random.uniform(0, 2 * np.pi), random.uniform(self.min_speed, self.max_speed)
        velocity = speed * self.moving * np.array([np.cos(angle), np.sin(angle)])
        object.__setattr__(self, "velocity", (float(velocity[0]), float(velocity[1])))

    velocity: tuple[float, float] = (0.0, 0.0)  # right, down

    @property
    def videoid(self) -> str:
        return f"{self.seed:03d}{self.index:06d}"

    @property
    def caption(self) -> str:
        right, down = self.velocity
        verb = f"moves {right:+.3f} px right and {down:+.3f} px down a frame" if self.moving else "stands still"
        return f"a disc {verb}, lit from above"

    def render(self) -> Array:
        """uint8 [frames, size, size, 3]."""
        random = self._random("picture")
        ground = 0.5 * _texture(random, self.size, 2) - 0.3
        disc = 0.25 * _texture(random, self.size, 4) + 0.7
        radius = random.uniform(4.5, 6.5) * self.size / 32
        start = random.uniform(0, self.size, 2)
        light = np.linspace(0.25, -0.25, self.size)[:, None]
        y, x = np.mgrid[: self.size, : self.size]
        pictures = []
        for frame in range(self.frames):
            right, down = start + frame * np.array(self.velocity)
            # On a torus: what leaves on one side comes in on the other, so that the disc is always in the picture.
            dx = (x - right + self.size / 2) % self.size - self.size / 2
            dy = (y - down + self.size / 2) % self.size - self.size / 2
            cover = 1 / (1 + np.exp(2.5 * (np.hypot(dx, dy) - radius)))
            pictures.append(ground * (1 - cover) + _shift(disc, right, down) * cover + light)
        grey = np.clip(np.stack(pictures) / 1.5, -1, 1)
        return np.repeat(np.round((grey + 1) * 127.5).astype(np.uint8)[..., None], 3, axis=-1)

    def _random(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.index, *what.encode()])


def velocity_of(caption: str) -> tuple[float, float] | None:
    """(right, down) as a caption of ours tells it, or None where it is somebody else's caption."""
    if caption.startswith("a disc stands still"):
        return 0.0, 0.0
    found = re.match(r"a disc moves ([+-][\d.]+) px right and ([+-][\d.]+) px down", caption)
    return (float(found[1]), float(found[2])) if found else None


def _frequencies(size: int) -> tuple[Array, Array]:
    f = np.fft.fftfreq(size) * size
    return f[:, None], f[None, :]


def _texture(random: np.random.Generator, size: int, scale: float) -> Array:
    """Smooth noise on a torus with a Gaussian spectrum of this width, mean 0 and standard deviation 1."""
    fy, fx = _frequencies(size)
    spectrum = np.fft.fft2(random.standard_normal((size, size))) * np.exp(-(fx**2 + fy**2) / (2 * scale**2))
    spectrum[0, 0] = 0
    texture = np.fft.ifft2(spectrum).real
    return texture / texture.std()


def _shift(picture: Array, right: float, down: float) -> Array:
    """Moved on the torus by parts of a pixel."""
    fy, fx = _frequencies(len(picture))
    turn = np.exp(-2j * np.pi * (fx * right + fy * down) / len(picture))
    return np.fft.ifft2(np.fft.fft2(picture) * turn).real
