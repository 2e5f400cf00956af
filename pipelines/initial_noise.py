"""E[X0] and tr(Cov)/d of a cache's training clips, merged from the moments that its parts hold."""

from cil import InitialNoise
from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import read_cache, read_moments, snapshot
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.models import family_of, refuse_other_family

KIND = "initial noise"
FILE = "initial_noise.safetensors"
GROUPS = 32  # of parts: the standard errors come from leaving each out in turn


def make_initial_noise(config: Config) -> Manifest:
    cache = read_cache(config)
    identity = {
        "family": cache.identity["family"],
        "cache": snapshot(cache),
        "code": artifact.code("pipelines.initial_noise", "cil.initial_noise", "cil.moments"),
    }
    noise = Artifact(storage.join(config.out, "initial_noise"), KIND, identity)
    if noise.finished:
        print(f"{KIND}: {noise.uri} is finished; nothing to do")
        return noise.manifest()
    moments = read_moments(cache, GROUPS)
    clips = sum(group.count for group in moments)
    if clips < 2:
        raise UserError(f"the cache at {cache.uri} has {clips} training clips: a variance needs at least 2")
    noise.begin(config.model_dump_json(indent=1))
    family = family_of(config)
    facts = {"family": family.name, "scaling_factor": str(family.scaling_factor), "cache": snapshot(cache)}
    initial = InitialNoise.from_moments(*moments, **facts)
    storage.write(noise.path(FILE), initial.to_bytes())
    print(f"{KIND}: {initial}")
    return noise.finish({"clips": clips})


def read_initial_noise(config: Config) -> tuple[InitialNoise, Manifest]:
    manifest = artifact.read_manifest(storage.join(config.out, "initial_noise"), KIND)
    refuse_other_family(manifest, config)
    noise, family = InitialNoise.from_bytes(storage.read(storage.join(manifest.uri, FILE))), family_of(config)
    try:
        noise.check(family.latent_shape, family.name, family.scaling_factor)
    except ValueError as error:
        raise UserError(f"{manifest.uri}: {error}") from None
    return noise, manifest
