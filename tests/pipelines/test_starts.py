"""Where sampling may start is for the family's process to say."""

import pytest

from pipelines.config import load
from pipelines.errors import UserError
from pipelines.generate import refuse_impossible_rows

TINY = ("family.preset=tiny", "family.frames=4", "generate.steps=5")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["generate.rows.next.M=1001"], r"generate\.rows\.next, .*M=1001\.0: an integer in 1\.\.1000"),
        (["generate.rows.next.M=940.5"], r"M=940\.5: an integer"),
        (["generate.rows.next.M=4"], r"steps=5: from M=4 there are 1\.\.4"),
        (["family.name=svd", "generate.rows.next.M=940"], r"M=940\.0: a sigma in 0\.002\.\.700"),
    ],
)
def test_a_start_that_the_process_does_not_have_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        refuse_impossible_rows(load(None, [*TINY, *settings]))


@pytest.mark.parametrize("name", ["toy", "dynamicrafter", "videocrafter1", "svd"])
def test_without_an_M_every_family_starts_at_the_end_of_its_process(name):
    refuse_impossible_rows(load(None, [*TINY, f"family.name={name}", "generate.rows.next.guidance=1"]))
    M = 100 if name == "svd" else 940
    refuse_impossible_rows(load(None, [*TINY, f"family.name={name}", f"generate.rows.next.M={M}"]))
