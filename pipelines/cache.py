"""The latent cache: clips decoded, encoded by the family, and kept in parts; and its snapshots.

The folder of parts is of one encoding: whatever would change a clip's tensors is its identity. A snapshot is a list of
parts that hold the videos of one catalog, with an index of their clips. A longer catalog adds parts and a snapshot; who
reads an older one notices nothing. Parts are named by the videos in them, so builders need no locks.
"""

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cil.families import Family
from cil.metrics.duplicates import near_duplicates
from cil.metrics.motion import SMALLEST
from pipelines import artifact, cluster, storage, tables
from pipelines.ahead import ahead
from pipelines.artifact import Artifact, Identity, Manifest
from pipelines.catalog import Catalog, Root, Video, read_catalog
from pipelines.clips import CLIP, PartMaker, to_ipc
from pipelines.config import Config
from pipelines.errors import Unfinished, UserError
from pipelines.models import (
    aesthetics_identity,
    encoder_of,
    encoding_code,
    family_of,
    refuse_other_family,
    shape_of,
)
from pipelines.parts import Part, make_parts
from pipelines.watch import Watch

KIND, SNAPSHOT = "latent cache", "snapshot"
LATEST = "latest.json"
INDEX, PLAN, REJECTS = "index.arrow", "plan.arrow", "rejects.jsonl"
SENT = "rows-"  # begins the name of what workers read, which goes when the snapshot is finished
SENT_COLUMNS = ("videoid", "caption", "extra", "place", "root", "offset", "size", "problem")
INDEXED = pa.schema(
    [
        pa.field(field.name, pa.large_string()) if pa.types.is_string(field.type) else field
        for field in CLIP
        if field.name not in ("frame_indices", "extra")
    ]
    + [pa.field(name, pa.int32()) for name in ("place", "part", "row")]
)
FIRST, SOME = 1000, 200  # videos among which one that is there is looked for
CODE = (
    *("pipelines.clips", "pipelines.views", "pipelines.video", "pipelines.decoding"),
    *("pipelines.catalog", "pipelines.tables", "pipelines.tars", "cil.images", "cil.moments", "cil.draws"),
    *("cil.metrics.motion", "cil.metrics.clips", "cil.metrics.duplicates", "cil.metrics.aesthetics"),
)
SHAPING = (  # of the keys of `cache`, what shapes a clip or a part
    *("stride", "fps", "views_per_video", "flip", "condition", "crop", "validation", "test", "videos_per_part"),
)


@dataclass(frozen=True)
class Cache:
    """A finished snapshot, and the folder of parts that it is of."""

    uri: str
    manifest: Manifest

    @property
    def encoding(self) -> Identity:
        encoding: Identity = self.manifest.identity["encoding"]
        return encoding

    @property
    def counts(self) -> dict[str, int]:
        return self.manifest.counts

    @property
    def parts(self) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = self.manifest.content["parts"]
        return parts

    @property
    def fingerprint(self) -> str:
        """Of the bytes that the parts have: what was accepted with transient rejects is another one."""
        return artifact.fingerprint([self.manifest.fingerprint, [part["sha256"] for part in self.parts]])

    def path(self, part: str, ending: str = "arrow") -> str:
        return storage.inside(storage.join(self.uri, "parts"), f"{part}.{ending}")

    def index(self) -> pa.Table:
        """Of every clip all but its tensors, by clip_id: mapped into memory, wherever the cache is."""
        return _table(str(storage.kept_copy(storage.join(self.manifest.uri, INDEX))))


