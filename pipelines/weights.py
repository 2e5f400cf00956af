"""Fine-tuned weights as an artifact: the family's own files, and what they were trained from."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cil.families import Family
from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import family_code, refuse_other_family, snapshot
from pipelines.config import Config, TrainingRow

KIND = "weights"
CODE = ("pipelines.finetune", "pipelines.reader", "cil.objectives", "cil.conditioning", "cil.processes", "cil.draws")


def uri_of(config: Config, row: str) -> str:
    """A row of the study, or a URI."""
    return row if "/" in row else storage.join(config.out, "weights", row)


def plan_weights(
    config: Config, name: str, row: TrainingRow, cache: Manifest, parents: dict[str, Artifact]
) -> Artifact:
    """The artifact of a row, whose identity holds that of the weights it starts from."""
    parent = None
    start = row.settings.weights
    if start in parents:
        parent = parents[start].fingerprint
    elif start:
        parent = read_weights(config, start).fingerprint
    identity = {
        "family": config.family.model_dump(),
        "row": row.shaping(),
        "parent": parent,
        "cache": snapshot(cache),
        "code": artifact.code(*CODE, *family_code(config)),
    }
    return Artifact(uri_of(config, name), KIND, identity)


def write_weights(
    made: Artifact, family: Family, state: dict[str, Tensor], counts: dict[str, int], **content: Any
) -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        files = family.export(state, Path(folder))
        for name in files:
            storage.put(Path(folder, name), made.path(name))
    return made.finish(counts, files=sorted(files), **content)


def read_weights(config: Config, row: str) -> Manifest:
    manifest = artifact.read_manifest(uri_of(config, row), KIND)
    refuse_other_family(manifest, config)
    return manifest


def load_weights(family: Family, net: nn.Module, manifest: Manifest) -> None:
    with storage.local_copies(manifest.uri, manifest.content["files"]) as folder:
        net.load_state_dict(family.restore(folder), strict=True)
