"""Clips decoded for the cache, against decord: 16 frames at stride 8 of WebVid-like videos, from memory, one core.

    python -m benchmarks.decode

The videos are made here from a seed: layers of natural-looking texture that move at different speeds, and film grain,
596x336, 10 to 20 s, x264's defaults. Exit 1 where the two decoders' frames differ.

Then the same made to fit 320x512, against decoding alone, and in a process of its own, against this one.
"""

import hashlib
import inspect
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import decord
import numpy as np
import torch

from benchmarks import Row, alternately, main, paired
from pipelines.decoding import DecodePool
from pipelines.video import PyAVDecoder, encode, fit

SEED = 20240622
HEIGHT, WIDTH = 336, 596
FRAMES, STRIDE = 16, 8
CRF = 23
FIT = 320, 512

Sample = tuple[bytes, list[int]]  # a video, and the frames wanted of it


def measure(quick: bool) -> list[Row]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    samples = [sample(number) for number in range(4 if quick else 12)]
    for number, (data, indices) in enumerate(samples):
        if not np.array_equal(PyAVDecoder(data).frames(indices), _decord(data, indices)):
            sys.exit(f"benchmarks.decode: clip {number}: PyAVDecoder and decord give different frames")
    torch.set_num_threads(1)
    with DecodePool(PyAVDecoder, seconds=60) as pool:
        pool(samples[0][0], lambda count, fps: [0], *FIT)  # has started
        child = ~pool._children[0]._process.pid << 3 | 2  # Linux: the clock of another process's CPU time

        def clock() -> float:
            # CPU time, which is the time that a quiet machine would take: everything runs on one core.
            return time.process_time() + time.clock_gettime(child)

        rounds = 3 if quick else 7
        seconds = np.sum([alternately(*_calls(*each, pool), rounds=rounds, clock=clock) for each in samples], axis=0)
    ours, peer, limit, fitted, apart = seconds  # [rounds] each
    rate_ours, rate_peer, rate_limit, rate_fitted, rate_apart = len(samples) / np.median(seconds, axis=1)
    return [
        Row("decode: decord", rate_ours, rate_peer, rate_limit, "clips/s a core", paired(peer, ours), 1.4),
        Row("decode: no colour", rate_ours, rate_limit, rate_limit, "clips/s a core", paired(limit, ours), 0.9),
        Row("decode: resized", rate_fitted, rate_ours, rate_ours, "clips/s a core", paired(ours, fitted), 1 / 1.2),
        Row("decode: own process", rate_apart, rate_fitted, rate_fitted, "clips/s a core", paired(fitted, apart), 0.95),
    ]


def _calls(data: bytes, indices: list[int], pool: DecodePool) -> list[Callable[[], object]]:
    return [
        lambda: PyAVDecoder(data).frames(indices),
        lambda: _decord(data, indices),
        lambda: _without_colour(PyAVDecoder(data), indices),
        lambda: fit(PyAVDecoder(data).frames(indices), *FIT),
        lambda: pool(data, lambda count, fps: indices, *FIT),
    ]


def _decord(data: bytes, indices: list[int]) -> np.ndarray:
    """decord as its documentation shows it, without the checks of DecordDecoder."""
    return decord.VideoReader(io.BytesIO(data), num_threads=1).get_batch(indices).asnumpy()


def _without_colour(video: PyAVDecoder, wanted: list[int]) -> None:
    """What PyAVDecoder.frames decodes, not turned into RGB: the limit."""
    pts = {video._pts[i] for i in wanted}
    missing = set(pts)
    for frame in video._decode(video._start(pts), pts):
        missing.discard(frame.pts)
        if not missing:
            return


def sample(number: int) -> Sample:
    """Video `number`, made once on this machine, and the frames that a clip at a random place in it takes."""
    random = np.random.default_rng([SEED, number])
    fps, seconds = int(random.integers(25, 31)), random.uniform(10, 20)
    count = round(fps * seconds)
    start = int(random.integers(count - (FRAMES - 1) * STRIDE))
    recipe = hashlib.sha256(inspect.getsource(pictures).encode() + inspect.getsource(texture).encode()).hexdigest()
    folder = Path(tempfile.gettempdir(), "cil-benchmarks")
    path = folder / f"{SEED}-{number}-{WIDTH}x{HEIGHT}-{fps}fps-{count}-crf{CRF}-{recipe[:8]}.mp4"
    if not path.exists():
        print(f"making {path}")
        folder.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(encode(np.stack(list(pictures(random, count))), fps, CRF))
        part.rename(path)
    return path.read_bytes(), list(range(start, start + FRAMES * STRIDE, STRIDE))


def pictures(random: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3]: a background and three things before it, each with its own texture, course and turn."""
    margin = 200
    height, width = HEIGHT + 2 * margin, WIDTH + 2 * margin
    layers = []
    for depth in range(4):
        colour = np.stack([texture(random, height, width, 1.1)] * 3, -1) * 45 + random.uniform(60, 190, 3)
        shape = texture(random, height, width, 2.5)
        mask = np.clip((shape - 0.8) * 8, 0, 1) if depth else np.ones_like(shape)
        speed = random.uniform(-0.4, 0.4, 2) * (1 + 2 * depth)  # pixels a frame
        layers.append((np.dstack([colour, mask]).astype(np.float32), speed, random.uniform(-4e-4, 4e-4)))
    grain = random.normal(0, 3, (8, HEIGHT + 64, WIDTH + 64, 1)).astype(np.float32)
    for frame in range(count):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for layer, speed, turn in layers:
            place = cv2.getRotationMatrix2D((width / 2, height / 2), np.degrees(turn * frame), 1)
            # There and back, so that no layer leaves the picture.
            place[:, 2] += 0.8 * margin * np.sin(speed * frame / (0.8 * margin)) - margin
            moved = cv2.warpAffine(layer, place, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
            picture += moved[..., 3:] * (moved[..., :3] - picture)
        y, x = random.integers(0, 64, 2)
        picture += grain[frame % 8, y : y + HEIGHT, x : x + WIDTH]
        yield picture.clip(0, 255).astype(np.uint8)


def texture(random: np.random.Generator, height: int, width: int, slope: float) -> np.ndarray:
    """Noise whose spectrum falls as 1 / frequency^slope, as that of photographs does; mean 0, deviation 1."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.hypot(fy, fx).clip(1 / width)
    spectrum = np.fft.rfft2(random.normal(size=(height, width))) / frequency**slope
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (height, width))
    return noise / noise.std()


if __name__ == "__main__":
    main(__doc__, measure)
