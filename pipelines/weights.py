"""A network's weights: fine-tuned ones as an artifact of ours, or published ones, a file or a folder at a URI."""

import hashlib
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from cil.checkpoints import digest
from cil.families import Family
from cil.trainable import freeze, merged
from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import Cache
from pipelines.checkpoints import Stored
from pipelines.config import PUBLISHED, Config, RowConfig, TrainingRow
from pipelines.errors import UserError
from pipelines.models import family_code, refuse_other_family, refusing_weights, shape_of
from pipelines.shards import AVERAGE, WEIGHTS

KIND = "weights"
CODE = (
    *("pipelines.step", "pipelines.rows", "pipelines.shards", "pipelines.zero", "pipelines.reader"),
    *("cil.objectives", "cil.conditioning", "cil.processes", "cil.draws", "cil.moments", "cil.trainable"),
)
KINDS = {True: "ema", False: "raw"}  # subfolders, by whether weights are averaged


def uri_of(config: Config, row: str) -> str:
    """A row of the study, or a URI."""
    return row if "/" in row else storage.join(config.out, "weights", row)


def plan_weights(
    config: Config, family: Family, name: str, row: TrainingRow, cached: Cache, parents: dict[str, Artifact]
) -> Artifact:
    """The artifact of a row, whose identity holds that of the weights it starts from."""
    start = row.settings.weights
    if start in parents:
        parent = parents[start].fingerprint
    elif start is None and family.options.weights is None:
        parent = "random"
    else:
        parent = fingerprint_of(config, family, start or PUBLISHED)
    identity = {
        "family": shape_of(family) | {"preset": family.preset},
        "token_noise": family.options.token_noise,
        "shift": family.options.shift,
        "row": row.shaping(family.timenoise),
        "watermark": config.cache.watermark if row.settings.unmarked else [],
        "parent": parent,
        "cache": cached.fingerprint,
        "code": artifact.code(*CODE, *family_code(family)),
    }
    return Artifact(uri_of(config, name), KIND, identity)


def read_weights(config: Config, row: str) -> Manifest:
    manifest = artifact.read_manifest(uri_of(config, row), KIND)
    refuse_other_family(KIND, manifest.uri, manifest.identity["family"], config)
    return manifest


def refuse_other_shift(config: Config, row: str) -> None:
    """Where videos are to be sampled by another process than the weights were trained with."""
    if _made_here(row) and (trained := read_weights(config, row).identity["shift"]) != config.family.shift:
        raise UserError(f"the weights at {uri_of(config, row)} were trained with family.shift={trained}: set it")


def is_ours(uri: str) -> bool:
    """Also where it is unfinished."""
    return any(storage.exists(storage.join(uri, name)) for name in ("manifest.json", "plan.json"))


def fingerprint_of(config: Config, family: Family, row: str, averaged: bool = True) -> str:
    """Of the weights of a row, at a URI, or of the family's own: whatever the file, its values count."""
    if _made_here(row):
        return known_as(read_weights(config, row), averaged)
    return _digest(family, _files(config, family, row, averaged), averaged)


def known_as(trained: Manifest, averaged: bool) -> str:
    """Of weights that are ours."""
    return f"{trained.fingerprint}-{KINDS[averaged]}"


@cache
def _digest(family: Family, path: Path, averaged: bool) -> str:
    with refusing_weights():
        return digest(family.restore(path, averaged))


def network_of(config: Config, family: Family, row: str | None, seed: int = 0, averaged: bool = True) -> nn.Module:
    """The network with a row's weights; without a row the family's own, published or random."""
    with refusing_weights():
        if row is None:
            return family.network(seed)
        return family.network(seed, family.restore(_files(config, family, row, averaged), averaged))


class LastNetwork:
    """A worker's: the last one is kept, as parts of one row come one after another."""

    def __init__(self, config: Config, family: Family, device: str) -> None:
        self.config, self.family, self.device = config, family, device
        self._kept: tuple[tuple[str, bool] | None, nn.Module] = (None, nn.Identity())

    def of(self, row: str, averaged: bool) -> nn.Module:
        if self._kept[0] != (row, averaged):
            self._kept = (None, nn.Identity())  # the old one goes before the new one comes
            net = network_of(self.config, self.family, row, averaged=averaged)
            self._kept = ((row, averaged), net.to(self.device).eval())
        return self._kept[1]


def trained_network(
    config: Config, family: Family, row: RowConfig, seed: int, stored: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The network that a row trains, with what it is not to train frozen, and in it what is stored of its training."""
    net = freeze(network_of(config, family, row.weights, seed), family, row.train, row.rank, seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if stored is not None and parameter.requires_grad:
                parameter.copy_(stored[name])
    return net


def write_stored(
    config: Config, family: Family, row: RowConfig, seed: int, stored: Stored, made: Artifact
) -> dict[str, str]:
    """In the family's published layout: the averages in `ema`, the weights of the last step in `raw`.

    What is trained comes from the checkpoint, what is frozen from the weights that the row began with. Answers the
    SHA-256 of each file; the manifest is still to be written.
    """
    files = {}
    for kind, kept in ((KINDS[True], AVERAGE), (KINDS[False], WEIGHTS)):
        weights = merged(trained_network(config, family, row, seed, stored.of(kept)))
        with tempfile.TemporaryDirectory() as folder:
            for name in family.export(weights, Path(folder)):
                with Path(folder, name).open("rb") as file:
                    files[f"{kind}/{name}"] = hashlib.file_digest(file, "sha256").hexdigest()
                storage.put(Path(folder, name), made.path(kind, name))
    return files


def counts_of(stored: Stored) -> dict[str, int]:
    """What a manifest of weights counts."""
    return {name: stored.told[name] for name in ("samples", "steps", "clips", "skipped_batches")}


def _made_here(row: str) -> bool:
    return row != PUBLISHED and ("/" not in row or is_ours(row))


def _files(config: Config, family: Family, row: str, averaged: bool) -> Path:
    if row == PUBLISHED:
        return Path(str(family.options.weights))
    if _made_here(row):
        return storage.kept_copy(storage.join(read_weights(config, row).uri, KINDS[averaged]))
    if not storage.exists(row):
        raise UserError(f"weights={row}: there is nothing; expected weights of jobs.finetune, or published ones")
    return storage.kept_copy(row)
