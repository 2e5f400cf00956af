"""What a cache holds, for people: its card, pictures of it, whether its bytes are what they were, what nobody needs."""

import hashlib
import json
import posixpath
from collections import Counter

import numpy as np
import torch

from cil.moments import Moments
from pipelines import storage
from pipelines.cache import PLAN, REJECTS, Cache, opened, part_names, read_cache
from pipelines.config import Config
from pipelines.errors import Unfinished
from pipelines.initial_noise import MomentsMaker
from pipelines.models import family_of
from pipelines.progress import Progress, clock
from pipelines.reader import SCORES, ClipReader, scored
from pipelines.video import sheet
from pipelines.watch import BUILD

SHOWN = 8  # clips on the contact sheet, three frames of each
LOOKED_AT = 8  # parts whose moments are computed again by `verify`
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
BARS = "·▁▂▃▄▅▆▇█"  # none, and few to as many as any


def show_cache(config: Config) -> None:
    cache = read_cache(config)
    if config.show_cache.verify:
        verify(config, cache)  # first: nothing can be said of a damaged one
    print(card(cache))
    pictures = storage.join(config.out, "cache_card.png")
    storage.write(pictures, contact_sheet(config, cache))
    print(f"\npictures: {pictures} (the first, middle and last frame of clips as they come back, and last E[X0])")
    if unneeded := orphans(cache.uri):
        print("", *unneeded, sep="\n")
        size = f"these {len(unneeded)} files, which no snapshot cites"
        if config.show_cache.sweep:
            for uri in unneeded:
                storage.remove(uri)
            print(f"removed: {size}")
        else:
            print(f"not needed: {size}; show_cache.sweep=true removes them")


def card(cache: Cache) -> str:
    encoding, counts = cache.encoding, cache.counts
    index = cache.index()
    splits = Counter(index["split"].to_pylist())
    reasons = Counter(row["reason"] for row in storage.read_rows(storage.join(cache.manifest.uri, REJECTS)))
    family = encoding["family"]
    lines = [
        f"latent cache at {cache.uri}",
        f"  snapshot    {posixpath.basename(cache.manifest.uri)} of {len(snapshots(cache.uri))}",
        f"  family      {family['name']}, clips of {family['frames']} x {family['height']} x {family['width']}",
        f"  encoder     {encoding['encoder']}",
        f"  clips       {counts['clips']:,} of {counts['planned']:,} planned, in {len(cache.parts):,} parts",
        "  splits      " + ", ".join(f"{name} {n:,}" for name, n in sorted(splits.items())),
        f"  rejected    {counts['rejected_videos']:,} videos"
        + (": " + ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common()) if reasons else ""),
        f"  bytes       {counts['bytes']:,}, {counts['bytes'] / max(counts['clips'], 1):,.0f} a clip",
        *_built(cache),
        "  scores      "
        + "".join(f"{f'{q:.0%}':>9}" for q in QUANTILES)
        + f"   {QUANTILES[0]:.0%} to {QUANTILES[-1]:.0%}",
    ]
    for score in (score for score in SCORES if len(index) and scored(index, score)):
        values = index[score].to_numpy()
        quantiles = np.quantile(values, QUANTILES)
        shown = "".join(f"{value:9.3f}" for value in quantiles)
        lines.append(f"    {score:<14}{shown}   {_histogram(values, quantiles[0], quantiles[-1])}")
    return "\n".join(lines)


def _built(cache: Cache) -> list[str]:
    uri = storage.join(cache.manifest.uri, BUILD)
    if not storage.exists(uri):
        return []
    told = json.loads(storage.read(uri))
    busy = ", ".join(f"{name} {told[f'{name}_busy']:.0%}" for name in ("decoding", "encoding"))
    rate = f"{told['clips_per_second']:.3g} clips/s"
    return [f"  built       by the last attempt in {clock(told['seconds'])}, {rate}; {busy} of the time"]