def build_cache(config: Config) -> Cache:
    """A snapshot of the catalog. Finished already: does nothing. Begun: makes the parts that are missing."""
    catalog = read_catalog(config.catalog, storage.join(config.out, "shapes"))
    family = family_of(config)
    if family.frames < 2 or min(family.height, family.width) < SMALLEST:
        size = f"{family.frames} x {family.height} x {family.width}"
        raise UserError(f"family: clips of {size}; a motion score needs 2 frames of {SMALLEST} x {SMALLEST} or more")
    folder = Artifact(storage.join(config.out, "cache"), KIND, encoding_of(config, family))
    identity = {"encoding": folder.identity, "catalog": catalog.digest, "code": artifact.code("pipelines.cache")}
    name = artifact.fingerprint(identity)
    snapshot = Artifact(folder.path("snapshots", name), SNAPSHOT, identity)
    if snapshot.finished:
        print(f"{KIND}: snapshot {name} of {folder.uri} is finished; nothing to do")
        return _latest(folder.uri, name)

    watch = Watch(config, snapshot, len(catalog) * config.cache.views_per_video)
    folder.begin(config.model_dump_json(indent=1))
    snapshot.begin(config.model_dump_json(indent=1))
    plan = _planned(snapshot, folder.uri, catalog, config.cache.videos_per_part)
    transient = _make(config, folder, snapshot, catalog, plan, watch)
    if transient:
        watch.pause()
        raise Unfinished(
            f"{len(transient)} parts wait for videos that could not be read for passing reasons ({transient[0]}). "
            "Run the same command again, or accept them with cache.accept_transient=true"
        )
    watch.keep()
    _finish(folder, snapshot, catalog, plan, config.cache.views_per_video)
    cache = _latest(folder.uri, name)
    watch.finish({"cache": cache.uri, "cache_fingerprint": cache.fingerprint}, cache.counts)
    return cache


def encoding_of(config: Config, family: Family) -> Identity:
    """Everything that shapes the tensors of a clip, or which clips stand together."""
    told = config.family.model_dump(include={"latents", "clip_features"})
    return {
        "seed": config.seed,
        "family": shape_of(family) | told,
        "encoder": encoder_of(family),
        "aesthetic": aesthetics_identity(config),
        "cache": config.cache.model_dump(include=set(SHAPING)),
        "code": artifact.code(*CODE, *encoding_code(family)),
    }


def _latest(folder: str, name: str) -> Cache:
    """What later jobs use unless they are told otherwise."""
    if (before := _latest_name(folder)) != name:
        storage.write(storage.join(folder, LATEST), json.dumps({"snapshot": name}).encode())
        if before:
            print(f"{KIND}: later jobs use snapshot {name} now; cache.snapshot={before} is the one before it")
    return Cache(folder, artifact.read_manifest(storage.join(folder, "snapshots", name), SNAPSHOT))


def _latest_name(folder: str) -> str | None:
    pointer = storage.join(folder, LATEST)
    return json.loads(storage.read(pointer))["snapshot"] if storage.exists(pointer) else None


def read_cache(config: Config) -> Cache:
    """The snapshot that the configuration names, or the latest one, of this configuration's family and size."""
    folder = storage.join(config.out, "cache")
    name = config.cache.snapshot or _latest_name(folder)
    if name is None:
        artifact.refuse_unfinished(folder, KIND)
    cache = Cache(folder, artifact.read_manifest(storage.inside(storage.join(folder, "snapshots"), name), SNAPSHOT))
    refuse_other_family(KIND, folder, cache.encoding["family"], config)
    return cache


def pinned(config: Config, cache: Cache) -> Config:
    """For workers, who read this snapshot whatever is built meanwhile."""
    name = posixpath.basename(cache.manifest.uri)
    return config.model_copy(update={"cache": config.cache.model_copy(update={"snapshot": name})})


def refuse_other_encoder(cache: Cache, family: Family) -> None:
    """Where latents are to be trained on or decoded, by other frozen weights than those that made them."""
    if (mine := encoder_of(family)) != cache.encoding["encoder"]:
        raise UserError(
            f"the cache at {cache.uri} was encoded by {cache.encoding['encoder']}, and family.weights, tokenizer and "
            f"precision make {mine}: name those that it was made with, or another `out`"
        )


# -- which videos stand in which part --------------------------------------------------------------------------------


def _planned(snapshot: Artifact, folder: str, catalog: Catalog, size: int) -> pa.Table:
    """Of every row of the catalog its hash and its part: written down when the work begins, then kept to."""
    uri = snapshot.path(PLAN)
    if not storage.exists(uri):
        storage.write(uri, to_ipc(plan_of(folder, catalog, size)))
    return _table(uri)


