"""The latent cache: clips decoded, encoded by the family, and kept with their moments in Arrow IPC files.

A part is one file: its rows are the accepted clips, and its schema's metadata hold the moments of its training clips
and what was rejected, so that all three are whole or absent together.
"""

import hashlib
import json
import posixpath
from bisect import bisect_left
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cil.families import Family
from cil.families.base import Clip
from cil.metrics.motion import SMALLEST, motion_score
from cil.moments import Moments
from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.catalog import PROBLEMS, Video, read_catalog
from pipelines.config import Config
from pipelines.errors import Unfinished, UserError
from pipelines.models import encoder_of, family_code, family_of, refuse_other_family, shape_of
from pipelines.parts import Part, make_parts
from pipelines.video import DECODERS, BadVideo, fit

KIND = "latent cache"
CODE = (
    "pipelines.cache",
    "pipelines.catalog",
    "pipelines.tars",
    "pipelines.video",
    "cil.metrics.motion",
    "cil.moments",
)


def build_cache(config: Config) -> Manifest:
    """Finished already: does nothing. Begun: makes the parts that are missing."""
    catalog = read_catalog(config.catalog, storage.join(config.out, "shapes"))
    family = family_of(config)
    if family.frames < 2 or min(family.height, family.width) < SMALLEST:
        size = f"{family.frames} x {family.height} x {family.width}"
        raise UserError(f"family: clips of {size}; a motion score needs 2 frames of {SMALLEST} x {SMALLEST} or more")
    identity = {
        "catalog": catalog.digest,
        "seed": config.seed,
        "family": shape_of(family) | {"latents": config.family.latents, "clip_features": config.family.clip_features},
        "encoder": encoder_of(family),
        "precision": config.family.precision,
        "cache": config.cache.model_dump(
            include={"stride", "views_per_video", "validation", "test", "videos_per_part"}
        ),
        "code": artifact.code(*CODE, *family_code(family)),
    }
    cache = Artifact(storage.join(config.out, "cache"), KIND, identity)
    if cache.finished:
        print(f"{KIND}: {cache.uri} is finished; nothing to do")
        return cache.manifest()

    cache.begin(config.model_dump_json(indent=1))
    views = config.cache.views_per_video
    starts = range(0, len(catalog), config.cache.videos_per_part)
    lots = enumerate(catalog.videos(start, start + config.cache.videos_per_part) for start in starts)
    parts = [
        Part(cache.path("parts", f"part-{i:06d}.arrow"), [asdict(v) for v in lot], len(lot) * views) for i, lot in lots
    ]
    transient = make_parts(KIND, "clips", parts, PartMaker, {"config": config.model_dump()})
    if transient:
        raise Unfinished(
            f"{len(transient)} parts wait for videos that could not be read for passing reasons ({transient[0]}). "
            "Run the same command again, or accept them with cache.accept_transient=true"
        )
    return _finish(cache, parts)


def _finish(cache: Artifact, made: list[Part]) -> Manifest:
    """The rejects table, the counts, and last the manifest."""
    parts, rejects = [], []
    for part in made:
        data = storage.read(part.uri)
        reader = _open(part.uri, pa.py_buffer(data))
        digest = hashlib.sha256(data).hexdigest()
        parts.append({"name": posixpath.basename(part.uri), "sha256": digest, "clips": reader.read_all().num_rows})
        rejects += json.loads(reader.schema.metadata[b"rejects"])
    storage.write_rows(cache.path("rejects.jsonl"), rejects)
    planned = sum(part.size for part in made)
    clips, rejected = sum(p["clips"] for p in parts), sum(r["clips"] for r in rejects)
    if clips + rejected != planned:
        raise AssertionError(f"{cache.uri}: {planned} clips planned, but {clips} made and {rejected} rejected")
    counts = {"planned": planned, "clips": clips, "rejected": rejected, "rejected_videos": len(rejects)}
    manifest = cache.finish(counts, parts=parts)
    shown = ", ".join(f"{n} {reason}" for reason, n in Counter(r["reason"] for r in rejects).most_common())
    print(
        f"{KIND}: {clips} clips in {len(parts)} parts; {len(rejects)} videos rejected{f' ({shown})' if shown else ''}"
    )
    return manifest


