"""What a build and a training are on 8 to 512 GPUs, which nobody here has: rates, limits, and a simulation of both.

    python -m benchmarks.scale      # writes the tables of docs/scale.md and draws docs/scale.png

Rates come from benchmarks/results.md where it has them. Others are counted, or assumed: the first table says which.
Workers that share a store are simulated by events: each part is handed out by the driver, made and written; what is
made at the same time shares a store's requests evenly. The driver plans before and finishes afterwards, alone.
"""

import heapq
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cil.flops import BACKWARD, PEAKS

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PLOT = ROOT / "benchmarks/results.md", ROOT / "docs/scale.md", ROOT / "docs/scale.png"
CARD, CARDS_A_NODE = "H100", 8
GPUS = (8, 32, 128, 256, 512)
GB, GIB, HOUR = 1e9, 2**30, 3600.0


class Known(NamedTuple):
    value: float
    unit: str
    source: str


@cache
def known() -> dict[str, Known]:
    def measured(row: str, unit: str) -> Known:
        found = re.search(rf"^\| {re.escape(row)} +\| ([\d.,]+)", RESULTS.read_text(), re.M)
        assert found, f"{RESULTS} has no row `{row}`: run make bench"
        return Known(float(found[1].replace(",", "")), unit, f"measured: `{row}`")

    counted = "counted by torch's FlopCounterMode (tests/pipelines/test_scale.py)"
    amazon = "Amazon's page on S3's performance"
    return {
        "decoding": measured("decode: own process", "clips/s a core"),
        "scores": measured("scores: decoding", "ms a clip"),
        "planning": measured("catalog: planned", "rows/s"),
        "finishing": measured("catalog: finished", "rows/s"),
        "memory of planning": measured("catalog: memory of planning", "bytes a row"),
        "memory of finishing": measured("catalog: memory of finishing", "bytes a row"),
        "handing out": measured("catalog: parts handed out", "parts/s"),
        "copying a checkpoint": measured("checkpoint of 537 MB to 50 MB/s: standing still", "s for 537 MB"),
        "reading clips": measured("read: S3 + 30 ms, 10 million clips: 50 MB/s", "MB/s a rank"),
        "bytes of a video": Known(2e6, "bytes", "as `storage: boto3's get_object` reads them"),
        "bytes of a row": Known(294, "bytes", "of the catalog, `Table.nbytes` of benchmarks.catalog's csv"),
        "bytes of a clip": Known(635_904, "bytes", "docs/cache.md, DynamiCrafter at 16 x 320 x 512"),
        "encoding": Known(16 * 0.68985847808e12, "FLOP a clip", f"{counted}: the VAE's encoder, 16 frames"),
        "a forward pass": Known(12.6028333056e12, "FLOP a clip", f"{counted}: DynamiCrafter's UNet"),
        "trained": Known(1.488e9, "parameters", "docs/training.md"),
        "peak": Known(PEAKS[CARD], "FLOP/s", f"{CARD}'s data sheet, dense, 16 bits (cil/flops.py)"),
        "used of it by the VAE": Known(0.30, "share", "**assumed**; --dry-run measures it where you are"),
        "used of it by the UNet": Known(0.35, "share", "**assumed**; `mfu` in MLflow is the real one"),
        "a GPU to the others": Known(50 * GB, "bytes/s", "**assumed**: 3,200 Gbit/s a node of 8"),
        "a node to the store": Known(100e9 / 8, "bytes/s", "**assumed**: 100 Gbit/s of it are for S3"),
        "cores": Known(24, "a GPU", "p5.48xlarge: 192 vCPUs, each counted as one of our cores"),
        "GETs": Known(5500, "a second and prefix", amazon),
        "PUTs": Known(3500, "a second and prefix", amazon),
        "a connection to S3": Known(85e6, "bytes/s", f"{amazon}: 85 to 90 MB/s"),
        "actors": Known(389, "a second", "Ray's release log, many_actors of 1.12"),
        "start of a worker": Known(60, "s", "**assumed**: imports, weights of 4 GiB from S3"),
        "a GPU, an hour": Known(4.916, "$", "AWS, capacity blocks of p5.48xlarge, list of 2025"),
        "1,000 GETs": Known(0.0004, "$", "AWS, S3 standard, us-east-1"),
        "1,000 PUTs": Known(0.005, "$", "AWS, S3 standard, us-east-1"),
        "a GB, a month": Known(0.023, "$", "AWS, S3 standard, us-east-1"),
    }