def plan_of(folder: str, catalog: Catalog, size: int) -> pa.Table:
    """Beginning with the parts of the latest snapshot."""
    old = storage.join(folder, "snapshots", _latest_name(folder) or "none", PLAN)  # which somebody may have removed
    before = _table(old) if storage.exists(old) else None
    return plan_parts(hashes_of(catalog), before, size)


def plan_parts(hashes: np.ndarray, before: pa.Table | None, size: int) -> pa.Table:
    """Parts of an earlier plan stay as they are if all their videos are wanted still; other videos form new ones."""
    hashes = _told_apart(hashes)
    part = np.full(len(hashes), -1, np.int32)
    names: list[str] = []
    if before is not None and len(before):
        old_names, old_hash, old_part = part_names(before), before["hash"].to_numpy(), before["part"].to_numpy()
        lost = np.unique(old_part[~np.isin(old_hash, hashes)])
        kept = np.setdiff1d(np.arange(len(old_names), dtype=np.int32), lost)
        number = np.full(len(old_names), -1, np.int32)
        number[kept] = np.arange(len(kept))
        order = np.argsort(old_hash, kind="stable")
        at = np.clip(np.searchsorted(old_hash[order], hashes), 0, len(order) - 1)
        found = old_hash[order][at] == hashes
        part[found] = number[old_part[order][at]][found]
        names = [old_names[i] for i in kept]
    new = np.flatnonzero(part < 0)
    for begin in range(0, len(new), size):
        rows = new[begin : begin + size]
        part[rows] = len(names)
        names.append("part-" + hashlib.sha256(np.sort(hashes[rows]).tobytes()).hexdigest()[:16])
    return pa.table({"hash": hashes, "part": part}).replace_schema_metadata({"names": json.dumps(names)})


