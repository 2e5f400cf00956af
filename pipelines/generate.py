"""Videos from the first frames of held-out clips, a set for each row of the comparison, and the true clips beside them.

The pixels of a sample are a function of the row and the clip: its noise has its own seed, and every model call has the
same number of clips, the last one filled up.
"""

import hashlib
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cil import CleanCondition, Draws, InitialNoise, guided, sample
from cil.families import Family
from cil.families.base import Dropped
from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import Cache, pinned, read_cache, refuse_other_encoder
from pipelines.config import Config, EvaluationRow
from pipelines.errors import UserError
from pipelines.initial_noise import read_initial_noise
from pipelines.models import family_code, family_of, shape_of
from pipelines.parts import Made, Part, chunks, make_parts
from pipelines.reader import ClipReader, SampleOrder
from pipelines.video import encode
from pipelines.weights import fingerprint_of, network_of, refuse_other_shift

KIND = "videos"
CODE = (
    "pipelines.generate",
    "pipelines.reader",
    "pipelines.video",
    "cil.samplers",
    "cil.processes",
    "cil.initial_noise",
    "cil.draws",
)
REAL, REFERENCE = "real", "reference"  # true clips: those of the conditional images, and those of the Frechet distance
SPLITS = {REAL: "test", REFERENCE: "train"}


def generate(config: Config) -> dict[str, Manifest]:
    """The sets of all rows, and the two real ones."""
    refuse_impossible_starts(config)
    cache, family = read_cache(config), family_of(config)
    refuse_other_encoder(cache, family)
    rows = config.evaluation_rows()
    chosen = {name: choose(config, cache, name) for name in SPLITS}
    sets = {name: _plan(config, family, cache, name, None) for name in SPLITS}
    for name, row in rows.items():
        refuse_other_shift(config, row.weights)
        sets[name] = _plan(config, family, cache, name, row)

    parts = {}
    for name, made in sets.items():
        if not made.finished:
            made.begin(config.model_dump_json(indent=1))
            lots = chunks(chosen.get(name, chosen[REAL]), config.generate.clips_per_part)
            parts[name] = [
                Part(
                    made.path("parts", f"part-{i:05d}.jsonl"),
                    {"set": name, "folder": made.uri, "numbers": lot},
                    len(lot),
                )
                for i, lot in enumerate(lots)
            ]
    arguments = {"config": pinned(config, cache).model_dump()}
    make_parts(KIND, "videos", [*chain(*parts.values())], Sampler, arguments)
    for name, own in parts.items():
        index = [line for part in own for line in storage.read_rows(part.uri)]
        if len(index) != sum(part.size for part in own):
            raise AssertionError(f"{sets[name].uri}: {sum(part.size for part in own)} planned, {len(index)} made")
        storage.write_rows(sets[name].path("index.jsonl"), index)
        sets[name].finish({"videos": len(index)})
    return {name: made.manifest() for name, made in sets.items()}


def refuse_impossible_starts(config: Config) -> None:
    """An M that the family's process does not have, or more steps than lead from it."""
    process = family_of(config).process
    for row in config.evaluation_rows().values():
        try:
            process.times(config.generate.steps, row.settings.M)
        except ValueError as error:
            raise UserError(f"generate.rows.{row.arm}, generate.steps={config.generate.steps}: {error}") from None


def choose(config: Config, cache: Cache, name: str) -> list[int]:
    """The clips of a real set, in an order that has nothing to do with their content."""
    wanted = config.generate.clips if name == REAL else config.generate.reference
    reader = ClipReader(cache, SPLITS[name], config.generate.where)
    order = SampleOrder(len(reader), config.seed)
    numbers = [order(i) for i in range(min(wanted, len(reader)))]
    if len(numbers) < 2:
        found = f"{len(numbers)} {SPLITS[name]} clips with scores in {config.generate.where}"
        raise UserError(f"{cache.uri} has {found}; at least 2 are needed: widen generate.where, or cache more")
    if len(numbers) < wanted:
        print(f"{KIND}: the {name} set has {len(numbers)} clips, not {wanted}: the cache holds no more of them")
    return numbers