def rate(name: str) -> float:
    return known()[name].value


# -- a build -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """One clip a video, as of WebVid; a worker has one GPU."""

    clips: int
    gpus: int
    prefixes: int = 1  # that the store tells apart: folders of videos
    videos_per_part: int = 300

    @property
    def parts(self) -> int:
        return math.ceil(self.clips / self.videos_per_part)

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / CARDS_A_NODE)


FILES = 3  # of a part


def stations(build: Build) -> dict[str, float]:
    """Clips a second that each of them could do, were it alone."""
    a_clip = 1 / rate("decoding") + rate("scores") / 1000  # seconds of a core
    moved = rate("bytes of a video") + rate("bytes of a clip")
    return {
        "GPUs": build.gpus * rate("peak") * rate("used of it by the VAE") / rate("encoding"),
        "decoding": build.gpus * rate("cores") / a_clip,
        "network": build.nodes * rate("a node to the store") / moved,
        "S3 GETs": build.prefixes * rate("GETs"),
        "S3 PUTs": rate("PUTs") * build.videos_per_part / FILES,
        "driver": rate("handing out") * build.videos_per_part,
    }


OWN = ("GPUs", "decoding", "network")  # of workers; the others are shared


def bottleneck(build: Build) -> str:
    able = stations(build)
    return min(able, key=able.__getitem__)


class Made(NamedTuple):
    clips: int
    seconds: float  # from the first worker's start to the last part
    first: float  # until the first part is whole


def made(
    sizes: Sequence[int], starts: Sequence[float], own: float, shared: float, handing: float, writing: float
) -> Made:
    """Parts of these many clips by workers that start at these times.

    A worker makes `own` clips a second; all that make at the same time make `shared` at most, each as many. A part is
    handed out every `handing` seconds at most, and after it is made takes `writing` seconds a clip.
    """
    free, running = list(starts), list[tuple[float, int]]()
    heapq.heapify(free)
    left, clips = list(reversed(sizes)), 0
    now = made_by_each = handed = end = 0.0  # `made_by_each`: clips that a worker has made which never stopped
    first = math.inf
    while left or running:
        pace = min(own, shared / len(running)) if running else own
        next_given = max(free[0], handed) if left and free else math.inf
        next_made = now + (running[0][0] - made_by_each) / pace if running else math.inf
        then = max(now, min(next_given, next_made))
        made_by_each, now = made_by_each + pace * (then - now), then
        if next_given <= next_made:
            heapq.heappop(free)
            size = left.pop()
            heapq.heappush(running, (made_by_each + size, size))
            handed = now + handing
        else:
            size = heapq.heappop(running)[1]
            clips += size
            whole = now + writing * size
            heapq.heappush(free, whole)
            first, end = min(first, whole), max(end, whole)
    return Made(clips, end, first)


class Outcome(NamedTuple):
    planning: float  # seconds
    making: float
    finishing: float
    clips: int
    busy: float  # share of the GPUs' time in which they encode

    @property
    def seconds(self) -> float:
        return self.planning + self.making + self.finishing


@cache
def simulate(build: Build) -> Outcome:
    able = stations(build)
    full, rest = divmod(build.clips, build.videos_per_part)
    sizes = [build.videos_per_part] * full + [rest] * bool(rest)
    starts = [rate("start of a worker") + i / rate("actors") for i in range(build.gpus)]
    writing = rate("bytes of a clip") / rate("a connection to S3")
    own = min(able[name] for name in OWN) / build.gpus
    shared = min(able[name] for name in able if name not in (*OWN, "driver"))
    parts = made(sizes, starts, own, shared, 1 / rate("handing out"), writing)
    busy = build.clips / able["GPUs"] / parts.seconds
    before, after = build.clips / rate("planning"), build.clips / rate("finishing")
    return Outcome(before, parts.seconds, after, parts.clips, busy)


