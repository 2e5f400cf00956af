"""Secrets in addresses, in the environment and in configurations: none of them is written or said anywhere."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from pipelines import storage, tracking
from pipelines.catalog import read_catalog
from pipelines.config import CatalogConfig, load
from pipelines.errors import Unfinished, UserError, shown
from pipelines.images import read_images
from pipelines.secrets import redacted, tells_secret

ROOT = Path(__file__).parents[2]
SECRET = "hunter2hunter2"
TOLD = [
    f"s3://key:{SECRET}@bucket/videos",
    f"s3://{SECRET}@bucket/videos",
    f"s3://bucket/videos?X-Amz-Credential=key&X-Amz-Signature={SECRET}",
    f"https://mlflow.example.org/?token={SECRET}",
    f"postgresql://me:{SECRET}@host/db",
    f"https://host/#access_token={SECRET}",
]
PLACES = [
    *("out", "catalog.csv", "catalog.videos", "family.weights", "generate.images", "generate.initial_noise"),
    *("score.fvd", "score.reference", "tracking.uri", "tracking.experiment", "compare.note", "compare.filter"),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("uri", TOLD)
def test_a_configuration_that_holds_a_secret_is_refused_wherever_it_stands_and_not_repeated(place, uri, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({place.split(".")[0]: uri}))
    for given in ((None, [f"{place}={uri}"]), (None, [f"{place}=[x, '{uri}']"]), (tmp_path / "c.yaml", [])):
        with pytest.raises(UserError, match=r"holds a password: give") as refused:
            load(*given)
        assert SECRET not in str(refused.value)
    rows = f"{{a: {{weights: '{uri}'}}}}"
    with pytest.raises(UserError, match=r"finetune\.rows\.a\.weights holds a password"):
        load(None, [f"finetune.rows={rows}"])


@pytest.mark.parametrize("uri", TOLD)
def test_whatever_is_said_of_a_secret_does_not_repeat_it(uri):
    for said in (redacted(f"cannot read {uri}: refused"), shown(f"'{uri}'"), str(UserError(uri)), str(Unfinished(uri))):
        if "#" not in uri:  # browsers alone send what is behind it
            assert SECRET not in said
    assert tells_secret(f"see {uri}, please")
    assert str(pickle.loads(pickle.dumps(UserError(uri)))) == str(UserError(uri))  # as from a worker


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/a/b.mp4", "/data/a@b/c?d=e", "https://youtube.com/watch?v=dQw4w9WgXcQ", "me@example.org"),
        *(
            "postgresql://h/db?sslmode=require&sslkey=/a.key",
            "http://[",
            "a: b // c",
            "sqlite:////a/mlflow.db?timeout=5",
        ),
    ],
)
def test_what_is_no_secret_is_none(text):
    assert not tells_secret(text)
    if "?" not in text or "://" not in text:
        assert redacted(text) == text


OTHERS = ("ENCRYPTION_KEY", "AWS_ACCESS_KEY_ID", "SSH_PASSPHRASE", "REDISCLI_AUTH", "DB_PWD_OF_US")


def test_secrets_of_the_environment_are_not_said_whoever_quotes_them(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_API_KEY", "HF_TOKEN", "PGPASSWORD", *OTHERS):
        with monkeypatch.context() as patch:
            patch.setenv(name, SECRET)
            assert SECRET not in str(UserError(f"the server said: {SECRET}!"))
            assert SECRET not in tracking._one_line(RuntimeError(f"401 for {SECRET}"))
    monkeypatch.setenv("A_TOKEN", "short")  # would be found in innocent words
    monkeypatch.setenv("PWD", "/some/where")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert shown("a short way to /some/where is disabled") == "a short way to /some/where is disabled"


def test_a_defect_of_ours_quotes_no_secret():
    """Whatever raises it, through the command that every job is."""
    program = (
        "import sys; from pipelines.command import command; sys.argv = ['x']\n"
        "def run(config): raise ZeroDivisionError('of s3://key:hunter2hunter2@b and a-secret-of-the-environment')\n"
        "command('x', 'about', (), run)"
    )
    given = os.environ | {"AWS_SECRET_ACCESS_KEY": "a-secret-of-the-environment"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError: of s3://b and ..." in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert "a-secret-of-the-environment" not in done.stdout + done.stderr


def test_a_signed_link_in_a_csv_or_a_json_is_cached_without_its_signature(tmp_path):
    signed, plain = f"https://h/1.mp4?X-Amz-Signature={SECRET}", "https://youtube.com/watch?v=dQw4w9WgXcQ"
    (tmp_path / "v.csv").write_text(f"videoid,name,contentUrl\na,c,{signed}\nb,c,{plain}\n")
    videos = read_catalog(CatalogConfig(csv=f"{tmp_path}/v.csv", videos=str(tmp_path)), "").videos(0, 2)
    assert [json.loads(video.extra)["contentUrl"] for video in videos] == ["https://h/1.mp4?...", plain]
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"a.mp4": b"video", "a.json": json.dumps({"url": signed, "caption": "c"}).encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (video,) = read_catalog(CatalogConfig(tars=f"{tmp_path}/a.tar"), "").videos(0, 1)
    assert json.loads(video.extra) == {"caption": "c", "url": "https://h/1.mp4?..."}


def test_a_row_of_a_table_of_images_with_a_secret_is_rejected_without_it(tmp_path):
    (tmp_path / "t.csv").write_text(f"image\ns3://key:{SECRET}@bucket/a.png\ns3://b/c.png?X-Amz-Signature={SECRET}\n")
    found = read_images(f"{tmp_path}/t.csv")
    assert [picture.problem for picture in found] == ["unsafe_name"] * 2
    assert not any(SECRET in shown(picture.name) for picture in found)
    assert not any(SECRET in picture.id for picture in found)


def test_no_secret_of_s3_is_in_an_error_of_it(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-nobody-may-see")
    for uri in ("s3://no-such-bucket/a", "s3://webvid/none"):
        with pytest.raises(OSError) as failed:  # noqa: PT011
            storage.read(uri)
        assert "a-secret-nobody-may-see" not in repr(failed.value)


def test_a_password_in_the_endpoint_of_a_store_is_in_no_error_of_it(monkeypatch):
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    monkeypatch.setitem(storage.S3_LIMITS, "retries", {"total_max_attempts": 1})
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:9/?token={SECRET}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    with pytest.raises(OSError, match=r"s3://bucket/a: .*127\.0\.0\.1:9") as failed:
        storage.read("s3://bucket/a")
    s3.clear_instance_cache()
    assert SECRET not in str(failed.value)


@pytest.mark.slow  # makes an MLflow store
def test_what_is_told_to_mlflow_has_the_experiments_name_as_it_is_and_no_secret(tmp_path, monkeypatch):
    """Quotes, formulas and escape sequences in a name do nothing; a store keeps nothing of the environment."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    name = "a' OR 1=1 --; $(touch ran) `touch ran` <script>x</script> =1+1"
    config = load(None, [f"out={tmp_path}/out", f"tracking.experiment={json.dumps(name)}"])
    monkeypatch.chdir(tmp_path)
    run = tracking.Run(config, "row", "train", "fingerprint")
    run.parameters({"a": {"b": "$(touch ran)"}})
    run.tags({"uri": "s3://bucket"})
    run.file("config.json", config.model_dump_json().encode())
    run.finish()
    assert tracking.Run(config, "row", "train", "fingerprint").id == run.id
    (found,) = tracking.runs(config, "train")
    assert found.data.params == {"a.b": "$(touch ran)"}
    assert not (tmp_path / "ran").exists()
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()


def test_an_address_that_is_none_is_one_line(tmp_path):
    for uri in ("http://[", "http://h:99999"):
        with pytest.raises(UserError, match=r"tracking\.uri=.*is no address"):
            tracking.refuse_unreachable(load(None, [f"out={tmp_path}", f"tracking.uri={json.dumps(uri)}"]))
