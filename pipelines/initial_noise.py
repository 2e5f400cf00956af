"""E[X0] and tr(Cov)/d of a cache's training clips, merged from the moments that its parts hold.

Where only some clips are wanted, the moments of their parts are made anew from the latents.
"""

import io
import posixpath
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cil import InitialNoise
from cil.initial_noise import Layout
from cil.moments import Moments
from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import Cache, opened, read_cache
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.models import counted_of, family_of, refuse_other_family
from pipelines.parts import Made, Part, make_parts
from pipelines.reader import selected

KIND = "initial noise"
FILE = "initial_noise.safetensors"
GROUPS = 32  # of parts: the standard errors come from leaving each out in turn


def make_initial_noise(config: Config) -> Manifest:
    cache, family = read_cache(config), family_of(config)
    identity = {
        "family": cache.encoding["family"],
        "cache": cache.fingerprint,
        "where": config.initial_noise.where,
        "watermark": config.cache.watermark,
        "code": artifact.code("pipelines.initial_noise", "cil.initial_noise", "cil.moments"),
    }
    noise = Artifact(storage.join(config.out, config.initial_noise.name), KIND, identity)
    if noise.finished:
        print(f"{KIND}: {noise.uri} is finished; nothing to do")
        return noise.manifest()
    index = cache.index()
    chosen = selected(index, "train", config.initial_noise.where)
    clips = int(chosen.sum())
    if clips < 2:
        asked = f" with scores in {config.initial_noise.where}" if config.initial_noise.where else ""
        raise UserError(f"the cache at {cache.uri} has {clips} training clips{asked}: a variance needs at least 2")
    counted = counted_of(config, family)
    noise.begin(config.model_dump_json(indent=1))
    groups = _groups(config, cache, noise, index, chosen)
    if sum(group.count for group in groups) != clips:
        raise AssertionError(f"{noise.uri}: {clips} training clips, but moments of {sum(g.count for g in groups)}")
    facts = {"family": family.name, "scaling_factor": str(family.scaling_factor), "cache": cache.fingerprint}
    initial = InitialNoise.from_moments(*groups, counted=counted, **facts)
    storage.write(noise.path(FILE), initial.to_bytes())
    for layout in get_args(Layout):
        storage.write(noise.path(f"published_{layout}.pt"), initial.to_published(layout))
    storage.write(noise.path("estimate.png"), draw_estimate(groups, counted))
    made = noise.finish({"clips": clips})
    print(card(config, cache, made, initial))
    return made


def card(config: Config, cache: Cache, noise: Manifest, initial: InitialNoise) -> str:
    where = f" with {config.initial_noise.where}" if config.initial_noise.where else ""
    snapshot = posixpath.basename(cache.manifest.uri)
    published = ", ".join(f"published_{layout}.pt" for layout in get_args(Layout))
    lines = [
        f"{KIND} at {noise.uri}",
        f"  clips       {noise.counts['clips']:,} for training{where}, of snapshot {snapshot}",
        f"  estimate    {initial}",
        f"  files       {FILE}; as the authors' code reads it: {published}",
        "  picture     estimate.png, the estimate as clips are added",
    ]
    return "\n".join(lines)


def _groups(config: Config, cache: Cache, noise: Artifact, index: pa.Table, chosen: np.ndarray) -> list[Moments]:
    """Of parts that have no video in common. A part of which not all training clips are chosen is read again."""
    part, own = index["part"].to_numpy(), pc.equal(index["drawn_split"], "train").to_numpy()
    total = len(cache.parts)
    wanted, there = (np.bincount(part[mask], minlength=total) for mask in (chosen, own))
    both = np.bincount(part[chosen & own], minlength=total)
    anew = [i for i in range(total) if wanted[i] and not wanted[i] == there[i] == both[i]]
    uris = {i: noise.path("parts", f"{cache.parts[i]['name']}.moments") for i in anew}
    rows, numbers = index["row"].to_numpy(), np.flatnonzero(chosen)
    order = numbers[np.argsort(part[numbers], kind="stable")]
    begin, end = (np.searchsorted(part[order], anew, side=side) for side in ("left", "right"))
    parts = [
        Part(uris[i], {"part": cache.parts[i]["name"], "rows": sorted(rows[order[a:b]].tolist())}, int(b - a))
        for i, a, b in zip(anew, begin, end, strict=True)
    ]
    make_parts(KIND, "clips", parts, MomentsMaker, {"config": config.model_dump(), "cache": cache.uri})
    sources = [uris.get(i, cache.path(cache.parts[i]["name"], "moments")) for i in range(total) if wanted[i]]
    merged: list[Moments] = []
    with ThreadPoolExecutor(storage.AT_ONCE) as pool:
        for i, moments in enumerate(pool.map(lambda uri: Moments.from_bytes(storage.read(uri)), sources)):
            if i < GROUPS:
                merged.append(moments)
            else:
                merged[i % GROUPS] = merged[i % GROUPS].merge(moments)
    return merged


class MomentsMaker:
    """The moments of some clips of a part, from their latents. Made once a worker."""

    def __init__(self, config: dict[str, Any], cache: str) -> None:
        self.shape = family_of(Config.model_validate(config)).latent_shape
        self.cache = cache

    def __call__(self, plan: dict[str, Any]) -> Made:
        if not plan["rows"]:
            return Made(Moments.zeros(self.shape).to_bytes())
        table = opened(storage.join(self.cache, "parts", f"{plan['part']}.arrow")).read_all().take(plan["rows"])
        tensors = [
            torch.from_numpy(
                np.stack([np.frombuffer(v.as_py(), np.float16) for v in table[name]]).reshape(-1, *self.shape)
            )
            for name in ("latents", "latents_std")
            if name in table.column_names
        ]
        return Made(Moments.of(tensors[0], table["clip_id"].to_pylist(), *tensors[1:]).to_bytes())


def draw_estimate(groups: list[Moments], counted: torch.Tensor) -> bytes:
    """How tr(Cov)/d settles as groups of parts are added, with its standard error."""
    from matplotlib.figure import Figure

    made = [InitialNoise.from_moments(*groups[:n], counted=counted) for n in range(1, len(groups) + 1)]
    known = [noise for noise in made if noise.count > 1]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [n.count for n in known], [n.variance for n in known], [n.variance_error or 0 for n in known], fmt="o-"
    )
    axes.set(
        xlabel="training clips", ylabel="tr(Cov) / d, with its standard error", title="The estimate as clips are added"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def read_initial_noise(config: Config) -> tuple[InitialNoise, Manifest]:
    manifest = artifact.read_manifest(storage.join(config.out, config.initial_noise.name), KIND)
    refuse_other_family(KIND, manifest.uri, manifest.identity["family"], config)
    noise, family = InitialNoise.from_bytes(storage.read(storage.join(manifest.uri, FILE))), family_of(config)
    try:
        noise.check(family.latent_shape, family.name, family.scaling_factor)
    except ValueError as error:
        raise UserError(f"{manifest.uri}: {error}") from None
    return noise, manifest