def _histogram(values: np.ndarray, low: float, high: float) -> str:
    """Equal steps from `low` to `high`; what is beyond counts at the ends."""
    counts, _ = np.histogram(values.clip(low, high), 10, (low, high))
    return "".join(BARS[-(-count * (len(BARS) - 1) // counts.max())] for count in counts)


def contact_sheet(config: Config, cache: Cache) -> bytes:
    """Rows of decoded latents, and E[X0] of some parts as the decoder sees it."""
    family, reader = family_of(config), ClipReader(cache, None)
    numbers = [int(i) for i in np.linspace(0, len(reader) - 1, min(SHOWN, len(reader)))]
    latents = reader.batch(numbers)["latents"].float() if numbers else torch.empty(0, *family.latent_shape)
    some = [cache.path(part["name"], "moments") for part in cache.parts[:LOOKED_AT]]
    mean = Moments.merged(Moments.from_bytes(storage.read(uri)) for uri in some).mean.float()
    return sheet(list(family.decode(torch.cat([latents, mean[None]]))))


def verify(config: Config, cache: Cache) -> None:
    """Every file has the bytes that the snapshot cites; of some parts the moments are computed again."""
    own = cache.manifest.content["files"]
    if damaged := [
        told for name, digest in own.items() for told in _damage(storage.join(cache.manifest.uri, name), digest)
    ]:
        mend = "remove that and manifest.json beside it, and run jobs.build_cache again"
        raise Unfinished(f"{'; '.join(damaged)}: {mend}")
    progress = Progress("verify", "bytes", cache.counts["bytes"])
    maker = MomentsMaker(config.model_dump(), cache.uri)
    again = set(np.linspace(0, len(cache.parts) - 1, min(LOOKED_AT, len(cache.parts))).astype(int))
    index = cache.index()
    numbers, rows, splits = (index[name].to_numpy(zero_copy_only=False) for name in ("part", "row", "drawn_split"))
    for i, part in enumerate(cache.parts):
        before = len(damaged)
        for ending, digest in (("arrow", "sha256"), ("moments", "moments_sha256"), ("index", "index_sha256")):
            damaged += _damage(cache.path(part["name"], ending), part[digest])
        if i in again and len(damaged) == before:
            mine = sorted(rows[(numbers == i) & (splits == "train")].tolist())
            again_made = maker({"part": part["name"], "rows": mine}).data
            if again_made != storage.read(cache.path(part["name"], "moments")):
                damaged.append(f"{cache.path(part['name'], 'moments')} is not of its clips")
        progress.advance(part["bytes"])
    if damaged:
        mend = "remove those parts' three files and manifest.json of this snapshot, and run jobs.build_cache again"
        raise Unfinished(
            f"{len(damaged)} of {3 * len(cache.parts)} files are damaged: {'; '.join(damaged[:10])}. {mend}"
        )
    print(f"verified: {len(cache.parts)} parts have the bytes they were made with, {len(again)} their clips' moments")


def _damage(uri: str, digest: str) -> list[str]:
    if not storage.exists(uri):
        return [f"{uri} is missing"]
    if hashlib.sha256(storage.read(uri)).hexdigest() != digest:
        return [f"{uri} has other bytes than when it was made"]
    return []


def snapshots(folder: str) -> list[str]:
    """Finished or not."""
    return sorted(storage.names(storage.join(folder, "snapshots")))


def orphans(folder: str) -> list[str]:
    """Files of parts that no snapshot cites, finished or begun, and what writers left that were killed."""
    homes = [storage.join(folder, "snapshots", name) for name in snapshots(folder)]
    plans = (storage.join(home, PLAN) for home in homes)
    cited = {name for uri in plans if storage.exists(uri) for name in part_names(opened(uri).read_all())}
    if not all(storage.exists(storage.join(home, "manifest.json")) for home in homes):
        cited.add("")  # .unfinished-*: a builder may be at work
    parts = storage.join(folder, "parts")
    return [storage.join(parts, name) for name in sorted(storage.names(parts)) if name.split(".")[0] not in cited]
