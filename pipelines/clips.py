"""One part of a cache, made by a worker: its videos decoded, encoded by the family and scored.

A part is three files. `NAME.arrow` holds the clips with their tensors, `NAME.moments` those of its training clips, and
`NAME.index`, written last, everything but the tensors: a part that has an index is whole.
"""

import errno
import hashlib
import json
import posixpath
import time
from bisect import bisect_left
from dataclasses import asdict
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import torch

from cil.families.base import Clip
from cil.metrics.clips import clip_scores
from cil.metrics.duplicates import picture_hash
from cil.moments import Moments
from pipelines import storage
from pipelines.catalog import PROBLEMS, Video
from pipelines.config import Config
from pipelines.decoding import DecodePool, TooLarge
from pipelines.models import aesthetics_of, device_of, family_of
from pipelines.parts import Made
from pipelines.secrets import redacted
from pipelines.video import DECODERS, BadVideo, Reason
from pipelines.views import View, split_of, unit, views_of

MOST = 2**32  # bytes of a video's file, and of its frames that are wanted: 16 of 8K are 1.6 GB

CLIP = pa.schema(
    {
        "clip_id": pa.string(),
        "videoid": pa.string(),
        "view": pa.int32(),
        "caption": pa.string(),
        "extra": pa.string(),  # JSON, or nothing; not in an index, which every rank of a training maps
        "split": pa.string(),
        "frame_indices": pa.list_(pa.int32()),
        "flip": pa.bool_(),
        "frame": pa.int32(),
        "fps": pa.float32(),
        "stride": pa.int32(),
        "motion": pa.float32(),
        "cut": pa.float32(),
        "subject": pa.float32(),
        "aesthetic": pa.float32(),  # null in a cache that is made without a head
        "hash": pa.uint64(),
    }
)


class Videos(Protocol):
    """A Catalog, or what stands for one in a worker."""

    def videos(self, start: int, stop: int) -> list[Video]: ...