def reached(build: Build) -> dict[str, float]:
    """With how many GPUs each station is as busy as they are; those that grow with them never are."""
    one, able = stations(replace(build, gpus=CARDS_A_NODE))["GPUs"] / CARDS_A_NODE, stations(build)
    return {name: able[name] / one for name in able if name not in OWN}


def head_memory(clips: int) -> float:
    """Bytes of the driver, at its worst."""
    return clips * max(rate("memory of planning"), rate("memory of finishing"))


def dollars(build: Build, seconds: float) -> float:
    requests = build.clips / 1000 * rate("1,000 GETs") + FILES * build.parts / 1000 * rate("1,000 PUTs")
    return build.gpus * seconds / HOUR * rate("a GPU, an hour") + requests


# -- a training --------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Seconds of each, which nothing overlaps."""

    computing: float
    reducing: float
    reading: float  # that a rank's reader takes for its share of a batch, while it computes

    @property
    def seconds(self) -> float:
        return max(self.computing + self.reducing, self.reading)

    @property
    def limit(self) -> str:
        parts = {"computing": self.computing, "reducing gradients": self.reducing, "reading": self.reading}
        return max(parts, key=parts.__getitem__)


SHAPE = 64  # clips of a batch, as in the paper
TENSORS = 3  # of a clip, each read by its range
POINTS = 30  # of a curve, at each of its places
LOGGED, KEPT = 640, 64_000  # clips from one point, one checkpoint to the next: jobs/configs/dynamicrafter.yaml


def batch_of(gpus: int) -> int:
    return max(SHAPE, gpus)


def step(gpus: int) -> Step:
    """With activations computed anew, gradients in 16 bits reduced after the last of them."""
    share = batch_of(gpus) / gpus
    flops = share * rate("a forward pass") * (1 + BACKWARD + 1)
    gradients = 2 * rate("trained") * 2 * (gpus - 1) / gpus
    return Step(
        flops / (rate("peak") * rate("used of it by the UNet")),
        gradients / rate("a GPU to the others"),
        share * rate("bytes of a clip") / (rate("reading clips") * 1e6),
    )


# -- the page ----------------------------------------------------------------------------------------------------------

WEBVID, LARGE = 10_700_000, 100_000_000


def builds(clips: int, prefixes: int = 1) -> list[Build]:
    """Of ten times the clips parts are larger, or their names and digests would be a large file."""
    return [Build(clips, gpus, prefixes, 300 if clips < LARGE else 3000) for gpus in GPUS]


def rates_table() -> str:
    rows = [[name, _figure(each.value), each.unit, each.source] for name, each in known().items()]
    return _table(["rate", "value", "unit", "from"], rows)


def builds_table(clips: int) -> str:
    rows = []
    for build in builds(clips):
        told, apart, better = simulate(build), replace(build, prefixes=16), "the same"
        if bottleneck(build) == "S3 GETs":
            spread = simulate(apart)
            better = f"{_hours(spread.seconds)} h, ${dollars(apart, spread.seconds):,.0f}, limit: {bottleneck(apart)}"
        pace = build.clips / told.making
        rows.append(
            [
                f"{build.gpus}",
                f"{build.nodes} + 1",
                _hours(told.making),
                _hours(told.planning + told.finishing),
                f"{told.busy:.0%}",
                f"{pace:,.0f}",
                f"{pace * rate('bytes of a video') / GB:.1f}",
                f"{FILES * pace / build.videos_per_part:.1f}",
                f"{pace / build.videos_per_part:.1f}",
                bottleneck(build),
                f"${dollars(build, told.seconds):,.0f}",
                better,
            ]
        )
    heads = [
        "GPUs",
        "nodes + head",
        "h of workers",
        "h of the driver alone",
        "GPUs busy",
        "clips/s = GETs/s",
        "GB/s in",
    ]
    heads += ["PUTs/s", "parts/s of the driver", "limit", "cost", "from 16 prefixes"]
    return _table(heads, rows)