def _plan(config: Config, family: Family, cache: Cache, name: str, row: EvaluationRow | None) -> Artifact:
    settings = config.generate
    identity: dict[str, Any] = {
        "family": shape_of(family) | {"preset": family.preset},
        "precision": family.options.precision,
        "cache": cache.fingerprint,
        "seed": config.seed,
        "clips": settings.reference if name == REFERENCE else settings.clips,
        "where": settings.where,
        "code": artifact.code(*CODE, *family_code(family)),
    }
    if row is not None:
        identity |= {
            "row": row.settings.model_dump(exclude={"weights"}),
            "shift": family.options.shift,
            "steps": settings.steps,
            "clips_per_part": settings.clips_per_part,
            "weights": fingerprint_of(config, family, row.weights, row.settings.ema),
            "initial_noise": read_initial_noise(config)[1].fingerprint if row.settings.start == "analytic" else None,
        }
    return Artifact(storage.join(config.out, "videos", name), KIND, identity)


class Sampler:
    """Makes the videos of one part: mp4 files, and last their lines of the index. Made once a worker."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = Config.model_validate(config)
        self.rows = self.config.evaluation_rows()
        self.family = family_of(self.config)
        self.cache = read_cache(self.config)
        self.readers = {
            name: ClipReader(self.cache, split, self.config.generate.where) for name, split in SPLITS.items()
        }
        self._net: tuple[tuple[str, bool] | None, nn.Module] = (None, nn.Identity())

    def __call__(self, plan: dict[str, Any]) -> Made:
        name, numbers = plan["set"], list(plan["numbers"])
        reader = self.readers[REFERENCE if name == REFERENCE else REAL]
        filled = numbers + numbers[-1:] * (self.config.generate.clips_per_part - len(numbers))
        known = [reader.known(number) for number in filled]
        if name in SPLITS:
            latents = reader.batch(numbers)["latents"].float()
        else:
            latents = self.sample(self.rows[name], reader.batch(filled), [clip["clip_id"] for clip in known])
        lines = []
        for clip, frames in zip(known[: len(numbers)], self.family.decode(latents), strict=False):
            file = f"{clip['clip_id'].replace(':', '_')}.mp4"
            fps = max(round(clip["fps"] / clip["stride"]), 1)
            storage.write(storage.join(plan["folder"], file), encode(frames, fps))
            lines.append({"file": file} | {name: clip[name] for name in ("clip_id", "caption", "stride")})
        return Made(storage.to_rows(lines))

    @torch.no_grad()
    def sample(self, row: EvaluationRow, clips: dict[str, Tensor], ids: list[str]) -> Tensor:
        family, net = self.family, self.network(row.weights, row.settings.ema)
        draws = Draws([(self.config.seed, int(hashlib.sha256(i.encode()).hexdigest()[:12], 16)) for i in ids])
        condition, _ = family.condition(clips, CleanCondition(), torch.zeros(len(ids)), None)
        nothing = family.drop(condition, Dropped.all(len(ids)))
        denoise = guided(
            lambda x, t: family.denoise(net, x, t, condition),
            lambda x, t: family.denoise(net, x, t, nothing),
            row.settings.guidance,
        )
        times = family.process.times(self.config.generate.steps, row.settings.M)
        x = self.start(row.settings.start).sample(family.process, times[0], len(ids), draws)
        return sample(denoise, x, family.process, times, family.prediction)

    def start(self, kind: str) -> InitialNoise:
        if kind == "analytic":
            return read_initial_noise(self.config)[0]
        return InitialNoise.standard(self.family.latent_shape)

    def network(self, weights: str, averaged: bool) -> nn.Module:
        """The last one is kept: parts of one row come one after another."""
        if self._net[0] != (weights, averaged):
            self._net = (None, nn.Identity())  # the old one goes before the new one comes
            net = network_of(self.config, self.family, weights, averaged=averaged)
            self._net = ((weights, averaged), net.eval())
        return self._net[1]