class PartMaker:
    """Made once a worker, then called with the videos of a part; answers the bytes of its index.

    What is rejected has a reason. `io` is transient, tried again on the next run. The others (video.REASONS) would stay
    as they are.
    """

    def __init__(self, config: dict[str, Any], folder: str, catalog: Videos) -> None:
        self.config, self.folder, self.catalog = Config.model_validate(config), folder, catalog
        policy, self.device = self.config.cache, device_of(self.config)
        self.family = family_of(self.config).to(self.device)
        aesthetics = aesthetics_of(self.config)
        self.aesthetics = aesthetics and aesthetics.to(self.device)
        self.decoders = DecodePool(DECODERS[policy.decoder], policy.decode_seconds, policy.decoders, MOST)
        self.captions: dict[str, dict[str, torch.Tensor]] = {}  # of the part at hand

    def __call__(self, plan: dict[str, Any]) -> Made:
        rows: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        self.captions = {}
        begin, decoding, encoding = time.monotonic(), self.decoders.busy, 0.0
        videos = self.catalog.videos(plan["start"], plan["stop"])
        for video, decoded in zip(videos, self.decoders.ahead(self.decode, videos), strict=True):
            try:
                clips = decoded.result()
                before = time.monotonic()
                rows += [self.encode(video, number, *clip) for number, clip in enumerate(clips)]
                encoding += time.monotonic() - before
            except BadVideo as error:
                rejects.append(self._reject(video, error.reason, str(error)))
            except OSError as error:
                problem = redacted(" ".join(f"{type(error).__name__}: {error}".split()))
                if not self.config.cache.accept_transient:  # there will be no part
                    return Made(None, f"{video.videoid}: {problem[:500]}")
                rejects.append(self._reject(video, "io", problem))
        index, size = self._write(plan["name"], rows, rejects)
        told = {"videos": len(videos), "clips": len(rows), "rejected_videos": len(rejects), "bytes": size}
        shares = (self.decoders.busy - decoding) / self.config.cache.decoders  # of one process
        busy = {"decoding": shares, "encoding": encoding, "seconds": time.monotonic() - begin}
        return Made(index, told=told | busy)

    def _read(self, video: Video) -> bytes:
        if video.problem:
            raise BadVideo(cast(Reason, video.problem), PROBLEMS[video.problem])
        for source in video.sources:
            try:  # to ask first would be a second request
                if video.size < 0:
                    return storage.read(source, MOST)
                if video.size > MOST:
                    raise BadVideo("too_large", f"the tar says {video.size} bytes, and {MOST} are read")
                return storage.read_range(source, video.offset, video.size)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except storage.Unfit as error:
                raise BadVideo(
                    "too_large" if error.errno == errno.EFBIG else "not_a_video", str(error.strerror)
                ) from None
            except IsADirectoryError:
                raise BadVideo("not_a_video", "a folder has its name") from None
        # Without the folder: a cache has the same bytes wherever its videos lie.
        files = sorted({posixpath.basename(source) for source in video.sources})
        raise BadVideo("missing", f"there is no {' or '.join(files)}")

    def decode(self, video: Video) -> list[tuple[torch.Tensor, View, dict[str, float]]]:
        """Frames and scores of every view; the video's frames are decoded once for all views."""
        data = self._read(video)
        family = self.family
        views: list[View] = []

        def wanted(count: int, fps: float) -> list[int]:
            views[:] = views_of(self.config, video.videoid, count, fps, family.frames)  # the last call counts
            return sorted({0, *(i for view in views for i in view.indices)})

        try:
            decoded = self.decoders(data, wanted, family.height, family.width, self.config.cache.crop)
        except TooLarge as error:
            raise BadVideo("too_large", str(error)) from None
        clips = [decoded.frames[np.searchsorted(decoded.indices, view.indices)] for view in views]
        clips = [clip.flip(2) if view.flip else clip for clip, view in zip(clips, views, strict=True)]
        if self.device == "cuda":
            clips = [clip.pin_memory() for clip in clips]  # here, in a thread, while others are encoded
        # Of the first frame, the one that a copy of the video under another id has in common with it.
        known = {"hash": picture_hash(decoded.frames[0]), "fps": decoded.fps}
        return [(clip, view, asdict(clip_scores(clip)) | known) for clip, view in zip(clips, views, strict=True)]

    def encode(
        self, video: Video, number: int, frames: torch.Tensor, view: View, scores: dict[str, float]
    ) -> dict[str, Any]:
        clip_id = f"{video.videoid}:{number}"
        seed = int(unit(self.config.seed, clip_id, "encoding") * 2**53)
        known = Clip(video.caption, scores["fps"] / view.stride, view.stride, seed, view.frame)
        # One clip and one caption a call: the call's shape is part of the plan.
        tensors = self.family.encode_frames(frames[None], [known])
        if video.caption not in self.captions:
            self.captions[video.caption] = self.family.encode_captions([video.caption])
        if not all(torch.isfinite(t).all() for t in [*tensors.values(), *self.captions[video.caption].values()]):
            raise BadVideo("not_finite", f"the encoder gave NaN or inf for view {number}")
        return {
            "clip_id": clip_id,
            "videoid": video.videoid,
            "view": number,
            "caption": video.caption,
            "extra": video.extra,
            "split": split_of(self.config, video.videoid),
            "frame_indices": view.indices,
            "flip": view.flip,
            "frame": view.frame,
            "stride": view.stride,
            "aesthetic": self.aesthetics and self.aesthetics(frames),
            **scores,
            "tensors": {name: tensor[0] for name, tensor in tensors.items()},
        }

    def _reject(self, video: Video, reason: str, message: str) -> dict[str, Any]:
        clips = self.config.cache.views_per_video
        return {"videoid": video.videoid, "reason": reason, "clips": clips, "message": message[:500]}

    def _write(self, name: str, rows: list[dict[str, Any]], rejects: list[dict[str, Any]]) -> tuple[bytes, int]:
        """The index, and the bytes of the clips."""
        known = pa.Table.from_pylist([{key: row[key] for key in CLIP.names} for row in rows], CLIP)
        captions = sorted(self.captions)
        places = [bisect_left(captions, row["caption"]) for row in rows]
        columns, layout, stacked = {}, {}, {}
        for tensor in list(rows[0]["tensors"]) if rows else ():
            values = torch.stack([row["tensors"].pop(tensor) for row in rows])  # a clip's tensors are let go of
            stacked[tensor], columns[tensor], layout[tensor] = values, _binary(values), _layout(tensor, values, "row")
        for tensor in self.captions[captions[0]] if rows else ():
            # Each caption's once, and in a row its place.
            values = torch.stack([self.captions[caption][tensor][0] for caption in captions])
            columns[tensor] = pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), _binary(values))
            layout[tensor] = _layout(tensor, values, "place")
        moments = self._moments(rows, stacked).to_bytes()
        table = pa.table({**dict(zip(CLIP.names, known.columns, strict=True)), **columns})
        data = to_ipc(table.replace_schema_metadata({"tensors": json.dumps(layout)}))
        for tensor, begin in _offsets(data, layout).items():
            layout[tensor]["offset"] = begin

        storage.write(storage.join(self.folder, f"{name}.arrow"), data)
        storage.write(storage.join(self.folder, f"{name}.moments"), moments)
        said = {
            "tensors": json.dumps(layout),
            "rejects": json.dumps(rejects),
            "sha256": hashlib.sha256(data).hexdigest(),
            "moments_sha256": hashlib.sha256(moments).hexdigest(),
            "bytes": str(len(data)),
        }
        index = known.drop_columns(["frame_indices", "extra"]).append_column("place", pa.array(places, pa.int32()))
        return bytes(to_ipc(index.replace_schema_metadata(said))), len(data)

    def _moments(self, rows: list[dict[str, Any]], stacked: dict[str, torch.Tensor]) -> Moments:
        train = [i for i, row in enumerate(rows) if row["split"] == "train"]
        if not train:
            return Moments.zeros(self.family.latent_shape)
        of = {name: stacked[name][train] for name in ("latents", "latents_std") if name in stacked}
        return Moments.of(of["latents"], [rows[i]["clip_id"] for i in train], of.get("latents_std"))


