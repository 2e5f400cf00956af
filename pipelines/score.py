"""What is measured on the generated videos: per video, and per set as the metrics of an evaluate run in MLflow."""

from itertools import chain
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cil.metrics.features import VelocityNet, train_velocity_net
from cil.metrics.frechet import frechet_distance
from cil.metrics.motion import distribution_error, first_frame_error, motion_score
from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest, fingerprint
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.generate import KIND as VIDEOS
from pipelines.generate import REAL, REFERENCE
from pipelines.parts import Made, Part, chunks, make_parts
from pipelines.shapes import velocity_of
from pipelines.tracking import Run, refuse_unreachable
from pipelines.video import decode_all
from pipelines.weights import read_weights

KIND = "scores"
NET_KIND = "feature net"
VIDEOS_PER_PART = 64
CODE = ("pipelines.score", "pipelines.video", "cil.metrics.motion", "cil.metrics.frechet", "cil.metrics.features")


def score(config: Config) -> dict[str, Manifest]:
    """Every set of videos scored against the real ones."""
    refuse_unreachable(config)
    rows = config.evaluation_rows()
    names = [REAL, *rows]
    videos = {
        name: artifact.read_manifest(storage.join(config.out, "videos", name), VIDEOS) for name in [REFERENCE, *names]
    }
    net = _feature_net(config, videos[REFERENCE], videos[REAL])
    sets = {name: _plan(config, name, videos[name], videos, net) for name in [REFERENCE, *names]}

    parts: dict[str, list[Part]] = {}
    for name, made in sets.items():
        if not made.finished:
            made.begin(config.model_dump_json(indent=1))
            lots = chunks(_index(videos[name]), VIDEOS_PER_PART)
            parts[name] = [
                Part(made.path("parts", f"part-{i:05d}.jsonl"), {"set": name, "lines": lot}, len(lot))
                for i, lot in enumerate(lots)
            ]
    arguments = {"folders": {name: m.uri for name, m in videos.items()}, "net": net.uri}
    make_parts(KIND, "videos", [*chain(*parts.values())], Scorer, arguments)
    # The reference first: the Frechet distance is measured to it.
    for name, own in parts.items():
        lines = [line for part in own for line in storage.read_rows(part.uri)]
        if len(lines) != videos[name].counts["videos"]:
            raise AssertionError(f"{sets[name].uri}: {videos[name].counts['videos']} videos, {len(lines)} scored")
        storage.write_rows(sets[name].path("scores.jsonl"), lines)
        sets[name].finish({"videos": len(lines)})
    scores = {name: made.manifest() for name, made in sets.items()}
    tables = {name: storage.read_rows(storage.join(m.uri, "scores.jsonl")) for name, m in scores.items()}
    for name in names:
        _track(config, name, scores[name], videos[name], summary(config, tables[name], tables[REAL], tables[REFERENCE]))
    return scores


def summary(config: Config, ours: list[dict], real: list[dict], reference: list[dict]) -> dict[str, float]:
    """The metrics of a set."""

    def column(rows: list[dict], name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    motion, speed = column(ours, "motion"), column(ours, "speed")
    return {
        "motion": float(motion.mean()),
        "motion_error": distribution_error(motion, column(real, "motion")),
        "speed": float(speed.mean()),
        "static_share": float((speed < config.score.static_below).double().mean()),
        "first_frame_error": float(column(ours, "first_frame_error").mean()),
        "frechet": frechet_distance(column(ours, "features"), column(reference, "features")),
        "videos": len(ours),
    }


class Scorer:
    """Scores the videos of one part. Made once a worker."""

    def __init__(self, folders: dict[str, str], net: str) -> None:
        self.folders, self.net = folders, _load_net(net)

    def __call__(self, plan: dict[str, Any]) -> Made:
        lines = []
        for line in plan["lines"]:
            frames = decode_all(storage.read(storage.join(self.folders[plan["set"]], line["file"])))
            image = frames[0]
            if plan["set"] not in (REAL, REFERENCE):
                image = decode_all(storage.read(storage.join(self.folders[REAL], line["file"])))[0]
            features, velocity = self.net(frames[None])
            scores = {
                "clip_id": line["clip_id"],
                "motion": motion_score(frames),
                "speed": float(velocity[0].norm()),
                "first_frame_error": first_frame_error(frames, image),
                "features": [round(float(x), 6) for x in features[0]],
            }
            lines.append(scores)
        return Made(storage.to_rows(lines))


def evaluation(config: Config, scores: Manifest) -> str:
    """What an evaluate run is known by."""
    return fingerprint([scores.fingerprint, config.score.static_below])


def _plan(config: Config, name: str, own: Manifest, videos: dict[str, Manifest], net: Artifact) -> Artifact:
    identity = {
        "videos": own.fingerprint,
        "real": videos[REAL].fingerprint,
        "feature_net": net.fingerprint,
        "code": artifact.code(*CODE),
    }
    return Artifact(storage.join(config.out, "scores", name), KIND, identity)


def _feature_net(config: Config, reference: Manifest, real: Manifest) -> Artifact:
    """Trained once on the reference clips, whose captions tell their velocities."""
    identity = {
        "reference": reference.fingerprint,
        "steps": config.score.feature_steps,
        "seed": config.seed,
        "code": artifact.code("cil.metrics.features"),
    }
    made = Artifact(storage.join(config.out, "feature_net"), NET_KIND, identity)
    if made.finished:
        return made
    frames, velocity = _told(reference)
    made.begin(config.model_dump_json(indent=1))
    net = train_velocity_net(frames, velocity, config.score.feature_steps, config.seed)
    storage.write(made.path("net.safetensors"), safetensors.torch.save(net.state_dict()))
    made.finish({"clips": len(frames)})
    unseen, truth = _told(real)
    error = (net(unseen)[1] - truth).square().mean().sqrt()
    print(f"{NET_KIND}: reads the velocity of real clips that it never saw with an error of {error:.2f} pixels a frame")
    return made


def _told(videos: Manifest) -> tuple[Tensor, Tensor]:
    """The clips whose captions tell their velocity, and that velocity in pixels a frame of the clip."""
    told = [(line, velocity_of(line["caption"])) for line in _index(videos)]
    frames = [decode_all(storage.read(storage.join(videos.uri, line["file"]))) for line, v in told if v is not None]
    velocities = [[line["stride"] * x for x in v] for line, v in told if v is not None]
    if len(frames) < 2:
        raise UserError(
            "the feature net learns velocities from captions as jobs.make_shapes writes them; here are none"
        )
    return torch.stack(frames), torch.tensor(velocities)


def _load_net(uri: str) -> VelocityNet:
    net = VelocityNet().eval().requires_grad_(False)
    net.load_state_dict(safetensors.torch.load(storage.read(storage.join(uri, "net.safetensors"))))
    return net


def _index(videos: Manifest) -> list[dict[str, Any]]:
    return storage.read_rows(storage.join(videos.uri, "index.jsonl"))


def _track(config: Config, name: str, scores: Manifest, videos: Manifest, values: dict[str, float]) -> None:
    run = Run(config, name, "evaluate", evaluation(config, scores))
    row = config.evaluation_rows().get(name)
    if row:
        trained = config.training_rows().get(row.weights)
        run.parameters({"row": row.settings.model_dump(exclude={"weights"}), "steps": config.generate.steps})
        run.tags({"weights": row.weights})
        run.parameters({"train": read_weights(config, row.weights).identity["row"]} if trained else {})
    run.tags({"row": name, "videos": videos.uri, "scores": scores.uri})
    run.metrics(values)
    run.finish()
    print(f"{KIND}: {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items() if k != "videos"))
