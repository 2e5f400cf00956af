"""How a build of a latent cache goes: on its line of progress, in `build.json`, and as curves of an MLflow run.

Where `tracking.uri` names a store, the run is opened when the workers start, and found again when the build goes on. A
store that goes away costs the build nothing. Rates are of this attempt; the last point counts all clips.
"""

import json
import time
from collections import Counter
from typing import Any

from pipelines import metrics, storage
from pipelines.artifact import Artifact
from pipelines.config import Config
from pipelines.errors import Unfinished
from pipelines.tracking import Feed, refuse_unreachable

BUILD = "build.json"  # beside a snapshot's manifest; the same clips may be built faster, so nothing depends on it
EVERY = 10.0  # seconds from one point of the curves to the next
PATIENCE = 60.0  # seconds that a finished build waits for a store that has gone away


class Watch:
    def __init__(self, config: Config, snapshot: Artifact, planned: int) -> None:
        self._config, self._snapshot, self._planned = config, snapshot, planned
        self._begin, self._next = 0.0, 0.0
        self._figures: dict[str, float] = {}
        self._feed: Feed | None = None
        if config.tracking.uri:
            refuse_unreachable(config)

    def _opened(self) -> Feed | None:
        if not self._config.tracking.uri:
            return None
        feed = Feed(self._config, "cache", "cache", self._snapshot.fingerprint)
        encoding = self._snapshot.identity["encoding"]
        feed.parameters({key: value for key, value in encoding.items() if key != "code"})
        return feed

    def begin(self) -> None:
        """The workers are about to start."""
        self._feed, self._begin = self._opened(), time.monotonic()

    def __call__(self, done: int, told: Counter[str]) -> str:
        """A part more is made. `done`: clips of all; `told`: what the parts of this attempt told."""
        now = time.monotonic()
        seconds, workers = max(now - self._begin, 1e-9), max(told["seconds"], 1e-9)
        self._figures = {
            "videos_per_second": told["videos"] / seconds,
            "clips_per_second": told["clips"] / seconds,
            "decoding_busy": told["decoding"] / workers,
            "encoding_busy": told["encoding"] / workers,
            "seconds": seconds,
        }
        for work in ("decoding", "encoding"):
            metrics.BUSY(self._figures[f"{work}_busy"], work)
        if now >= self._next and done < self._planned:  # the last point is that of `finish`
            if self._feed:
                counted = {name: float(told[name]) for name in ("clips", "rejected_videos", "bytes")}
                self._feed.metrics(self._figures | counted, done)
            self._next = now + EVERY
        return (
            f"{self._figures['videos_per_second']:.3g} videos/s, {told['rejected_videos']} rejected, "
            f"{_size(told['bytes'])}, decode {self._figures['decoding_busy']:.0%} "
            f"encode {self._figures['encoding_busy']:.0%}"
        )

    def keep(self) -> None:
        """Before the manifest is written. An attempt that has made nothing leaves what the one before it told."""
        if self._figures:
            storage.write(self._snapshot.path(BUILD), json.dumps(self._figures, indent=1).encode())

    def finish(self, tags: dict[str, Any], counts: dict[str, int]) -> None:
        self._feed = self._feed or self._opened()  # of an attempt that had nothing left to make
        if self._feed:
            self._feed.tags(tags)
            self._feed.metrics(self._figures | counts, self._planned)
            self._feed.finish()
            self.pause()

    def pause(self) -> None:
        """All is sent, or the store stays away."""
        if self._feed:
            try:
                self._feed.flush(PATIENCE)
            except Unfinished as error:
                print(f"{error}: the run of this build lacks its last figures", flush=True)


def _size(count: float) -> str:
    unit, size = next((unit for unit in (("TB", 1e12), ("GB", 1e9)) if count >= unit[1]), ("MB", 1e6))
    return f"{count / size:.1f} {unit}"
