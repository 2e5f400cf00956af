"""Weights that are not what the configuration says they are: one line, before anything starts."""

import io
import os
from pathlib import Path

import pytest
import torch
from published import write_published

from cil.checkpoints import digest
from pipelines.artifact import Artifact
from pipelines.config import load
from pipelines.errors import UserError
from pipelines.models import encoder_of, family_of
from pipelines.weights import fingerprint_of


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_published("videocrafter1", tmp_path_factory.mktemp("published"))


def config_of(weights: Path, *overrides: str):
    size = ("family.preset=tiny", "family.frames=4", "family.height=32", "family.width=48")
    return load(None, ["family.name=videocrafter1", f"family.weights={weights}", *size, *overrides])


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def bomb(_: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": Bomb()}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda whole: whole[: len(whole) // 2], "damaged or truncated"),
        (lambda whole: b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (bomb, "nothing but tensors is ever loaded"),
        (lambda whole: b"", "empty"),
    ],
)
def test_a_file_that_is_no_weights_is_named_for_what_it_is_and_never_run(
    content, said, published, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.ckpt"
    file.write_bytes(content(published.read_bytes()))
    with pytest.raises(UserError, match=rf"family: .*model.ckpt: .*{said}") as error:
        encoder_of(family_of(config_of(file)))
    assert "\n" not in str(error.value)
    assert not Path("exploded").exists()


def test_another_familys_file_is_named(published):
    config = config_of(published, "family.name=dynamicrafter")
    with pytest.raises(UserError, match=r"not the weights of dynamicrafter: .*looks like videocrafter1"):
        encoder_of(family_of(config))


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.ckpt"):
        encoder_of(family_of(config_of(tmp_path / "none.ckpt")))


def test_the_published_weights_have_a_fingerprint_that_is_their_values(published, tmp_path):
    config = config_of(published)
    family = family_of(config)
    assert fingerprint_of(config, family, "published") == digest(family.restore(published))
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(published.read_bytes())
    assert fingerprint_of(config, family, str(copy)) == fingerprint_of(config, family, "published")
    other = write_published("videocrafter1", tmp_path / "other", seed=4)
    assert fingerprint_of(config, family, str(other)) != fingerprint_of(config, family, "published")


def test_weights_at_a_uri_where_nothing_is_or_that_are_unfinished_are_refused(published, tmp_path):
    config = config_of(published)
    family = family_of(config)
    with pytest.raises(
        UserError, match=r"none: there is nothing; expected weights of jobs.finetune, or published ones"
    ):
        fingerprint_of(config, family, str(tmp_path / "none"))
    Artifact(str(tmp_path / "begun"), "weights", {"family": {}}).begin("{}")
    with pytest.raises(UserError, match=r"begun is unfinished: run the job that makes it"):
        fingerprint_of(config, family, str(tmp_path / "begun"))


def test_a_row_may_be_the_published_weights_only_where_they_are_named():
    with pytest.raises(UserError, match=r"generate.rows.a.weights=published: family.weights names none"):
        load(None, ["generate.rows={a: {weights: published}}"])
    with pytest.raises(UserError, match="'published' is no name for a row"):
        load(None, ["finetune.rows={published: {}}"])
