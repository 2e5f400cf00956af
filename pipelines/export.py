"""A checkpoint, from whatever number of workers and ZeRO stage, as weights in the family's published layout."""

from cil.families import Family
from cil.trainable import merged
from pipelines import checkpoints, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import read_cache
from pipelines.checkpoints import Stored
from pipelines.config import Config, RowConfig
from pipelines.errors import UserError
from pipelines.models import family_of
from pipelines.shards import AVERAGE, WEIGHTS
from pipelines.weights import KIND, plan_weights, trained_network, write_weights


def export(config: Config) -> Manifest:
    """The checkpoint that `export` names, under `exports`, where `generate.rows.NAME.weights` may point at."""
    rows, name = config.training_rows(), config.export.row
    if name not in rows:
        raise UserError(f"export.row={name}: one of {', '.join(rows)}")
    family, cache = family_of(config), read_cache(config)
    made: dict[str, Artifact] = {}
    for each, row in rows.items():
        made[each] = plan_weights(config, family, each, row, cache, made)
    stored = Stored(_chosen(training_of(config, name, made[name]), config.export.checkpoint))
    identity = {**made[name].identity, "checkpoint": stored.told["samples"]}
    weights = Artifact(storage.join(config.out, "exports", name, f"{stored.told['samples']:09d}"), KIND, identity)
    if weights.finished:
        print(f"{KIND}: {weights.uri} is finished; nothing to do")
        return weights.manifest()
    weights.begin(config.model_dump_json(indent=1))
    return write_stored(config, family, rows[name].settings, rows[name].seed, stored, weights)


def write_stored(
    config: Config, family: Family, row: RowConfig, seed: int, stored: Stored, weights: Artifact
) -> Manifest:
    """What is trained comes from the checkpoint, what is frozen from the weights that the row began with."""
    averaged, raw = (merged(trained_network(config, family, row, seed, stored.of(kind))) for kind in (AVERAGE, WEIGHTS))
    counts = {name: stored.told[name] for name in ("samples", "steps", "clips", "skipped_batches")}
    return write_weights(weights, family, averaged, raw, counts)


def training_of(config: Config, name: str, made: Artifact) -> str:
    """Where a row's checkpoints are."""
    return storage.join(config.out, "training", f"{name}-{made.fingerprint[:8]}")


def _chosen(folder: str, wanted: str | int) -> str:
    there = checkpoints.found(folder)
    if wanted == "last" and there:
        return there[-1]
    if wanted == "best" and (best := checkpoints.best(there)):
        return best
    named = [each for each in there if isinstance(wanted, int) and int(each.rsplit("/", 1)[1]) == wanted]
    if not named:
        numbers = ", ".join(str(int(each.rsplit("/", 1)[1])) for each in there) or "none"
        raise UserError(f"export.checkpoint={wanted}: {folder} has {numbers}; `best` needs finetune.validate_every")
    return named[0]
