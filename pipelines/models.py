"""The family that a configuration names, with its published weights; what of it shapes an artifact."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cil import families
from cil.families import Family
from cil.metrics.aesthetics import Aesthetics
from cil.moments import outside
from pipelines import storage
from pipelines.config import Config
from pipelines.errors import UserError


def family_of(config: Config) -> Family:
    told = config.family.model_dump()
    with refusing_weights():
        for name in ("weights", "tokenizer"):
            if told[name]:
                told[name] = _kept(f"family.{name}", told[name])
        return families.load(**told)


def aesthetics_of(config: Config) -> Aesthetics | None:
    given = config.cache.aesthetic.model_dump()
    if not any(given.values()):
        return None
    with refusing_weights("cache.aesthetic"):
        return Aesthetics.load(**{name: _kept(f"cache.aesthetic.{name}", uri) for name, uri in given.items()})


def _kept(key: str, uri: str) -> str:
    """Where the file or folder is that a key names, on this machine."""
    if not storage.exists(uri):
        raise UserError(f"{key}={uri}: there is nothing")
    return str(storage.kept_copy(uri))


def device_of(config: Config) -> str:
    """Where a worker encodes: on a GPU if it is to have a share of one. Ray shows it no other."""
    return "cuda" if config.cache.gpus and torch.cuda.is_available() else "cpu"


@contextmanager
def refusing_weights(key: str = "family") -> Iterator[None]:
    """What is wrong with files of weights is for the user to mend."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{key}: {error}") from None


def encoder_of(family: Family) -> str:
    """A digest of what is frozen: it reads the published weights."""
    with refusing_weights():
        return family.encoder_identity


def aesthetics_identity(config: Config) -> str | None:
    """A digest of the head and its CLIP, which it reads."""
    aesthetics = aesthetics_of(config)
    with refusing_weights("cache.aesthetic"):
        return aesthetics.identity if aesthetics else None


def shape_of(family: Family) -> dict[str, Any]:
    return {"name": family.name, "frames": family.frames, "height": family.height, "width": family.width}


def counted_of(config: Config, family: Family) -> Tensor:
    """[h, w], true where a latent is outside of cache.watermark."""
    height, width = family.latent_shape[2:]
    counted = outside(config.cache.watermark, height, width)
    if not counted.any():
        regions = [list(region) for region in config.cache.watermark]
        raise UserError(f"cache.watermark={regions}: touches each of the {height} x {width} latents, and none is left")
    return counted


def encoding_code(family: Family) -> tuple[str, ...]:
    """The modules that shape what a family caches."""
    return ("cil.families.base", f"cil.families.{family.name}", *family.encoding)


def family_code(family: Family) -> tuple[str, ...]:
    """All modules in which a family's functions stand."""
    return ("cil.families.base", f"cil.families.{family.name}", *family.modules)


def refuse_other_family(kind: str, uri: str, made_for: dict[str, Any], config: Config) -> None:
    wanted = config.family.model_dump() | shape_of(family_of(config))
    for key, value in made_for.items():
        if wanted[key] != value:
            raise UserError(f"the {kind} at {uri} is for family.{key}={value}, not {wanted[key]}: set it, or `out`")
