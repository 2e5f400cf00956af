"""E[X0] and tr(Cov)/d of a cache's training clips, merged from the moments that its parts hold."""

from cil.initial_noise import InitialNoise
from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import read_cache, read_moments, refuse_other_family, snapshot
from pipelines.config import Config
from pipelines.errors import UserError

KIND = "initial noise"
FILE = "initial_noise.safetensors"


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
    moments = read_moments(cache)
    if moments.count < 2:
        raise UserError(f"the cache at {cache.uri} has {moments.count} training clips: a variance needs at least 2")
    noise.begin(config.model_dump_json(indent=1))
    initial = InitialNoise.from_moments(moments)
    storage.write(noise.path(FILE), initial.to_bytes(cache=snapshot(cache), family=config.family.name))
    shown = f"E[X0] mean {initial.mean.mean():+.4f}, tr(Cov)/d {initial.variance:.4f}"
    print(f"{KIND}: {shown}, from {initial.count} training clips")
    return noise.finish({"clips": initial.count})


def read_initial_noise(config: Config) -> tuple[InitialNoise, Manifest]:
    manifest = artifact.read_manifest(storage.join(config.out, "initial_noise"), KIND)
    refuse_other_family(manifest, config)
    return InitialNoise.from_bytes(storage.read(storage.join(manifest.uri, FILE))), manifest
