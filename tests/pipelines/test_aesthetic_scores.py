"""The aesthetic score in a cache that is made with a head, what is filtered by it, and where there is none."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from published import aesthetic_by_hand, write_clip, write_head

from pipelines import storage
from pipelines.cache import INDEX, build_cache, opened, read_cache, to_ipc
from pipelines.card import card
from pipelines.errors import UserError
from pipelines.finetune import finetune
from pipelines.generate import choose
from pipelines.initial_noise import make_initial_noise, read_initial_noise
from pipelines.reader import BalancedOrder, ClipReader
from pipelines.rows import order_of
from pipelines.video import PyAVDecoder


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("aesthetics")
    return {"head": write_head(folder / "head.pth"), "clip": write_clip(folder / "clip")}


@pytest.fixture
def given(files) -> tuple[str, ...]:
    return tuple(f"cache.aesthetic.{name}={file}" for name, file in files.items())


@pytest.fixture
def made(settings, here, given, tmp_path):
    """The configuration of a cache with scores."""
    config = settings(tmp_path / "scored", *given)
    build_cache(config)
    return config


def test_every_clip_has_the_score_of_its_middle_frame_in_its_part_and_in_the_index(made, videos, files):
    cache = read_cache(made)
    reader = ClipReader(cache, None)
    scores = reader.values("aesthetic")
    assert scores.dtype == np.float32
    assert len(set(scores.tolist())) > 20
    rows = [row for part in cache.parts for row in opened(cache.path(part["name"])).read_all().to_pylist()]
    of = {row["clip_id"]: row for row in rows}
    for i in range(0, len(reader), 5):
        row = of[reader.known(i)["clip_id"]]
        video = PyAVDecoder((videos / f"{row['videoid']}.mp4").read_bytes())
        frames = torch.from_numpy(video.frames(row["frame_indices"]))
        assert frames.shape == (2, 16, 16, 3)
        assert row["aesthetic"] == scores[i] == pytest.approx(aesthetic_by_hand(frames[1], **files), abs=1e-5)


def test_a_part_made_again_has_the_same_bytes_and_the_rest_of_it_is_as_without_scores(made, here, settings, cache):
    before = read_cache(made)
    wanted = storage.read(before.path(before.parts[0]["name"]))
    for file in (before.path(before.parts[0]["name"], "index"), f"{before.manifest.uri}/manifest.json"):
        Path(file).unlink()
    assert build_cache(made).fingerprint == before.fingerprint
    assert storage.read(before.path(before.parts[0]["name"])) == wanted
    without = opened(cache.path(cache.parts[0]["name"])).read_all()
    assert without["aesthetic"].null_count == len(without) == 6
    assert opened(before.path(before.parts[0]["name"])).read_all().drop("aesthetic") == without.drop("aesthetic")


def test_the_head_and_its_clip_are_part_of_the_encoding_by_their_values(made, settings, files, here, tmp_path):
    def built(**other: Path) -> None:
        build_cache(settings(made.out, *(f"cache.aesthetic.{n}={file}" for n, file in (files | other).items())))

    here.made.clear()
    built(head=Path(files["head"].rename(tmp_path / "elsewhere.pth")).rename(files["head"]))
    copied = tmp_path / "copied.pth"
    copied.write_bytes(files["head"].read_bytes())
    built(head=copied)
    assert here.made == []
    for other in ({"head": write_head(tmp_path / "o.pth", seed=1)}, {"clip": write_clip(tmp_path / "o", seed=1)}):
        with pytest.raises(UserError, match=r"aesthetic was '\w{16}', is '\w{16}'"):
            built(**other)
    with pytest.raises(UserError, match=r"aesthetic was '\w{16}', is None"):
        build_cache(settings(made.out))


def test_later_jobs_filter_and_balance_by_the_score(made, settings):
    cache = read_cache(made)
    train = ClipReader(cache, "train")
    scores = train.values("aesthetic")
    middle = float(np.median(scores))
    where = {"aesthetic": (middle, None)}
    assert len(ClipReader(cache, "train", where)) == (scores >= middle).sum() < len(train)
    told = f"{{aesthetic: [{middle!r}, null]}}"
    # Neither needs the head: the scores are in the index.
    config = settings(
        made.out, f"initial_noise.where={told}", f"generate.where={told}", "finetune.row.balance=aesthetic"
    )
    make_initial_noise(config)
    assert read_initial_noise(config)[0].count == (scores >= middle).sum()
    assert (ClipReader(cache, "test").values("aesthetic") >= middle).sum() == len(choose(config, cache, "real"))
    order = order_of(train, config.finetune.row, 1)
    assert isinstance(order, BalancedOrder)
    assert {order(p) for p in range(1000)} == set(range(len(train)))


def test_the_card_shows_the_scores_where_there_are_any(made, cache):
    (shown,) = re.findall(r"^ {4}aesthetic +(.*)$", card(with_scores := read_cache(made)), re.M)
    wanted = np.quantile(ClipReader(with_scores, None).values("aesthetic"), (0.01, 0.25, 0.5, 0.75, 0.99))
    np.testing.assert_allclose([float(x) for x in shown.split()[: len(wanted)]], wanted, atol=5.1e-4)
    assert "aesthetic" not in card(cache)


ASKED = [
    ("initial_noise.where={aesthetic: [5, null]}", make_initial_noise),
    ("initial_noise.where={aesthetic: [null, null]}", make_initial_noise),
    ("generate.where={aesthetic: [5, null]}", lambda config: choose(config, read_cache(config), "real")),
    ("finetune.row.where={aesthetic: [5, null]}", finetune),
    ("finetune.row.balance=aesthetic", finetune),
]


@pytest.mark.parametrize("before_there_were_any", [False, True])
@pytest.mark.parametrize(("override", "job"), ASKED)
def test_a_cache_without_scores_refuses_to_be_filtered_by_them_and_says_how_to_get_them(
    override, job, before_there_were_any, built, settings, cache
):
    if before_there_were_any:
        index = Path(cache.manifest.uri, INDEX)
        index.write_bytes(to_ipc(cache.index().drop("aesthetic")))
    files = set(built.rglob("*"))
    with pytest.raises(
        UserError, match=r"no clip .* `aesthetic`: .*cache\.aesthetic\.head and cache\.aesthetic\.clip$"
    ):
        job(settings(built, override))
    assert set(built.rglob("*")) == files


def test_an_empty_cache_is_not_blamed_for_lacking_scores(tmp_path, settings, here, ids):
    (tmp_path / "none.csv").write_text(f"videoid,name\n{ids['e0']},x\n")
    made = build_cache(settings(tmp_path, f"catalog.csv={tmp_path}/none.csv"))
    assert len(ClipReader(made, "train", {"aesthetic": (5, None)})) == 0
    assert "aesthetic" not in card(made)


def nan(file: Path) -> Path:
    torch.save({"weight": torch.full((1, 24), torch.nan), "bias": torch.zeros(1)}, file)
    return file


def page(file: Path) -> Path:
    file.write_text("<!DOCTYPE html><html>Sign in</html>")
    return file


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("head", lambda folder: folder / "none.pth", r"^cache\.aesthetic\.head=.*/none\.pth: there is nothing$"),
        ("clip", lambda folder: folder / "none", r"^cache\.aesthetic\.clip=.*/none: there is nothing$"),
        ("head", lambda folder: page(folder / "p.pth"), r"^cache\.aesthetic: .*/p\.pth: a web page"),
        ("head", lambda folder: nan(folder / "n.pth"), r"^cache\.aesthetic: head\.weight holds NaN"),
        (
            "head",
            lambda folder: write_head(folder / "h.pth", 768),
            r"^cache\.aesthetic: .*/clip: embeddings of 24: .*768",
        ),
        ("clip", lambda folder: folder, r"^cache\.aesthetic: .*: no config\.json in it"),
    ],
)
def test_wrong_files_are_one_line_before_anything_starts(name, wrong, said, settings, files, tmp_path):
    given = {**files, name: wrong(tmp_path)}
    config = settings(tmp_path / "out", *(f"cache.aesthetic.{key}={file}" for key, file in given.items()))
    with pytest.raises(UserError, match=said) as error:
        build_cache(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
