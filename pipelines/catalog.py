"""What is to be encoded: a WebVid csv and the mp4 files it names, under page_dir/videoid.mp4 or videoid.mp4."""

import csv
import hashlib
import io
from dataclasses import dataclass

from pipelines import storage
from pipelines.config import CatalogConfig
from pipelines.errors import UserError

COLUMNS = ("videoid", "name")


@dataclass(frozen=True)
class Video:
    videoid: str
    page_dir: str
    caption: str
    duplicate: bool = False

    @property
    def safe(self) -> bool:
        """Names from a csv cannot leave their folder."""
        parts = [self.videoid, *self.page_dir.split("/")] if self.page_dir else [self.videoid]
        return all(p not in ("", ".", "..") and "/" not in p and not set(p) & set("\\\0:") for p in parts)

    @property
    def paths(self) -> list[str]:
        """Where the file may stand in the folder of videos, the likelier place first."""
        flat = f"{self.videoid}.mp4"
        return [storage.join(self.page_dir, flat), flat] if self.page_dir else [flat]


@dataclass(frozen=True)
class Catalog:
    videos: list[Video]
    folder: str
    digest: str


def read_catalog(config: CatalogConfig, default: str) -> Catalog:
    """Every row of the csv, sorted by videoid; `default` is the data set of jobs.make_shapes."""
    uri = config.csv or storage.join(default, "videos.csv")
    folder = config.videos or storage.join(default, "videos")
    if not storage.exists(uri):
        made = "" if config.csv else " (python -m jobs.make_shapes writes one to try with)"
        raise UserError(f"catalog.csv={uri}: there is no such file{made}")
    if storage.is_local(folder) and not storage.exists(folder):
        raise UserError(f"catalog.videos={folder}: there is no such folder; the files of {uri} are looked for in it")
    data = storage.read(uri)
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", errors="replace"), newline=""))
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or [])]
    if missing:
        raise UserError(f"catalog.csv={uri}: has no column {', '.join(missing)}; found are {rows.fieldnames or 'none'}")
    seen: set[str] = set()
    videos = []
    for row in rows:
        videoid = row["videoid"] or ""
        videos.append(Video(videoid, row.get("page_dir") or "", row["name"] or "", videoid in seen))
        seen.add(videoid)
    if not videos:
        raise UserError(f"catalog.csv={uri}: holds no videos")
    return Catalog(
        sorted(videos, key=lambda v: (v.videoid, v.duplicate)), folder, hashlib.sha256(data).hexdigest()[:16]
    )
