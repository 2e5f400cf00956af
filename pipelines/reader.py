"""Clips of a finished cache by number, and the endless order in which training sees them."""

import json
import warnings
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.artifact import Manifest
from pipelines.cache import open_part


class ClipReader:
    """The clips of one split, numbered 0..len-1 in the order of their ids. Latents stay in the files till asked for."""

    def __init__(self, cache: Manifest, split: str, min_motion: float = 0.0) -> None:
        self._tensors: list[dict[str, Column]] = []  # of each part
        found: list[tuple[str, str, float, int, int]] = []
        for number, part in enumerate(cache.content["parts"]):
            reader = open_part(cache, part["name"])
            if reader.num_record_batches == 0:
                self._tensors.append({})
                continue
            table = reader.read_all()
            layout = _layout(reader.schema)
            self._tensors.append({name: Column(table[name], *layout[name]) for name in layout})
            columns = (table[name].to_pylist() for name in ("clip_id", "caption", "fps", "split", "motion"))
            for row, (clip_id, caption, fps, where, motion) in enumerate(zip(*columns, strict=True)):
                if where == split and motion >= min_motion:
                    found.append((clip_id, caption, fps, number, row))
        found.sort()
        self.ids = [clip_id for clip_id, *_ in found]
        self.captions = [caption for _, caption, *_ in found]
        self.fps = [fps for _, _, fps, *_ in found]
        self._places = [(number, row) for *_, number, row in found]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        places = [self._places[n] for n in numbers]
        names = self._tensors[places[0][0]]
        return {name: torch.stack([self._tensors[number][name][row] for number, row in places]) for name in names}


class SampleOrder:
    """Position in the endless stream -> number of a clip: a new permutation each epoch, a function of (seed, epoch)."""

    def __init__(self, clips: int, seed: int) -> None:
        self.clips, self.seed = clips, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.clips)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.clips)
            self._epoch = epoch
        return int(self._permutation[place])


def lanes(start: int, batch: int, rank: int, world: int) -> list[int]:
    """The positions of rank r in the batch that starts at `start`: r, r + W, ..."""
    return list(range(start + rank, start + batch, world))


def _layout(schema: pa.Schema) -> dict[str, tuple[list[int], str]]:
    described = json.loads(schema.metadata[b"tensors"])
    return {name: (tensor["shape"], tensor["dtype"]) for name, tensor in described.items()}


class Column:
    """One tensor of each row of a part: a view of the file's own memory, which is copied by stacking."""

    def __init__(self, column: pa.ChunkedArray, shape: list[int], dtype: str) -> None:
        array = column.combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
        self._places: np.ndarray | None = None  # in the dictionary, where rows share their tensors
        if pa.types.is_dictionary(array.type):
            self._places, array = array.indices.to_numpy(), array.dictionary
        _, offsets, data = array.buffers()
        begin = np.frombuffer(offsets, np.int64, 1, 8 * array.offset)[0]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        flat = np.frombuffer(data, dtype, len(array) * size // np.dtype(dtype).itemsize, int(begin))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self._tensors = torch.from_numpy(flat.reshape(len(array), *shape))

    def __getitem__(self, row: int) -> Tensor:
        return self._tensors[row if self._places is None else int(self._places[row])]
