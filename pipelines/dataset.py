"""The clips of a cache as a Ray Dataset, for analysis: of each what is known of it, and its tensors as arrays.

    dataset(read_cache(load("study.yaml")), "train").select_columns(["motion", "latents"]).take_batch(64)

docs/cache.md has more of it.
"""

from typing import Any

import numpy as np

from pipelines import tables
from pipelines.cache import Cache
from pipelines.config import Where
from pipelines.reader import ClipReader

BATCH = 64  # clips read at once


def dataset(cache: Cache, split: str | None = None, where: Where | None = None) -> Any:
    """Of one split or all, with scores in the ranges of `where`. Clips are read when they are asked for."""
    import ray

    clips = ray.data.range(len(ClipReader(cache, split, where)))
    return clips.map_batches(_Clips, fn_constructor_args=(cache, split, where), batch_size=BATCH)


class _Clips:
    def __init__(self, cache: Cache, split: str | None, where: Where | None) -> None:
        self._reader = ClipReader(cache, split, where)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        numbers = batch["id"].tolist()
        known = tables.taken(self._reader.index.drop_columns(["part", "row", "place"]), self._reader.rows[numbers])
        tensors = {name: tensor.numpy() for name, tensor in self._reader.batch(numbers).items()}
        return {name: known[name].to_numpy() for name in known.column_names} | tensors
