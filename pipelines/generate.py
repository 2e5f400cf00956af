"""Videos from images, or from the first frames of held-out clips with the true clips beside them: a set for each row.

The pixels of a sample are a function of the row, the image and the seed: its noise has a stream of its own, and every
model call has the same number of clips, the last one filled up.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from cil import CleanCondition, Draws, InitialNoise, guided, sample
from cil.draws import stream_seed
from cil.families import Clip, Family
from cil.families.base import Dropped
from cil.images import read_image
from cil.initial_noise import Covariance
from pipelines import artifact, cluster, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import LATEST, Cache, pinned, read_cache, refuse_other_encoder
from pipelines.config import Config, EvaluationRow, GenerateRowConfig
from pipelines.errors import UserError, shown
from pipelines.images import PICTURE, Picture, read_images
from pipelines.initial_noise import read_initial_noise
from pipelines.models import encoder_of, family_code, family_of, refusing_weights, shape_of
from pipelines.parts import Made, Part, chunks, make_parts
from pipelines.reader import ClipReader, SampleOrder
from pipelines.video import BadVideo, Reason, encode
from pipelines.weights import LastNetwork, fingerprint_of, refuse_other_shift

KIND = "videos"
CODE = (
    *("pipelines.generate", "pipelines.images", "pipelines.reader", "pipelines.video"),
    *("cil.images", "cil.samplers", "cil.processes", "cil.initial_noise", "cil.draws"),
)
REAL, REFERENCE = "real", "reference"  # true clips: those of the conditional images, and those of the Frechet distance
SPLITS = {REAL: "test", REFERENCE: "train"}
TRUE_PER_PART = 32  # true clips, whatever rows are sampled with
FPS = 8.0  # of an image of which nothing says another
PROBLEMS = {
    "missing": "there is no such file",
    "unsafe_name": "neither a path in the table's folder nor s3://, or it holds a password",
    "damaged": "it is a folder, a loop of links, a pipe or a device, too large, or not to be read",
}


def generate(config: Config) -> dict[str, Manifest]:
    """The sets of all rows, and the real ones: to images made elsewhere there is no true clip."""
    refuse_impossible_rows(config)
    images = read_images(config.generate.images) if config.generate.images else None
    cache, family = _cache_of(config), family_of(config)
    if cache is not None:
        refuse_other_encoder(cache, family)
    wanted: dict[str, list[dict[str, Any]]] = {}
    for name in SPLITS:
        if cache is not None and (images is None or name == REFERENCE):
            wanted[name] = [{"number": number} for number in choose(config, cache, name)]
    rows = config.evaluation_rows()
    begun_with = [{"picture": asdict(picture)} for picture in images] if images is not None else wanted[REAL]
    for name, row in rows.items():
        refuse_other_shift(config, row.weights)
        wanted[name] = [*_seeded(row.settings, begun_with)]
    sets = {name: _plan(config, family, cache, name, rows.get(name), images) for name in wanted}

    parts = {}
    for name, made in sets.items():
        if not made.finished:
            lots = chunks(wanted[name], config.generate.clips_per_part if name in rows else TRUE_PER_PART)
            parts[name] = [
                Part(
                    made.path("parts", f"part-{i:05d}.jsonl"),
                    {"set": name, "folder": made.uri, "samples": lot},
                    len(lot),
                )
                for i, lot in enumerate(lots)
            ]
    if parts:
        _refuse_unfit_nodes(config, images or [])
    for name in parts:
        sets[name].begin(config.model_dump_json(indent=1))
    arguments = {"config": (pinned(config, cache) if cache is not None else config).model_dump()}
    make_parts(KIND, "videos", [*chain(*parts.values())], Sampler, arguments, config.generate.gpus)
    for name, own in parts.items():
        _finish(sets[name], own)
    return {name: made.manifest() for name, made in sets.items()}


def refuse_impossible_rows(config: Config) -> None:
    """An M that the family's process does not have, more steps than lead from it, what its network is not told."""
    family = family_of(config)
    for row in config.evaluation_rows().values():
        place, own = f"generate.rows.{row.arm}", row.settings
        try:
            family.process.times(own.steps, own.M)
        except ValueError as error:
            raise UserError(f"{place}, steps={own.steps}: {error}") from None
        if own.motion is not None and not family.told_motion:
            raise UserError(f"{place}.motion={own.motion}: the family {family.name} has no such input")


def _refuse_unfit_nodes(config: Config, images: list[Picture]) -> None:
    """That have no GPUs, or see no images: all would be missing there."""
    cluster.connect()
    if config.generate.gpus:
        cluster.workers(config.generate.gpus, "generate.gpus")
    cluster.refuse_unseen([p.uri for p in images if storage.is_local(p.uri) and not p.problem][:1])


def _cache_of(config: Config) -> Cache | None:
    """With images of one's own there need be none."""
    latest = storage.join(config.out, "cache", LATEST)
    if config.generate.images and not config.cache.snapshot and not storage.exists(latest):
        return None
    return read_cache(config)


