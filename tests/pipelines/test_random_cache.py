from benchmarks.random_cache import VIEWS, written
from pipelines.reader import ClipReader


def test_a_cache_of_random_numbers_is_read_like_any_other(tmp_path):
    clips = ClipReader(written(str(tmp_path), 3), "train", {})
    assert len(clips) == 3 * VIEWS
    assert sorted(clips.batch([0, 1])) == ["frame", "latents", "text"]
