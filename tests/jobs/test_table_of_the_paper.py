"""docs/evaluation.md's road to the paper's table 1: its commands, on the file that it tells to copy, at a tiny size."""

import re
import shlex
from pathlib import Path

import pytest
from in_process import run_job
from PIL import Image
from published import C3D, I3D, saved, told_of, write_published
from test_recipe_files import FOLDER, KINDS

from cil import families
from pipelines.config import load
from pipelines.make_shapes import make_shapes
from pipelines.tracking import runs
from pipelines.video import decode_all

ROOT = Path(__file__).parents[2]
ROAD = (ROOT / "docs/evaluation.md").read_text().partition("## The paper's table 1")[2]
TINY = (
    *("family.preset=tiny", "family.frames=16", "family.height=32", "family.width=48", "family.tokenizer=null"),
    *("family.latents=mean_std", "family.clip_features=true", "family.token_noise=true"),
    *("cache.gpus=0", "cache.stride=[1, 2]", "cache.validation=0.2", "cache.test=0.2", "cache.videos_per_part=24"),
    # bfloat16 is emulated by CPUs that have none (docs/log.md).
    *("family.precision=float32", "finetune.row.precision=float32", "score.feature_steps=2"),
    *("finetune.workers=1", "finetune.row.samples=8", "finetune.row.batch=4", "finetune.log_every=4"),
    *("finetune.checkpoint_every=8", "finetune.validate_every=8", "finetune.micro_batch=4"),
    "finetune.validation={clips: 1, samples: 1, steps: 2}",
    *("generate.steps=2", "generate.reference=4", "generate.clips_per_part=2", "score.leakage=2", "score.bootstrap=20"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("one_cpu"),
]


def block(kind: str) -> str:
    return re.findall(rf"```{kind}\n(.*?)```", ROAD, re.DOTALL)[0]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """table1.yaml as the page says, with the files that it names."""
    folder = tmp_path_factory.mktemp("table")
    shapes = ["shapes.videos=24", "shapes.damaged=0", "shapes.frames=48", "shapes.moving=0.5"]
    make_shapes(load(None, [f"out={folder}", *shapes]))
    videos = sorted((folder / "shapes/videos").rglob("*.mp4"))
    (folder / "images").mkdir()
    for path in videos[:3]:
        Image.fromarray(decode_all(path.read_bytes())[0].numpy()).save(folder / f"images/{path.stem}.png")
        (folder / f"images/{path.stem}.txt").write_text("a disc")
    named = {
        "/models/dynamicrafter_512.ckpt": write_published("dynamicrafter", folder / "published", frames=16),
        "/data/webvid/*.csv": folder / "shapes/videos.csv",
        "/data/webvid/videos": folder / "shapes/videos",
        "/data/ucf101/images": folder / "images",
        "/data/ucf101/videos": folder / "shapes/videos",
        "/models/i3d_torchscript.pt": saved(I3D(), folder / "i3d.pt"),
        "/models/c3d_ucf101.pt": saved(C3D(), folder / "c3d.pt"),
    }
    text = (FOLDER / "dynamicrafter.yaml").read_text()
    text = re.sub(r"^( *)# ((?:weights|catalog|before): )", r"\1\2", text, flags=re.MULTILINE)
    generate, _, score = block("yaml").partition("score:\n")
    text = text.replace("generate:\n", generate) + "score:\n" + score
    for theirs, ours in named.items():
        assert theirs in text
        text = text.replace(theirs, str(ours))
    (folder / "table1.yaml").write_text(text)
    return folder


@pytest.mark.timeout(900)
def test_the_commands_make_the_table(study, monkeypatch, capsys):
    monkeypatch.chdir(study)
    overrides, told = [f"out={study}/out", *TINY], ""
    for line in block("sh").splitlines():
        job, arguments = re.fullmatch(r"python -m jobs\.(\w+) (.*)", line).groups()
        run_job(job, *shlex.split(arguments), *overrides)
        told = capsys.readouterr().out
    config = load(study / "table1.yaml", overrides)
    for arm in config.arms():
        assert re.search(rf"^\| {re.escape(arm)} +\|", told, re.MULTILINE), told
    assert {"before", *KINDS, "naive+analytic-init", "timenoise+analytic-init"} == config.arms().keys()

    # The published weights were trained, and nothing depends on where they were.
    family = families.load("dynamicrafter", 16, 32, 48, weights=str(config.family.weights))
    before, after = (
        family.restore(Path(config.family.weights)),
        family.restore(Path(config.out, "weights/timenoise/raw")),
    )
    assert before.keys() == after.keys()
    assert 0 < max(float((after[key] - before[key]).abs().max()) for key in before) < 1e-3
    assert told_of(Path(config.family.weights), config) == []

    # Rows of the training that differ in one word, and have all that is told of a training.
    trained = {run.info.run_name: run.data for run in runs(config, "train")}
    kind = "row.conditioning.kind"
    assert {arm: data.params[kind] for arm, data in trained.items()} == KINDS
    others = [{key: value for key, value in data.params.items() if key != kind} for data in trained.values()]
    assert all(other == others[0] for other in others)
    assert all(
        {"loss", "validation/loss", "validation/motion_true"} <= data.metrics.keys() for data in trained.values()
    )
    losses = [data.metrics["loss"] for data in trained.values()]
    assert len(set(losses)) == len(losses)

    # Rows of the table, with what table 1 has, and what leaks.
    evaluated = {run.info.run_name: run.data for run in runs(config, "evaluate")}
    assert evaluated.keys() == config.arms().keys()
    for arm, data in evaluated.items():
        assert {"fvd", "fvd_low", "fvd_high", "is", "motion", "leakage", "psnr"} <= data.metrics.keys(), arm
        assert data.metrics["videos"] == 3
        assert "3 videos, where published figures are of 2,048" in data.tags["cil.too_small"]
    assert evaluated["timenoise+analytic-init"].params["row.M"] == "940.0"
    assert evaluated["timenoise"].params["train.conditioning.kind"] == "timenoise"
