"""The comparison of evaluate runs: a table with intervals, claims put to the test, and one page to look at.

Seeds are paired: the seed s of one row saw the same clips in the same order, with the same noise, as the seed s of
another. So claims are tested on the differences, seed by seed.
"""

import contextlib
from typing import Any

from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.config import Config
from pipelines.page import TEMPLATE, render
from pipelines.study import Study, put_to_the_test, read_study
from pipelines.table import as_csv, markdown, tabulate
from pipelines.tracking import Run, answering

KIND = "comparison"
HEADLINES = {"motion", "motion_error", "speed", "static_share", "first_frame_error", "leakage", "frechet", "fvd", "is"}
CODE = ("compare", "page", "plots", "side_by_side", "study", "table")


def compare(config: Config) -> Manifest:
    study = read_study(config)
    verdicts = [put_to_the_test(claim, study.arms) for claim in config.compare.claims]
    identity = {
        "runs": _state(study),
        "notes": study.notes,
        "compare": config.compare.model_dump(),
        "code": artifact.code(*(f"pipelines.{module}" for module in CODE), "cil.metrics.paired"),
        "template": artifact.fingerprint(TEMPLATE.read_text()),
    }
    name = artifact.fingerprint(identity)  # a study grows: each state of it has a folder of its own
    made = Artifact(storage.join(config.out, "comparison", name), KIND, identity)
    columns = tabulate(study)
    table = markdown(study, columns, verdicts)
    if not made.finished:
        made.begin(config.model_dump_json(indent=1))
        with answering(config):
            files = {"index.html": render(config, study, columns, verdicts), "table.md": table}
            files["table.csv"] = as_csv(study, columns)
            of_study = {"tracking": config.tracking.model_copy(update={"experiment": study.name})}
            run = Run(config.model_copy(update=of_study), "comparison", "compare", name)
            for file, text in files.items():
                storage.write(made.path(file), text.encode())
                run.file("comparison.html" if file == "index.html" else file, text.encode())
            run.finish()
        made.finish({"rows": len(study.arms)})
    shown = [column for column in columns if column.name in HEADLINES] or columns
    print(f"\n{markdown(study, shown, verdicts)}\nAll {len(columns)} metrics: {made.path('table.md')}")
    print(f"The page: {made.path('index.html')}")
    return made.manifest()


def _videos_there(run: Any) -> bool:
    """Whether its videos can be read from here, now."""
    with contextlib.suppress(OSError, ValueError, ImportError):
        return storage.exists(run.data.tags.get("cil.videos", ""))
    return False


def _state(study: Study) -> dict[str, dict[int, list[str | bool]]]:
    """Of each row its runs, each with what it says: somebody may log more to it."""
    return {
        arm.name: {
            seed: [
                run.info.run_id,
                artifact.fingerprint([run.data.metrics, run.data.params, arm.videos[seed]]),
                _videos_there(run),
            ]
            for seed, run in sorted(arm.runs.items())
        }
        for arm in study.arms.values()
    }
