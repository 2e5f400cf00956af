"""The toy's own feature net: trained once on the study's reference clips, if their captions tell their velocities."""

from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cil.metrics.features import train_velocity_net
from pipelines import artifact, storage
from pipelines.artifact import Artifact
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.generate import KIND as VIDEOS
from pipelines.generate import REAL, REFERENCE
from pipelines.scorer import load_net
from pipelines.sets import Videos, generated
from pipelines.shapes import velocity_of
from pipelines.video import BadVideo, decode_all

KIND = "feature net"


def feature_net(config: Config, sets: dict[str, Videos]) -> Artifact | None:
    """Trained once on the study's reference clips, if their captions tell their velocities."""
    folder = storage.join(config.out, "videos", REFERENCE)
    if not storage.exists(storage.join(folder, "manifest.json")):
        return None
    reference = generated(artifact.read_manifest(folder, VIDEOS))
    if sum(velocity is not None for _, velocity in _captions(reference)) < 2:
        print("scores: no caption of the reference clips tells a velocity: no feature net, no speed, no frechet")
        return None
    identity = {
        "reference": reference.fingerprint,
        "steps": config.score.feature_steps,
        "seed": config.seed,
        "code": artifact.code("cil.metrics.features"),
    }
    made = Artifact(storage.join(config.out, "feature_net"), KIND, identity)
    if made.finished:
        return made
    frames, velocity = _told(reference)
    made.begin(config.model_dump_json(indent=1))
    net = train_velocity_net(frames, velocity, config.score.feature_steps, config.seed)
    storage.write(made.path("net.safetensors"), safetensors.torch.save(net.state_dict()))
    made.finish({"clips": len(frames)})
    if REAL in sets and any(velocity is not None for _, velocity in _captions(sets[REAL])):
        unseen, truth = _told(sets[REAL])
        error = (load_net(made.uri)(unseen)[1] - truth).square().mean().sqrt()
        told = f"with an error of {error:.2f} pixels a frame"
        print(f"{KIND}: reads the velocity of real clips that it never saw {told}")
    return made


def _captions(videos: Videos) -> list[tuple[dict[str, Any], tuple[float, float] | None]]:
    """Each line, and the velocity that its caption tells."""
    return [(line, velocity_of(line.get("caption") or "")) for line in videos.lines]


def _told(videos: Videos) -> tuple[Tensor, Tensor]:
    """The clips whose captions tell their velocity, and that velocity in pixels a frame of the clip."""
    told = [(line, velocity) for line, velocity in _captions(videos) if velocity is not None]
    frames = [_frames(storage.join(videos.uri, line["file"])) for line, _ in told]
    return torch.stack(frames), torch.tensor([[line["stride"] * x for x in velocity] for line, velocity in told])


def _frames(uri: str) -> Tensor:
    try:
        return decode_all(storage.read(uri))
    except (BadVideo, FileNotFoundError) as error:
        raise UserError(
            f"{uri}: {error}; it was whole when generate made it: remove its set and run that again"
        ) from None