def _told_apart(hashes: np.ndarray) -> np.ndarray:
    """The second row with a hash, the third, ... get others: each row of a plan is in one part, duplicates too."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    first = np.maximum.accumulate(np.where(ordered == np.roll(ordered, 1), 0, np.arange(len(hashes))))
    apart = np.empty_like(hashes)
    apart[order] = ordered + (np.arange(len(hashes)) - first).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return apart


def part_names(plan: pa.Table) -> list[str]:
    names: list[str] = json.loads(plan.schema.metadata[b"names"])
    return names


def hashes_of(catalog: Catalog) -> np.ndarray:
    """Of what a row says of its video, wherever the file lies."""
    told = catalog.table.select(["videoid", "caption", "problem", "extra"])
    slices = (told.slice(start, tables.ROWS).to_pandas() for start in range(0, len(told), tables.ROWS))
    return np.concatenate([pd.util.hash_pandas_object(rows, index=False).to_numpy() for rows in slices])


# -- making them -----------------------------------------------------------------------------------------------------


class Rows:
    """A catalog's rows in the order of their parts: in a file that workers map, of one on S3 each machine's copy."""

    def __init__(self, uri: str, roots: tuple[Root, ...]) -> None:
        self._uri, self._roots = uri, roots
        self._catalog: Catalog | None = None

    def write(self, catalog: Catalog, order: np.ndarray) -> None:
        table = catalog.table.select(SENT_COLUMNS)
        with storage.creating(self._uri) as path:
            tables.write(str(path), table.schema, tables.in_order(table, order))

    def videos(self, start: int, stop: int) -> list[Video]:
        if self._catalog is None:
            self._catalog = Catalog(_table(str(storage.kept_copy(self._uri))), "", "", self._roots)
        return self._catalog.videos(start, stop)


def _make(
    config: Config, folder: Artifact, snapshot: Artifact, catalog: Catalog, plan: pa.Table, watch: Watch
) -> list[str]:
    """What the makers said of parts that they could not make."""
    views, part = config.cache.views_per_video, plan["part"].to_numpy()
    names, order = part_names(plan), np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(len(names) + 1))
    there = storage.names(folder.path("parts"))
    parts = [
        Part(
            folder.path("parts", f"{name}.index"),
            {"name": name, "start": int(start), "stop": int(stop)},
            int(stop - start) * views,
        )
        for name, start, stop in zip(names, ends, ends[1:], strict=False)
    ]
    missing = np.array([f"{name}.index" not in there for name in names])
    if not missing.any():
        return []
    refuse_lost(catalog, ~missing[part])
    cluster.connect()
    cluster.refuse_unseen(_examples(catalog))  # on a node that does not see a video it would be missing for ever
    watch.begin()
    places = [hashlib.sha256(numbers.tobytes()).hexdigest() for numbers in (order, catalog.table["root"].to_numpy())]
    uri = snapshot.path(f"{SENT}{artifact.fingerprint([catalog.roots, *places])}.arrow")  # which no digest knows
    rows = Rows(uri, catalog.roots)
    if not storage.exists(uri):
        rows.write(catalog, order)
    arguments = {"config": config.model_dump(), "folder": folder.path("parts"), "catalog": rows}
    return make_parts("cache", "clips", parts, PartMaker, arguments, config.cache.gpus, watch)


def refuse_lost(catalog: Catalog, made: np.ndarray) -> None:
    """A root of which no video is made yet, and none of some is there: misspelt or not mounted, all of it would be
    missing for ever. `made`: which rows are in parts that are there.
    """
    root_of = catalog.table["root"].to_numpy()
    for number in np.setdiff1d(np.unique(root_of), root_of[made]):
        own = np.flatnonzero(root_of == number)
        looked_for = tables.taken(catalog.table, own[np.unique(np.linspace(0, len(own) - 1, SOME).astype(int))])
        videos = replace(catalog, table=looked_for).videos(0, SOME)
        sources = [video.sources for video in videos if video.sources]
        if sources and not any(storage.exists(source) for each in sources for source in each):
            raise UserError(
                f"none of {len(sources)} videos of {catalog.source} that were looked for is there, such as "
                f"{' or '.join(sources[0])}: is the place right (catalog.videos), and mounted?"
            )


def _examples(catalog: Catalog) -> Iterable[str]:
    """Of each local folder of videos one that is there, if one of the first is."""
    root_of = catalog.table["root"].to_numpy()
    for number, root in enumerate(catalog.roots):
        first = replace(catalog, table=tables.taken(catalog.table, np.flatnonzero(root_of == number)[:FIRST]))
        for folder in filter(storage.is_local, root.folders):
            sources = (source for video in first.videos(0, FIRST) for source in video.sources)
            below = f"{folder.rstrip('/')}/"
            found = (source for source in sources if source.startswith(below) and storage.exists(source))
            yield from islice(found, 1)


def _finish(folder: Artifact, snapshot: Artifact, catalog: Catalog, plan: pa.Table, views: int) -> None:
    """The index, the rejects table, the counts, and last the manifest."""
    names = part_names(plan)
    videos = np.bincount(plan["part"].to_numpy(), minlength=len(names))
    order, ends = np.argsort(plan["part"].to_numpy(), kind="stable"), np.cumsum(videos)
    parts: list[dict[str, Any]] = []
    reasons, left_out = Counter[str](), list[int]()
    with storage.creating(snapshot.path(REJECTS)) as path, path.open("wb") as file:

        def indexes() -> Iterator[pa.Table]:
            """Of part after part; what else they say goes where it belongs."""
            uris = (folder.path("parts", f"{name}.index") for name in names)
            for number, (name, (digest, table)) in enumerate(zip(names, tables_of(uris), strict=True)):
                said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
                rejects = json.loads(said["rejects"])
                rows = order[ends[number] - videos[number] : ends[number]]
                file.write(storage.to_rows(catalog.with_sources(rejects, rows)))
                reasons.update(reject["reason"] for reject in rejects)
                left_out.append(sum(reject["clips"] for reject in rejects))
                digests = {"index_sha256": digest} | {key: said[key] for key in ("sha256", "moments_sha256")}
                counted = {"clips": len(table), "videos": int(videos[number]), "bytes": int(said["bytes"])}
                parts.append({"name": name, **digests, **counted, "tensors": json.loads(said["tensors"])})
                table = table.append_column("part", pa.array(np.full(len(table), number, np.int32)))
                table = table.append_column("row", pa.array(range(len(table)), pa.int32()))
                yield table.select(INDEXED.names).cast(INDEXED)

        unsorted = tables.spooled(INDEXED, indexes())
        file.flush()
        digests = {REJECTS: _digest(path), PLAN: _digest(storage.kept_copy(snapshot.path(PLAN)))}
    index = tables.spooled(INDEXED, tables.in_order(unsorted, pc.sort_indices(unsorted["clip_id"]).to_numpy()))
    if _repeats(index["clip_id"]).any():
        raise AssertionError(f"{snapshot.uri}: a clip stands in it twice")
    planned, clips = int(videos.sum()) * views, len(index)
    rejected = planned - clips
    if sum(left_out) != rejected:
        raise AssertionError(f"{snapshot.uri}: {planned} clips planned, but {clips} made and {sum(left_out)} rejected")
    index = index.append_column("drawn_split", index["split"])
    index = index.set_column(index.column_names.index("split"), "split", _split_together(index))
    with storage.creating(snapshot.path(INDEX)) as path:
        tables.write(str(path), index.schema, [index])
        digests[INDEX] = _digest(path)
    for name in storage.names(snapshot.uri):
        if name.startswith(SENT):
            storage.remove(snapshot.path(name))
    counts = {"planned": planned, "clips": clips, "rejected": rejected, "rejected_videos": reasons.total()}
    counts["bytes"] = sum(part["bytes"] for part in parts)
    snapshot.finish(counts, parts=parts, files=digests)
    shown = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    print(
        f"{KIND}: {clips} clips in {len(parts)} parts; {reasons.total()} videos rejected"
        + (f" ({shown})" if shown else "")
    )


def _repeats(ordered: pa.ChunkedArray) -> np.ndarray:
    """Which values are the same as the one before."""
    repeats = np.zeros(len(ordered), bool)
    repeats[1:] = pc.equal(ordered.slice(1), ordered.slice(0, max(0, len(ordered) - 1))).to_numpy()
    return repeats


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_together(index: pa.Table) -> pa.ChunkedArray:
    """Videos that have near-duplicates in common are in one split: that of the first of them."""
    video = np.cumsum(~_repeats(index["videoid"])) - 1  # its clips stand together, as their ids begin with VIDEOID:
    group = near_duplicates(index["hash"].to_numpy())
    first = np.arange(len(index))  # of the clips that each clip is tied to
    while True:
        before = first.copy()
        for tie in (video, group):
            least = np.full(len(index), len(index))
            np.minimum.at(least, tie, first)
            first = least[tie]
        if np.array_equal(first, before):
            rows = tables.in_order(index.select(["split"]), first)
            return pa.chunked_array([chunk for some in rows for chunk in some["split"].chunks], index["split"].type)


# -- files -----------------------------------------------------------------------------------------------------------


def tables_of(uris: Iterable[str]) -> Iterator[tuple[str, pa.Table]]:
    """With the digests of their files; in order, several read at once."""
    return (read.result() for read in ahead(_with_digest, uris, storage.AT_ONCE))


def _with_digest(uri: str) -> tuple[str, pa.Table]:
    data = storage.read(uri)
    return hashlib.sha256(data).hexdigest(), opened(uri, pa.py_buffer(data)).read_all()


def _table(uri: str) -> pa.Table:
    return opened(uri).read_all()


def opened(uri: str, data: pa.Buffer | None = None) -> pa.ipc.RecordBatchFileReader:
    """Mapped into memory where it is a local file, unless its bytes are given."""
    source = data or (pa.memory_map(uri) if storage.is_local(uri) else pa.py_buffer(storage.read(uri)))
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{uri} is damaged ({error}): remove it (of a part all three files) and manifest.json of the snapshots "
            "that cite it, and run jobs.build_cache again"
        ) from None