def bytes_table() -> str:
    rows = []
    for name, clips in (("WebVid-10M", WEBVID), ("100M clips", LARGE)):
        one = builds(clips)[0]
        cells = [clips * rate("bytes of a video") / 1e12, clips * rate("bytes of a clip") / 1e12]
        month = cells[1] * 1000 * rate("a GB, a month")
        sizes = [f"{cells[0]:,.0f}", f"{cells[1]:,.1f}", f"${month:,.0f}", f"{one.parts:,}", f"{FILES * one.parts:,}"]
        objects = [f"{max(GPUS):,}", f"{2 * one.parts:,}", f"{head_memory(clips) / GIB:,.0f}"]
        objects.append(f"{clips * rate('bytes of a row') / GIB:,.0f}")
        cores = clips * (1 / rate("decoding") + rate("scores") / 1000) / HOUR
        rows.append([name, f"{clips:,}", *sizes, *objects, f"{cores:,.0f}"])
    heads = ["", "clips", "TB read", "TB kept", "a month", "parts", "files", "actors, at most", "objects of the driver"]
    heads += ["GiB of the driver's memory", "GiB of each node's disk", "core-hours of decoding"]
    return _table(heads, rows)


def limits_table() -> str:
    one = builds(WEBVID)[-1]
    found = reached(one)
    rows = [
        [name, f"{stations(one)[name]:,.0f}", f"{found[name]:,.0f}"] for name in sorted(found, key=found.__getitem__)
    ]
    return _table(["shared by all workers", "clips/s", "is the limit from so many GPUs on"], rows)


def training_table() -> str:
    rows = []
    for gpus in GPUS:
        one, batch = step(gpus), batch_of(gpus)
        pace = batch / one.seconds
        shard = 16 * rate("trained") / gpus
        rows.append(
            [
                f"{gpus}",
                f"{batch}",
                f"{one.seconds:.2f}",
                f"{one.computing / one.seconds:.0%}",
                f"{pace:,.0f}",
                f"{pace * TENSORS:,.0f}",
                _hours(1_280_000 / pace),
                _hours(WEBVID / pace),
                f"{shard / 537e6 * rate('copying a checkpoint'):.2f}",
                f"{shard / rate('a connection to S3'):.0f}",
                f"{POINTS * pace / max(LOGGED, batch):.1f}",
                one.limit,
                f"${1_280_000 / pace / HOUR * gpus * rate('a GPU, an hour'):,.0f}",
            ]
        )
    heads = [
        "GPUs",
        "batch",
        "s a step",
        "of it computing",
        "clips/s",
        "GETs/s",
        "h for 1.28M clips",
        "h for WebVid-10M",
    ]
    heads += ["s a checkpoint holds up", "s until it is whole", "points/s to MLflow", "limit", "cost of 1.28M clips"]
    return _table(heads, rows)


TABLES: dict[str, Callable[[], str]] = {
    "rates": rates_table,
    "bytes": bytes_table,
    "webvid": lambda: builds_table(WEBVID),
    "large": lambda: builds_table(LARGE),
    "limits": limits_table,
    "training": training_table,
}


def filled(page: str, names: Iterable[str] = TABLES) -> str:
    """With each of these tables between its markers."""
    for name in names:
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        assert page.count(begin) == page.count(end) == 1, f"{PAGE} has no place for the table `{name}`"
        page = page[: page.index(begin) + len(begin)] + TABLES[name]() + "\n" + page[page.index(end) :]
    return page


def draw() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for clips, colour, name in ((WEBVID, "C0", "10.7M clips"), (LARGE, "C1", "100M clips")):
        for prefixes, line in ((1, "-"), (16, "--")):
            hours = [simulate(build).seconds / HOUR for build in builds(clips, prefixes)]
            axes.plot(
                GPUS, hours, line, color=colour, marker="o", label=f"{name}, {prefixes} prefix{'es' * (prefixes > 1)}"
            )
        ideal = [clips / stations(build)["GPUs"] / HOUR for build in builds(clips)]
        axes.plot(GPUS, ideal, ":", color=colour, label=f"{name}, GPUs always busy")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.set(xlabel=f"{CARD}s", ylabel="hours", title="A latent cache, from the command to the manifest")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PLOT, dpi=110)


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR:.1f}" if seconds < 100 * HOUR else f"{seconds / HOUR:,.0f}"


def _figure(value: float) -> str:
    if value >= 1e9:
        return f"{value:.4g}".replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write() -> None:
    PAGE.write_text(filled(PAGE.read_text()))
    draw()
    print(f"{PAGE}, {PLOT}")


if __name__ == "__main__":
    write()