class PartMaker:
    """Decodes and encodes the videos of one part. Made once a worker.

    What is rejected has a reason. `io` is transient, tried again on the next run. The others would stay as they are:
    missing, the catalog's PROBLEMS, not_a_video, no_video_stream, damaged, too_short, not_finite.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = Config.model_validate(config)
        self.family = family_of(self.config)

    def __call__(self, plan: list[dict[str, Any]]) -> tuple[bytes | None, str]:
        self.captions: dict[str, dict[str, torch.Tensor]] = {}  # of this part
        rows: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        for video in (Video(**row) for row in plan):
            stage = "read"
            try:
                data = self._read(video)
                stage = "decode"
                clips = self._decode(video, data)
                stage = "encode"
                rows += [self._encode(video, view, *clip) for view, clip in enumerate(clips)]
            except BadVideo as error:
                rejects.append(self._reject(video, stage, error.reason, str(error)))
            except OSError as error:
                rejects.append(self._reject(video, stage, "io", f"{type(error).__name__}: {error}"))
        transient = [r for r in rejects if r["reason"] == "io"]
        if transient and not self.config.cache.accept_transient:
            return None, f"{transient[0]['videoid']}: {transient[0]['message']}"
        return self._part(rows, rejects), ""

    def _read(self, video: Video) -> bytes:
        if video.problem:
            raise BadVideo(video.problem, f"{PROBLEMS[video.problem]}: {video.videoid!r} {' '.join(video.sources)}")
        for uri in video.sources:
            if storage.exists(uri):
                whole = video.size < 0
                return storage.read(uri) if whole else storage.read_range(uri, video.offset, video.size)
        raise BadVideo("missing", f"there is no {' or '.join(video.sources)}")

    def _decode(self, video: Video, data: bytes) -> list[tuple[torch.Tensor, list[int], float]]:
        """Frames, source indices and source fps of every view; the video's frames are decoded once for all views."""
        family, policy = self.family, self.config.cache
        decoder = DECODERS[policy.decoder](data)
        span = (family.frames - 1) * policy.stride + 1
        if decoder.count < span:
            raise BadVideo("too_short", f"{decoder.count} frames; a clip spans {span}")
        indices = []
        for view in range(policy.views_per_video):
            start = int(_unit(self.config.seed, video.videoid, f"view-{view}") * (decoder.count - span + 1))
            indices.append(list(range(start, start + span, policy.stride)))
        wanted = sorted({i for clip in indices for i in clip})
        frames = fit(decoder.frames(wanted), family.height, family.width)
        return [(frames[np.searchsorted(wanted, clip)], clip, decoder.fps) for clip in indices]

    def _encode(self, video: Video, view: int, frames: torch.Tensor, indices: list[int], fps: float) -> dict[str, Any]:
        stride, clip_id = self.config.cache.stride, f"{video.videoid}:{view}"
        seed = int(_unit(self.config.seed, clip_id, "encoding") * 2**53)
        known = Clip(video.caption, fps / stride, stride, seed)
        # One clip and one caption a call: the call's shape is part of the plan.
        tensors = self.family.encode_frames(frames[None], [known])
        if video.caption not in self.captions:
            self.captions[video.caption] = self.family.encode_captions([video.caption])
        if not all(torch.isfinite(t).all() for t in [*tensors.values(), *self.captions[video.caption].values()]):
            raise BadVideo("not_finite", f"the encoder gave NaN or inf for view {view}")
        return {
            "clip_id": clip_id,
            "videoid": video.videoid,
            "view": view,
            "caption": video.caption,
            "split": split_of(self.config, video.videoid),
            "frame_indices": indices,
            "fps": fps,
            "stride": self.config.cache.stride,
            "motion": motion_score(frames),
            "tensors": {name: tensor[0] for name, tensor in tensors.items()},
        }

    def _reject(self, video: Video, stage: str, reason: str, message: str) -> dict[str, Any]:
        clips = self.config.cache.views_per_video
        return {"videoid": video.videoid, "stage": stage, "reason": reason, "clips": clips, "message": message[:500]}

    def _part(self, rows: list[dict[str, Any]], rejects: list[dict[str, Any]]) -> bytes:
        moments = Moments.zeros(self.family.latent_shape)
        training = [row for row in rows if row["split"] == "train"]
        if training:
            of = {name: torch.stack([row["tensors"][name] for row in training]) for name in training[0]["tensors"]}
            moments = Moments.of(of["latents"], [row["clip_id"] for row in training], of.get("latents_std"))
        columns: dict[str, pa.Array] = {
            name: pa.array([r[name] for r in rows], kind) for name, kind in CLIP_SCHEMA.items()
        }
        layout = {}
        for name in rows[0]["tensors"] if rows else ():
            tensors = [row["tensors"][name] for row in rows]
            columns[name], layout[name] = _binary(tensors), _layout(name, tensors[0])
        captions = sorted({row["caption"] for row in rows})
        for name in self.captions[captions[0]] if rows else ():
            # Each caption once, and in a row its place.
            tensors = [self.captions[caption][name][0] for caption in captions]
            places = pa.array([bisect_left(captions, row["caption"]) for row in rows], pa.int32())
            columns[name] = pa.DictionaryArray.from_arrays(places, _binary(tensors))
            layout[name] = _layout(name, tensors[0])
        metadata = {"tensors": json.dumps(layout), "rejects": json.dumps(rejects), "moments": moments.to_bytes()}
        return _ipc(pa.table(columns).replace_schema_metadata(metadata))


