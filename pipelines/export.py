"""A checkpoint, from whatever number of workers and ZeRO stage, as weights in the family's published layout."""

from pipelines import checkpoints, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.cache import read_cache
from pipelines.checkpoints import Stored, training_of
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.models import family_of
from pipelines.weights import KIND, counts_of, plan_weights, write_stored


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
    files = write_stored(config, family, rows[name].settings, rows[name].seed, stored, weights)
    return weights.finish(counts_of(stored), files=files)


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
