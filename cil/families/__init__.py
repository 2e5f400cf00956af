"""The models that the pipeline can encode for, fine-tune and sample; everything peculiar to one stands in its file."""

from importlib import import_module

from cil.families.base import Family

NAMES = ("toy", "dynamicrafter", "videocrafter1", "svd", "i2vgenxl")


def load(
    name: str,
    frames: int,
    height: int,
    width: int,
    preset: str,
    weights: str | None = None,
    tokenizer: str | None = None,
) -> Family:
    """The family of this name, for clips of this size. `weights`: its published checkpoint, a local file."""
    if name not in NAMES:
        raise ValueError(f"family {name!r}: one of {', '.join(NAMES)}")
    family: Family = import_module(f"cil.families.{name}").build(frames, height, width, preset, weights, tokenizer)
    return family


__all__ = ["NAMES", "Family", "load"]
