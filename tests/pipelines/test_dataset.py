"""A cache read by others, as docs/cache.md says."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipelines import cluster
from pipelines.dataset import _Clips, dataset
from pipelines.reader import ClipReader

ROOT = Path(__file__).parents[2]


def assert_like(rows: dict[str, np.ndarray], reader: ClipReader) -> None:
    """Every clip of the reader, in any order."""
    order = np.argsort(rows["clip_id"])
    batch = reader.batch(range(len(reader)))
    assert rows.keys() == {*batch, *reader.index.column_names} - {"part", "row", "place"}
    assert rows["clip_id"][order].tolist() == [reader.known(i)["clip_id"] for i in range(len(reader))]
    assert rows["split"][order].tolist() == [reader.known(i)["split"] for i in range(len(reader))]
    for name, tensor in batch.items():
        assert rows[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(rows[name][order], tensor.numpy())


def test_a_batch_has_what_is_known_of_its_clips_and_their_tensors(cache):
    reader = ClipReader(cache, None)
    assert_like(_Clips(cache, None, None)({"id": np.arange(len(reader))}), reader)


@pytest.mark.slow
def test_the_examples_of_the_page_run_as_they_stand(built, settings, cache, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/cache.md").read_text(), flags=re.DOTALL)
    (study,) = re.findall(r'load\("([^"]*)"\)', example)
    (part,) = re.findall(r'"(outputs/.*\.arrow)"', example)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, "outputs/study")
    shutil.copy(cache.path(cache.parts[0]["name"]), part)
    described = settings(built).model_dump(mode="json") | {"out": "outputs/study"}
    Path(study).write_text(yaml.safe_dump(described))
    cluster.connect()
    names = {}
    exec(example, names)
    assert len(names["part"]) == cache.parts[0]["clips"]
    latents = ClipReader(cache, None).batch([0])["latents"]
    first = names["part"][names["part"]["clip_id"] == ClipReader(cache, None).known(0)["clip_id"]].iloc[0]
    assert first["latents"] == latents.numpy().tobytes()
    assert_like(names["clips"].take_batch(100), ClipReader(cache, "train"))
    low = float(np.median(ClipReader(cache, "train").values("motion")))
    some = {"motion": (low, None)}
    assert_like(dataset(cache, "train", some).take_batch(100), ClipReader(cache, "train", some))
