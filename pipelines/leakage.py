"""How much one-step predictions move over t, with the weights of each row: leakage itself, of held-out clips.

Two rows with the same weights have the same curve: it is before any sampling.
"""

import json
from itertools import chain
from typing import Any

import torch

from cil.metrics.leakage import leakage, one_step
from pipelines import artifact, cluster, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import pinned, read_cache, refuse_other_encoder
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.generate import REAL, SPLITS
from pipelines.models import family_code, family_of, shape_of
from pipelines.parts import Made, Part, chunks, make_parts
from pipelines.reader import ClipReader, SampleOrder
from pipelines.weights import LastNetwork, fingerprint_of

KIND = "leakage"
FILE = "curve.json"
SPLIT = SPLITS[REAL]
TIMES = 10
CLIPS_PER_PART = 8
SEED = 0x1EA  # with a clip's own id, the noise that all rows are asked about
CODE = (
    "pipelines.leakage",
    "pipelines.reader",
    "cil.metrics.leakage",
    "cil.metrics.motion",
    "cil.processes",
    "cil.draws",
)


def measure_leakage(config: Config, videos: dict[str, Manifest]) -> dict[str, dict[str, Any]]:
    """The curves of these rows, but for those whose weights are not at hand; none without a cache.

    `videos`: of each row those that it is beside. Other weights than they were made with say nothing of them.
    """
    if not config.score.leakage or not videos:
        return {}
    try:
        cache, family = read_cache(config), family_of(config)
        refuse_other_encoder(cache, family)
        reader = ClipReader(cache, SPLIT, config.generate.where)
    except UserError as error:
        print(f"{KIND}: not measured: {error}")
        return {}
    numbers = _clips(config, len(reader))
    if not numbers:
        print(f"{KIND}: not measured: no {SPLIT} clip has scores in {config.generate.where}")
        return {}
    made: dict[str, Artifact] = {}
    parts: dict[str, list[Part]] = {}
    for name, sampled in videos.items():
        row = config.evaluation_rows()[name]
        try:
            weights = fingerprint_of(config, family, row.weights, row.settings.ema)
        except UserError as error:
            print(f"{KIND}: not measured of {name}: {error}")
            continue
        if weights != sampled.identity["weights"]:
            print(f"{KIND}: not measured of {name}: its videos are of other weights than {row.weights} holds now")
            continue
        identity = {
            "weights": weights,
            "family": shape_of(family) | {"preset": family.preset},
            "precision": family.options.precision,
            "shift": family.options.shift,
            "cache": cache.fingerprint,
            "seed": config.seed,
            "clips": len(numbers),
            "where": config.generate.where,
            "code": artifact.code(*CODE, *family_code(family)),
        }
        own = Artifact(storage.join(config.out, "leakage", artifact.fingerprint(identity)), KIND, identity)
        made[name] = own
        if not own.finished and own.uri not in parts:
            own.begin(config.model_dump_json(indent=1))
            plan = {"weights": row.weights, "ema": row.settings.ema}
            parts[own.uri] = [
                Part(own.path("parts", f"part-{i:05d}.jsonl"), plan | {"numbers": lot}, len(lot))
                for i, lot in enumerate(chunks(numbers, CLIPS_PER_PART))
            ]
    if parts and config.score.gpus:
        cluster.connect()
        cluster.workers(config.score.gpus, "score.gpus")
    arguments = {"config": pinned(config, cache).model_dump()}
    make_parts(KIND, "clips", [*chain(*parts.values())], Predictor, arguments, gpus=config.score.gpus)
    times = family.process.unit_time(family.process.times(TIMES).flip(0))
    for own in {own.uri: own for own in made.values() if own.uri in parts}.values():
        lines = [line for part in parts[own.uri] for line in storage.read_rows(part.uri)]
        if len(lines) != len(numbers):
            raise AssertionError(f"{own.uri}: {len(numbers)} clips, {len(lines)} looked at")
        storage.write(own.path(FILE), json.dumps(_curve(times, lines), indent=1).encode())
        own.finish({"clips": len(lines)})
    curves = {name: {"uri": own.uri} | json.loads(storage.read(own.path(FILE))) for name, own in made.items()}
    if still := [name for name, curve in curves.items() if curve["leakage"] is None]:
        print(f"{KIND}: no number for {', '.join(still)}: the {len(numbers)} true clips do not move")
    return curves


def _clips(config: Config, clips: int) -> list[int]:
    order = SampleOrder(clips, config.seed) if clips else None
    return [order(i) for i in range(min(config.score.leakage, clips))] if order else []


def _curve(times: torch.Tensor, lines: list[dict[str, Any]]) -> dict[str, Any]:
    motion, truth = (torch.tensor([line[key] for line in lines], dtype=torch.float64) for key in ("motion", "truth"))
    lack, excess = leakage(times, motion, truth) if truth.mean() > 0 else (None, None)
    return {
        "t": times.tolist(),
        "motion": motion.mean(0).tolist(),
        "truth": float(truth.mean()),
        "leakage": lack,
        "excess": excess,
        "clips": len(lines),
    }


class Predictor:
    """Made once a worker, then called with weights and clips."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = Config.model_validate(config)
        self.device = "cuda" if self.config.score.gpus and torch.cuda.is_available() else "cpu"
        self.family = family_of(self.config).to(self.device)
        self.reader = ClipReader(read_cache(self.config), SPLIT, self.config.generate.where)
        self.times = self.family.process.times(TIMES).flip(0)  # rising
        self.network = LastNetwork(self.config, self.family, self.device)

    def __call__(self, plan: dict[str, Any]) -> Made:
        net, lines = self.network.of(plan["weights"], plan["ema"]), []
        for number in plan["numbers"]:
            clip_id = self.reader.known(number)["clip_id"]
            batch = {name: tensor.to(self.device) for name, tensor in self.reader.batch([number]).items()}
            found = one_step(self.family, net, batch, self.times, (SEED, clip_id))
            lines.append({"clip_id": clip_id, "motion": found.motion, "truth": found.truth, "loss": found.loss})
        return Made(storage.to_rows(lines))
