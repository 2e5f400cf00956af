import json

import pytest

from pipelines import artifact, storage
from pipelines.artifact import Artifact
from pipelines.errors import UserError

IDENTITY = {"cache": {"stride": 1, "seed": 3}, "code": "abc"}


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "cache")


def finished(uri: str, counts=None, **content):
    made = Artifact(uri, "latent cache", IDENTITY)
    made.begin("{}")
    return made.finish(counts or {}, **content)


def test_without_a_manifest_an_artifact_is_unfinished_and_readers_say_so(uri):
    with pytest.raises(UserError, match=r"does not exist.*jobs\.build_cache"):
        artifact.read_manifest(uri, "latent cache")
    Artifact(uri, "latent cache", IDENTITY).begin("{}")
    with pytest.raises(UserError, match="unfinished"):
        artifact.read_manifest(uri, "latent cache")


def test_a_finished_artifact_is_found_finished_by_the_next_run(uri):
    made = finished(uri, {"clips": 2}, parts=["a"])
    again = Artifact(uri, "latent cache", IDENTITY)
    assert again.finished
    assert again.manifest() == made
    assert made.counts == {"clips": 2}


def test_another_configuration_never_mixes_and_the_field_that_differs_is_named(uri):
    Artifact(uri, "latent cache", IDENTITY).begin("{}")
    with pytest.raises(UserError, match=r"cache\.stride was 1, is 2.*`out`"):
        Artifact(uri, "latent cache", {"cache": {"stride": 2, "seed": 3}, "code": "abc"})


def test_another_kind_of_artifact_is_refused(uri):
    finished(uri)
    with pytest.raises(UserError, match="latent cache, not a videos"):
        Artifact(uri, "videos", IDENTITY)
    with pytest.raises(UserError, match="wanted is a videos"):
        artifact.read_manifest(uri, "videos")


def test_another_schema_version_is_refused(uri):
    finished(uri)
    path = storage.join(uri, "manifest.json")
    body = json.loads(storage.read(path)) | {"schema_version": 99}
    storage.write(path, json.dumps(body).encode())
    with pytest.raises(UserError, match="schema 99"):
        artifact.read_manifest(uri, "latent cache")


def test_the_manifest_says_which_software_made_it(uri):
    finished(uri)
    assert {"torch", "ray", "deepspeed"} <= json.loads(storage.read(storage.join(uri, "manifest.json")))[
        "software"
    ].keys()


def test_the_fingerprint_does_not_depend_on_the_order_of_keys():
    assert artifact.fingerprint({"a": 1, "b": 2}) == artifact.fingerprint({"b": 2, "a": 1})
    assert artifact.fingerprint({"a": 1}) != artifact.fingerprint({"a": 2})


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_manifest_or_plan_is_one_line_that_names_it(uri, text):
    finished(uri)
    for name, look in (("manifest.json", lambda: artifact.read_manifest(uri, "latent cache")),
                       ("plan.json", lambda: Artifact(uri, "latent cache", IDENTITY))):  # fmt: skip
        storage.write(storage.join(uri, name), text)
        with pytest.raises(UserError, match=rf"{name} is (damaged|not one of ours).*run the job") as error:
            look()
        assert "\n" not in str(error.value)


def test_looking_at_an_artifact_that_is_not_begun_leaves_no_trace(uri, tmp_path):
    Artifact(uri, "latent cache", IDENTITY)
    assert list(tmp_path.iterdir()) == []
