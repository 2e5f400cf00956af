"""A small cache with everything in it, made in this process without Ray."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_study
from in_process import Here, instead_of_ray

from pipelines.cache import Cache, build_cache
from pipelines.config import Config, load
from pipelines.video import encode
from pipelines.views import split_of

SETTINGS = (
    *("family.preset=tiny", "family.frames=2", "family.height=16", "family.width=16"),
    *("cache.views_per_video=2", "cache.videos_per_part=3", "cache.validation=0.2", "cache.test=0.3"),
)
# Of each video the split that is drawn for its id, and what it is: of its own, a copy of another one, or no video.
# Three are a part. With their copies c1 goes to test, as b0 before it, and d0 to train, as a0.
VIDEOS = {
    "a0": ("train", ""),
    "a1": ("train", ""),
    "a2": ("train", ""),
    "b0": ("test", ""),
    "b1": ("test", ""),
    "b2": ("test", ""),
    "c0": ("train", ""),
    "c1": ("train", "b0"),
    "c2": ("train", ""),
    "d0": ("test", "a0"),
    "d1": ("train", ""),
    "d2": ("validation", ""),
    "e0": ("train", "text"),
    "e1": ("test", "text"),
    "e2": ("train", "nowhere"),
    "f0": ("train", ""),
    "f1": ("train", "text"),
}
LONGER = {"g0": ("train", ""), "g1": ("test", "")}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    return instead_of_ray(monkeypatch)


@pytest.fixture(scope="session")
def ids() -> dict[str, str]:
    """The videoids of VIDEOS and LONGER by their names there: those that have the split which is wanted."""
    config, found = load(None, SETTINGS), {}
    for name, (split, _) in (VIDEOS | LONGER).items():
        found[name] = next(f"{name}-{k}" for k in range(100) if split_of(config, f"{name}-{k}") == split)
    return found


@pytest.fixture(scope="session")
def videos(ids: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the videos, videos.csv of VIDEOS, and longer.csv of LONGER too."""
    folder, random = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    data: dict[str, bytes] = {"text": b"no video"}
    for name, (_, kind) in (VIDEOS | LONGER).items():
        coarse = random.integers(0, 255, (6, 4, 4, 3), dtype=np.uint8)
        data[name] = encode(coarse.repeat(4, 1).repeat(4, 2), 8)
        if kind != "nowhere":
            (folder / f"{ids[name]}.mp4").write_bytes(data[kind or name])
    for file, names in (("videos", list(VIDEOS)), ("longer", [*LONGER, *VIDEOS])):
        rows = "".join(f"{ids[name]},caption of {name}\n" for name in names)
        (folder / f"{file}.csv").write_text(f"videoid,name\n{rows}")
    return folder


@pytest.fixture(scope="session")
def settings(videos: Path) -> Callable[..., Config]:
    """settings(out, "key=value", ..., csv="videos") -> a configuration of these videos."""

    def of(out: Path | str, *overrides: str, csv: str = "videos") -> Config:
        named = (f"out={out}", f"catalog.csv={videos}/{csv}.csv", f"catalog.videos={videos}")
        return load(None, [*SETTINGS, *named, *overrides])

    return of


@pytest.fixture(scope="session")
def _built(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patched:
        instead_of_ray(patched)
        build_cache(settings(out))
    return out


@pytest.fixture
def built(_built: Path, tmp_path: Path) -> Path:
    """A copy of the cache of VIDEOS, the folder `out` it is in."""
    return Path(shutil.copytree(_built, tmp_path / "out"))


@pytest.fixture
def cache(built: Path, settings: Callable[..., Config]) -> Cache:
    """The same, read."""
    from pipelines.cache import read_cache

    return read_cache(settings(built))


@pytest.fixture(scope="session")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of a small study, scored and not yet compared. Tests leave its artifacts as they are."""
    config = small_study.config_of(tmp_path_factory.mktemp("studied"))
    small_study.make(config)
    return config
