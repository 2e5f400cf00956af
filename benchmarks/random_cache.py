"""A cache of random numbers, made by the functions that make parts: 16 x 320 x 512, with the captions' tensors."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipelines import storage
from pipelines.artifact import Artifact
from pipelines.cache import INDEX, KIND, PLAN, SNAPSHOT, Cache, _finish, part_names, plan_parts
from pipelines.clips import CLIP, PartMaker, to_ipc

SHAPE, TEXT = (16, 4, 40, 64), (77, 1024)
VIEWS, VIDEOS_PER_PART = 2, 100


def written(folder: str, videos: int) -> Cache:
    random = np.random.default_rng(0)
    plan = plan_parts(random.integers(2**63, size=videos, dtype=np.uint64), None, VIDEOS_PER_PART)
    artifact = Artifact(storage.join(folder, "cache"), KIND, {})
    snapshot = Artifact(artifact.path("snapshots", "small"), SNAPSHOT, {})
    storage.write(snapshot.path(PLAN), to_ipc(plan))
    maker, video = maker_of(artifact.path("parts")), 0
    for number, name in enumerate(part_names(plan)):
        here = range(video, video + int((plan["part"].to_numpy() == number).sum()))
        maker.captions = {f"caption {v}": {"text": noise(random, (1, *TEXT))} for v in here}
        index, _ = maker._write(name, [clip(random, v, view) for v in here for view in range(VIEWS)], [])
        storage.write(artifact.path("parts", f"{name}.index"), index)
        video = here.stop
    catalog: Any = SimpleNamespace(with_sources=lambda rejects, rows: rejects)  # of none
    _finish(artifact, snapshot, catalog, plan, VIEWS)
    return Cache(artifact.uri, snapshot.manifest())


def maker_of(folder: str) -> Any:
    maker: Any = PartMaker.__new__(PartMaker)  # without its decoders and encoders
    maker.folder, maker.family = folder, SimpleNamespace(latent_shape=SHAPE)
    return maker


def clip(random: np.random.Generator, video: int, view: int) -> dict[str, Any]:
    known: dict[str, Any] = dict.fromkeys(CLIP.names, 0)
    known |= {"clip_id": f"{video}:{view}", "videoid": str(video), "view": view, "caption": f"caption {video}"}
    known |= {"split": "train", "frame_indices": list(range(16)), "flip": False, "motion": random.uniform()}
    return known | {"extra": "", "hash": int(random.integers(2**63)), "tensors": {"latents": noise(random, SHAPE)}}


def noise(random: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).half()


def enlarge(cache: Cache, clips: int) -> None:
    """A snapshot `large`: its index has so many rows, which cite the clips there are, with ids of their own."""
    small = cache.index()
    numbers = pa.array(np.arange(clips))
    names = pc.cast(numbers, pa.string())
    told = {"clip_id": ":0", "videoid": "", "caption": " is what somebody has said of a video of theirs"}
    columns = {name: pc.binary_join_element_wise(names, text, "") for name, text in told.items()}
    columns["motion"] = pa.array(np.random.default_rng(1).random(clips, np.float32))
    cited = small.drop_columns(list(columns)).take(np.arange(clips) % len(small))
    columns |= dict(zip(cited.column_names, cited.columns, strict=True))
    index = pa.table({name: columns[name] for name in small.column_names}).combine_chunks()
    large = Path(cache.uri, "snapshots", "large")
    large.mkdir()
    with pa.OSFile(str(large / INDEX), "wb") as file, pa.ipc.new_file(file, index.schema) as writer:
        writer.write_table(index)
    shutil.copy(storage.join(cache.manifest.uri, "manifest.json"), large)
