"""The models that the pipeline can encode for, fine-tune and sample; everything peculiar to one stands in its file."""

from importlib import import_module
from typing import Any

from cil.families.base import Clip, Family, Options

NAMES = ("toy", "dynamicrafter", "videocrafter1", "svd", "i2vgenxl")


def load(
    name: str,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    preset: str = "tiny",
    **options: Any,
) -> Family:
    """The family of this name, for clips of this size or else of the preset's. `options`: see `Options`."""
    if name not in NAMES:
        raise ValueError(f"family {name!r}: one of {', '.join(NAMES)}")
    build = import_module(f"cil.families.{name}").build
    family: Family = build(preset, frames, height, width, Options(**options))
    return family


__all__ = ["NAMES", "Clip", "Family", "Options", "load"]
