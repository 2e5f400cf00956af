"""A worker's part, when several runs make the same ones."""

from pathlib import Path

import pytest

from pipelines.parts import Made, _PartWriter


@pytest.mark.parametrize("faster", [True, False])
def test_what_a_run_that_is_finished_took_away_is_missed_by_nobody_whose_part_is_there(tmp_path, faster):
    part = {"uri": f"{tmp_path}/part", "plan": None, "size": 3}

    def made(_: object) -> Made:
        if faster:
            Path(part["uri"]).write_bytes(b"by another run, which is finished and tidies up")
        raise FileNotFoundError("the rows")

    told = _PartWriter(lambda: made, {})(part)
    assert bool(told["failed"]) is not faster
    assert told["lasting"] is not faster
    assert told["size"] == 3