def _binary(values: torch.Tensor) -> pa.Array:
    """A value for each of the first dimension, in the tensor's own memory."""
    data = pa.py_buffer(values.contiguous().numpy())
    ends = np.arange(len(values) + 1, dtype=np.int64) * (data.size // len(values))
    return pa.Array.from_buffers(pa.large_binary(), len(values), [None, pa.py_buffer(ends), data])


def _layout(name: str, values: torch.Tensor, by: str) -> dict[str, Any]:
    assert name not in CLIP.names, f"{name} is a column of every cache: the family must call its tensor otherwise"
    return {"shape": list(values.shape[1:]), "dtype": str(values.dtype).removeprefix("torch."), "by": by}


def to_ipc(table: pa.Table) -> bytearray:
    """In memory that is taken once: a sink that grows would hold up to three times as much."""
    table, size = table.combine_chunks(), pa.MockOutputStream()
    with pa.ipc.new_file(size, table.schema) as writer:
        writer.write_table(table)
    data = bytearray(size.size())
    with pa.ipc.new_file(pa.FixedSizeBufferWriter(pa.py_buffer(data)), table.schema) as writer:
        writer.write_table(table)
    return data


def _offsets(data: bytes | bytearray, names: dict[str, Any]) -> dict[str, int]:
    """Where in the file each column's first tensor begins; the others follow without gaps."""
    whole = pa.py_buffer(data)
    file = pa.ipc.open_file(whole)
    found = {}
    for name in names:
        array = file.get_batch(0).column(name)
        array = array.dictionary if pa.types.is_dictionary(array.type) else array
        found[name] = array.buffers()[2].address - whole.address
    return found
