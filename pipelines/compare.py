"""The comparison of a study's evaluate runs: a table with intervals, claims put to the test, and one page to look at.

Seeds are paired: the seed s of one row saw the same clips in the same order, with the same noise, as the seed s of
another. So claims are tested on the differences, seed by seed.
"""

from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.config import ClaimConfig, Config
from pipelines.generate import REAL
from pipelines.page import render
from pipelines.study import CONFIDENCE, METRICS, Arm, Verdict, read_arms
from pipelines.tracking import Run

KIND = "comparison"


def compare(config: Config) -> Manifest:
    arms = read_arms(config)
    verdicts = [put_to_the_test(claim, arms) for claim in config.compare.claims]
    fingerprints = {a.name: {s: r.data.tags["cil.fingerprint"] for s, r in a.runs.items()} for a in arms.values()}
    identity = {
        "runs": fingerprints,
        "compare": config.compare.model_dump(),
        "code": artifact.code("pipelines.compare", "pipelines.page", "pipelines.study"),
    }
    name = artifact.fingerprint(identity)  # a study grows: each state of it has a folder of its own
    made = Artifact(storage.join(config.out, "comparison", name), KIND, identity)
    table = markdown(arms, verdicts)
    if not made.finished:
        made.begin(config.model_dump_json(indent=1))
        page = render(config, arms, verdicts)
        storage.write(made.path("table.md"), table.encode())
        storage.write(made.path("index.html"), page.encode())
        run = Run(config, "comparison", "compare", name)
        run.file("comparison.html", page.encode())
        run.file("table.md", table.encode())
        run.finish()
        made.finish({"rows": len(arms)})
    print(f"\n{table}\nThe page: {made.path('index.html')}")
    return made.manifest()


def put_to_the_test(claim: ClaimConfig, arms: dict[str, Arm]) -> Verdict:
    ours, theirs = (arms[name].values(claim.metric) if name in arms else {} for name in (claim.row, claim.against))
    if claim.against == REAL and theirs:  # the same for every seed
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    seeds = sorted(ours.keys() & theirs.keys())
    return Verdict(claim, [ours[s] - theirs[s] for s in seeds])


def markdown(arms: dict[str, Arm], verdicts: list[Verdict]) -> str:
    """For the terminal, and for wherever Markdown goes."""
    rows = [["row", "seeds", *METRICS.values()]]
    for arm in arms.values():
        rows.append([arm.name, str(len(arm.runs)), *(str(arm.estimate(m) or "-") for m in METRICS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    lines += ["", f"Means over seeds, ± half of a {CONFIDENCE:.0%} t-interval.", ""]
    lines += [f"- {v.claim.says}: **{v.word}** ({v.figures})" for v in verdicts]
    return "\n".join(lines) + "\n"