def _binary(tensors: list[torch.Tensor]) -> pa.Array:
    return pa.array([t.contiguous().numpy().tobytes() for t in tensors], pa.large_binary())


def _layout(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    assert name not in CLIP_SCHEMA, f"{name} is a column of every cache: the family must call its tensor otherwise"
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


CLIP_SCHEMA = {
    "clip_id": pa.string(),
    "videoid": pa.string(),
    "view": pa.int32(),
    "caption": pa.string(),
    "split": pa.string(),
    "frame_indices": pa.list_(pa.int32()),
    "fps": pa.float32(),
    "stride": pa.int32(),
    "motion": pa.float32(),
}


def split_of(config: Config, videoid: str) -> str:
    """A pure function of (seed, videoid): all views of a video are in one split."""
    u = _unit(config.seed, videoid, "split")
    if u < config.cache.test:
        return "test"
    return "validation" if u < config.cache.test + config.cache.validation else "train"


def snapshot(cache: Manifest) -> str:
    """Of the bytes that the parts have: what was accepted with transient rejects is another snapshot."""
    return artifact.fingerprint([cache.fingerprint, [part["sha256"] for part in cache.content["parts"]]])


def read_moments(cache: Manifest, groups: int = 1) -> list[Moments]:
    """Of all training clips, merged from the parts into groups that have no video in common."""
    merged: list[Moments] = []
    for i, part in enumerate(cache.content["parts"]):
        with open_part(cache, part["name"]) as reader:
            moments = Moments.from_bytes(reader.schema.metadata[b"moments"])
        if i < groups:
            merged.append(moments)
        else:
            merged[i % groups] = merged[i % groups].merge(moments)
    return merged


def read_cache(config: Config) -> Manifest:
    """The finished cache of this configuration's family and size."""
    cache = artifact.read_manifest(storage.join(config.out, "cache"), KIND)
    refuse_other_family(cache, config)
    return cache


def refuse_other_encoder(cache: Manifest, family: Family) -> None:
    """Where latents are to be trained on or decoded, by other frozen weights than those that made them."""
    if (mine := encoder_of(family)) != cache.identity["encoder"]:
        raise UserError(
            f"the cache at {cache.uri} was encoded by {cache.identity['encoder']}, and family.weights holds {mine}: "
            "name the weights that it was made with, or another `out`"
        )


def open_part(cache: Manifest, name: str) -> pa.ipc.RecordBatchFileReader:
    """Mapped into memory where it is a local file."""
    uri = storage.join(cache.uri, "parts", name)
    source = pa.memory_map(uri) if storage.is_local(uri) else pa.py_buffer(storage.read(uri))
    return _open(uri, source)


def _open(uri: str, source: pa.NativeFile | pa.Buffer) -> pa.ipc.RecordBatchFileReader:
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid as error:
        mend = "remove it and the cache's manifest.json, and run jobs.build_cache again"
        raise UserError(f"{uri} is damaged ({error}): {mend}") from None


def _unit(seed: int, videoid: str, what: str) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.sha256(f"{seed}/{videoid}/{what}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()