def _seeded(row: GenerateRowConfig, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each image its seeds one after the other, so that it is encoded once."""
    for each in samples:
        own = each.get("picture", {}).get("seed")
        for seed in row.seeds if own is None else [own]:
            yield each | {"seed": seed, "ending": f"-seed{seed}" if len(row.seeds) > 1 else ""}


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


def _plan(
    config: Config,
    family: Family,
    cache: Cache | None,
    name: str,
    row: EvaluationRow | None,
    images: list[Picture] | None = None,
) -> Artifact:
    settings = config.generate
    identity: dict[str, Any] = {
        "family": shape_of(family) | {"preset": family.preset},
        "precision": family.options.precision,
        "seed": config.seed,
        "code": artifact.code(*CODE, *family_code(family)),
    }
    if row is not None and images is not None:
        told = [asdict(picture) | {"uri": ""} for picture in images]  # wherever they lie
        identity |= {"images": artifact.fingerprint(told), "encoder": encoder_of(family)}
    else:
        assert cache is not None
        clips = settings.reference if name == REFERENCE else settings.clips
        identity |= {"cache": cache.fingerprint, "clips": clips, "where": settings.where}
    if row is not None:
        own = row.settings
        identity |= {
            "row": own.model_dump(exclude={"weights", "sweep"}),
            "shift": family.options.shift,
            "clips_per_part": settings.clips_per_part,
            "weights": fingerprint_of(config, family, row.weights, own.ema),
            "initial_noise": None if own.start == "gaussian" else initial_noise_of(config, own.start)[1],
        }
    return Artifact(storage.join(config.out, "videos", name), KIND, identity)


def initial_noise_of(config: Config, start: str) -> tuple[InitialNoise, str]:
    """And its fingerprint."""
    uri, family = config.generate.initial_noise, family_of(config)
    if uri is None:
        noise, manifest = read_initial_noise(config)
        uri, known_by = manifest.uri, manifest.fingerprint
    elif not storage.exists(uri):
        raise UserError(f"generate.initial_noise={uri}: there is nothing")
    else:
        data = storage.read(uri, storage.TOLD)
        with refusing_weights(f"generate.initial_noise={uri}"):
            noise = InitialNoise.from_bytes(data)
            noise.check(family.latent_shape, family.name, family.scaling_factor)
        known_by = hashlib.sha256(data).hexdigest()[:16]
    if start == "diagonal" and noise.diagonal is None:
        raise UserError(
            f"start=diagonal: {uri} has one variance for all elements, as published files do; take analytic"
        )
    return noise, known_by


def _finish(made: Artifact, parts: list[Part]) -> None:
    """The index, and beside it the images that gave no video."""
    told = [line for part in parts for line in storage.read_rows(part.uri)]
    if len(told) != sum(part.size for part in parts):
        raise AssertionError(f"{made.uri}: {sum(part.size for part in parts)} planned, {len(told)} made or rejected")
    index, rejects = ([line for line in told if ("reason" in line) is rejected] for rejected in (False, True))
    if rejects:
        storage.write_rows(made.path("rejects.jsonl"), rejects)
        first = f"{rejects[0]['image']}: {rejects[0]['reason']}, {rejects[0]['message']}"
        if not index:
            mended = f"when they can, remove {made.uri} and run again"
            raise UserError(f"{made.uri}: none of its images can be read ({first}); {mended}")
        print(f"{KIND}: {len(rejects)} of {made.uri} not made ({shown(first)}); see rejects.jsonl there")
    storage.write_rows(made.path("index.jsonl"), index)
    made.finish({"videos": len(index), "rejected": len(rejects)})


class Sampler:
    """Makes the videos of one part: mp4 files, and last their lines of the index. Made once a worker."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = Config.model_validate(config)
        self.device = "cuda" if self.config.generate.gpus and torch.cuda.is_available() else "cpu"
        self.rows = self.config.evaluation_rows()
        self.family = family_of(self.config).to(self.device)
        cache, where = _cache_of(self.config), self.config.generate.where
        self.readers = {n: ClipReader(cache, split, where) for n, split in SPLITS.items()} if cache is not None else {}
        self.network = LastNetwork(self.config, self.family, self.device)

    def __call__(self, plan: dict[str, Any]) -> Made:
        name, samples, folder = plan["set"], list(plan["samples"]), plan["folder"]
        if name in SPLITS:
            true = [self.true_clip(folder, self.readers[name], **each) for each in samples]
            return Made(storage.to_rows(true), told={"videos": len(true)})
        row = self.rows[name]
        own = row.settings.model_dump(exclude={"weights", "sweep", "seeds", "fps"})
        told, batch = (self.pictures if "picture" in samples[0] else self.clips)(row.settings, samples)
        lines = [line for line in told if "reason" not in line]
        if lines:
            size = self.config.generate.clips_per_part
            filled = [min(i, len(lines) - 1) for i in range(size)]  # whatever of the part could not be read
            latents = self.sample(
                row,
                {key: tensor[filled] for key, tensor in batch.items()},
                [lines[i]["clip_id"] for i in filled],
                [lines[i]["seed"] for i in filled],
            )
            for line, clip in zip(lines, latents, strict=False):
                line["row"] = {"name": name, "weights": row.weights, **own}
                self.write(folder, line, clip)
        return Made(storage.to_rows(told), told={"videos": len(told), "rejected_videos": len(told) - len(lines)})

    def true_clip(self, folder: str, reader: ClipReader, number: int) -> dict[str, Any]:
        line = _line(reader.known(number))
        self.write(folder, line, reader.batch([number])["latents"][0].float())
        return line

    def write(self, folder: str, line: dict[str, Any], latents: Tensor) -> None:
        """Decoded one clip at a time: memory does not grow with the part."""
        frames = self.family.decode(latents[None])[0].cpu()
        storage.write(storage.inside(folder, line["file"]), encode(frames, line["fps"]))

    # -- what samples begin with: their lines of the index, and what the family has encoded --------------------------

    def clips(
        self, row: GenerateRowConfig, samples: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        reader, fps = self.readers[REAL], row.fps
        lines = [_line(reader.known(each["number"]), fps, each["ending"], seed=each["seed"]) for each in samples]
        batch = reader.batch([each["number"] for each in samples])
        if fps is not None:
            batch |= self.family.rates([Clip(fps=fps, stride=line["stride"]) for line in lines])
        return lines, batch

    def pictures(
        self, row: GenerateRowConfig, samples: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Lines of those that cannot be read have a reason, and nothing is encoded of them."""
        lines: list[dict[str, Any]] = []
        made: list[dict[str, Tensor]] = []
        last = None  # of which that is made
        for each in samples:
            picture = Picture(**each["picture"])
            fps = row.fps or picture.fps or FPS
            line = {
                "clip_id": picture.id,
                "image": shown(picture.name),
                "caption": picture.prompt,
                "seed": each["seed"],
            }
            try:
                made.append(made[-1] if picture == last else self.encoded(picture, fps))
                last = picture
                line |= {"file": f"{picture.id}{each['ending']}.mp4", "fps": fps, "stride": 1}
            except BadVideo as error:
                line |= {"reason": error.reason, "message": str(error)[:500]}
            lines.append(line)
        return lines, {key: torch.cat([one[key] for one in made]) for key in made[0]} if made else {}

    def encoded(self, picture: Picture, fps: float) -> dict[str, Tensor]:
        """As a clip of one frame is cached."""
        if picture.problem:
            raise BadVideo(cast(Reason, picture.problem), PROBLEMS[picture.problem])
        data = storage.read(picture.uri, PICTURE)
        try:
            pixels = read_image(data, self.family.height, self.family.width)
        except ValueError as error:
            raise BadVideo("damaged", str(error).partition(": ")[2]) from None
        known = Clip(picture.prompt, fps, seed=stream_seed(picture.id))
        tensors = self.family.encode(pixels[None, None], [known])
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise BadVideo("not_finite", "the encoder gave NaN or inf")
        return tensors

    # -- sampling ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, row: EvaluationRow, clips: dict[str, Tensor], ids: Sequence[str], seeds: Sequence[int]) -> Tensor:
        family, own, net = self.family, row.settings, self.network.of(row.weights, row.settings.ema)
        given = {name: tensor.to(self.device) for name, tensor in clips.items()}
        if own.motion is not None:
            given["motion"] = torch.full((len(ids),), own.motion, device=self.device)
        draws = Draws([(self.config.seed, seed, id) for id, seed in zip(ids, seeds, strict=True)])
        condition, _ = family.condition(given, CleanCondition(), torch.zeros(len(ids), device=self.device), None)
        nothing = family.drop(condition, Dropped.all(len(ids), self.device))
        denoise = guided(
            lambda x, t: family.denoise(net, x, t, condition),
            lambda x, t: family.denoise(net, x, t, nothing),
            own.guidance,
        )
        times = family.process.times(own.steps, own.M)
        covariance: Covariance = "diagonal" if own.start == "diagonal" else "isotropic"
        noise = self.start(own.start)
        x = noise.sample(family.process, times[0], len(ids), draws, covariance, device=self.device)
        return sample(denoise, x, family.process, times, family.prediction)

    def start(self, kind: str) -> InitialNoise:
        if kind == "gaussian":
            return InitialNoise.standard(self.family.latent_shape)
        return initial_noise_of(self.config, kind)[0]


def _line(clip: dict[str, Any], fps: float | None = None, ending: str = "", **told: Any) -> dict[str, Any]:
    own = {name: clip[name] for name in ("clip_id", "caption", "stride")}
    file = f"{clip['clip_id'].replace(':', '_')}{ending}.mp4"
    return {"file": file, **own, "fps": fps or clip["fps"] / clip["stride"], **told}
