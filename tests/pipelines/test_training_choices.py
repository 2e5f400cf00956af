"""What may be chosen of a training, on real ranks with real DeepSpeed: looks at held-out clips, what is trained."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient
from PIL import Image
from ranks import attempts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cil import CleanCondition, Draws, Objective, families
from cil.trainable import freeze, merged
from pipelines import checkpoints
from pipelines.cache import read_cache
from pipelines.checkpoints import Stored, training_of
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.export import export
from pipelines.models import family_of
from pipelines.tracking import runs, store_uri
from pipelines.validation import Validation
from pipelines.video import decode_all
from pipelines.weights import plan_weights, read_weights

pytestmark = pytest.mark.slow

ROW = (
    *("finetune.row.batch=8", "finetune.row.samples=32", "finetune.row.warmup=8", "finetune.row.lr=1e-2"),
    *("finetune.log_every=8", "finetune.checkpoint_every=8", "finetune.keep=9", "finetune.row.ema=0.5"),
)
VALIDATED = (
    *("finetune.validate_every=16", "finetune.validation.clips=2"),
    *("finetune.validation.samples=2", "finetune.validation.steps=2"),
)
SLOW = "finetune.row.lr=5e-5"  # Adam makes much of what is nearly nothing: a tenth of this
SHARED = str(Path(__file__).parents[1] / "zero-3-nothing-whole.json")  # as of a network that is not tiny
TRAINED = ("temporal", "lora", "unet")
JOBS = {
    "plain": ("zero-1",),
    "looked": ("zero-1", *VALIDATED),
    "plain-3": (SHARED,),
    "looked-3": (SHARED, *VALIDATED),
    "slow": ("zero-1", SLOW),
    "in parts": ("zero-2", SLOW, "finetune.micro_batch=2"),
    "in parts-0": ("zero-0", SLOW, "finetune.micro_batch=1"),
    "best": ("zero-1", *VALIDATED, "finetune.validate_every=8", "finetune.keep=1", "finetune.row.lr=0.3"),
    "low": ("zero-1", "finetune.row.precision=bfloat16", *VALIDATED),
    "low plain": ("zero-1", "finetune.row.precision=bfloat16"),
    "low and still": ("zero-1", "finetune.row.precision=bfloat16", "finetune.row.lr=1e-30", "finetune.row.samples=8"),
} | {f"{trained}": ("zero-2", f"finetune.row.train={trained}", "finetune.row.rank=3") for trained in TRAINED}


@pytest.fixture(scope="module")
def configured(settings, _built, tmp_path_factory) -> Callable[..., Config]:
    """configured(experiment, "key=value", ...) -> a configuration of the same cache, with a folder of its own."""
    store = tmp_path_factory.mktemp("store")

    def of(experiment: str, *overrides: str) -> Config:
        out = tmp_path_factory.mktemp("training")
        (out / "cache").symlink_to(_built / "cache")
        tracked = (f"tracking.uri=sqlite:///{store}/mlflow.db", f"tracking.experiment={experiment}")
        return settings(out, *ROW, *tracked, *overrides)

    return of


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Path:
    """Weights to begin with: of a new network the last layer is nothing, and no gradient comes past it."""
    state = families.load("toy", preset="tiny").network(0).state_dict()
    state["head.weight"] = torch.randn(state["head.weight"].shape, generator=torch.Generator().manual_seed(0)) / 8
    file = tmp_path_factory.mktemp("begin") / "toy.safetensors"
    safetensors.torch.save_file(state, file)
    return file


@pytest.fixture(scope="module")
def trained(configured, begin) -> dict[str, Config]:
    configs = {name: configured(name, f"finetune.row.weights={begin}", *own) for name, (_, *own) in JOBS.items()}
    made = attempts(2, [(configs[name].model_dump(), JOBS[name][0]) for name in JOBS])
    assert [attempt.error for attempt in made] == [""] * len(JOBS)
    return configs


def weights(config: Config, kind: str = "raw") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(config.out, "weights/base", kind, "toy.safetensors"))


def furthest(a: Config, b: Config) -> float:
    return max(
        float((x - weights(b, kind)[n]).abs().max()) for kind in ("raw", "ema") for n, x in weights(a, kind).items()
    )


def folder_of(config: Config) -> str:
    made = plan_weights(config, family_of(config), "base", config.training_rows()["base"], read_cache(config), {})
    return training_of(config, "base", made)


def curves(config: Config) -> dict[str, list[tuple[int, float]]]:
    client, (run,) = MlflowClient(store_uri(config)), runs(config, "train")
    return {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }


@pytest.mark.parametrize(("plain", "looked"), [("plain", "looked"), ("plain-3", "looked-3"), ("low plain", "low")])
def test_looking_at_held_out_clips_changes_no_bit_of_the_training(trained, plain, looked):
    assert furthest(trained[plain], trained[looked]) == 0
    losses = [curves(trained[name])["loss"] for name in (plain, looked)]
    assert losses[0] == losses[1]


def test_in_bfloat16_a_training_begins_with_the_weights_as_they_are(trained, begin):
    began = safetensors.torch.load_file(begin)
    assert any((tensor != tensor.bfloat16()).any() for tensor in began.values())
    for kind in ("raw", "ema"):
        for name, tensor in weights(trained["low and still"], kind).items():
            torch.testing.assert_close(tensor, began[name], rtol=0, atol=1e-28)


def test_a_row_has_the_digests_of_its_files(trained):
    config = trained["plain"]
    for name, digest in read_weights(config, "base").content["files"].items():
        assert hashlib.sha256(Path(config.out, "weights/base", name).read_bytes()).hexdigest() == digest


def test_every_look_is_a_point_of_each_figure_and_zero_3_sees_the_same(trained):
    found, others = (
        {name: curve for name, curve in curves(trained[job]).items() if name.startswith("validation/")}
        for job in ("looked", "looked-3")
    )
    kinds = Counter(name.split("_t")[0] for name in found)
    assert kinds == {f"validation/{k}": n for k, n in (("loss", 11), ("motion", 11), ("seconds", 1))}
    assert {tuple(step for step, _ in curve) for curve in found.values()} == {(16, 32)}
    for name in found.keys() - {"validation/seconds"}:
        assert others[name] == [(step, pytest.approx(value, abs=1e-3)) for step, value in found[name]], name


@pytest.mark.parametrize(("job", "together"), [("plain", 4), ("plain-3", 4), ("in parts", 2), ("low", 4)])
def test_the_arithmetic_of_a_rank_and_its_machine_are_points_of_the_curve(trained, job, together):
    found, family = curves(trained[job]), families.load("toy", frames=2, height=16, width=16)
    batch = family.encode(torch.zeros(together, 2, 16, 16, 3, dtype=torch.uint8))
    net, counter = family.network(0), FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # attention as plain products
        Objective()(family, net, batch, Draws([(0, k) for k in range(together)]))
    for (_, tflops), (_, rate) in zip(found["tflops"], found["samples_per_second"], strict=True):
        assert tflops * 1e12 == pytest.approx(rate / 2 * 3 * counter.get_total_flops() / together)
    assert [step for step, _ in found["system/cpu_utilization_percentage"]] == [8, 16, 24, 32]
    assert "mfu" not in found  # of a CPU nobody says what it can do


def test_sampled_clips_are_files_to_look_at(trained):
    client, (run,) = MlflowClient(store_uri(trained["looked"])), runs(trained["looked"], "train")
    for step in ("000000016", "000000032"):
        folder = Path(client.download_artifacts(run.info.run_id, f"validation/{step}"))
        assert {file.name for file in folder.iterdir()} == {"sheet.png", "0.mp4", "1.mp4"}
        assert decode_all((folder / "1.mp4").read_bytes()).shape == (2, 16, 16, 3)
        assert Image.open(io.BytesIO((folder / "sheet.png").read_bytes())).size == (3 * 16, 2 * 16)


def test_what_is_looked_at_are_the_averaged_weights_and_one_process_sees_what_two_ranks_saw(trained):
    config = trained["looked"]
    family, stored = family_of(config), Stored(checkpoints.found(folder_of(config))[-1])
    validation = Validation(config, family, read_cache(config))
    assert len(validation.numbers) == 2
    figures = {}
    for kind in ("average", "weights"):
        net = family.network(0, dict(stored.of(kind)))
        with torch.no_grad():
            found = sum(validation.measured(net, number, torch.device("cpu")) for number in validation.numbers)
        figures[kind] = (found[:2] / found[2]).tolist()
    told = {
        name.removeprefix("validation/"): dict(curve)[32] for name, curve in curves(config).items() if "val" in name
    }
    for k, time in enumerate(family.process.unit_time(validation.times).tolist()):
        for i, name in enumerate(("loss", "motion")):
            assert told[f"{name}_t{1000 * time:03.0f}"] == pytest.approx(figures["average"][i][k], abs=1e-5)
    assert told["motion_true"] == pytest.approx(figures["average"][1][-1], abs=1e-5)
    assert told["loss"] == pytest.approx(np.mean(figures["average"][0][:-1]), rel=1e-5)
    assert told["loss"] != pytest.approx(np.mean(figures["weights"][0][:-1]), rel=1e-3)
    assert told["loss"] == stored.told["validation_loss"]


@pytest.mark.parametrize("name", ["in parts", "in parts-0"])
def test_a_batch_in_parts_gives_the_weights_of_a_whole_one(trained, name):
    assert furthest(trained["slow"], trained[name]) < 1e-5
    whole, parts = (Stored(checkpoints.found(folder_of(trained[each]))[0], "exp_avg") for each in ("slow", name))
    assert max(float((parts[each] - gradient).abs().max()) for each, gradient in whole.items()) < 1e-6
    pairs = zip(curves(trained["slow"])["gradient_norm"], curves(trained[name])["gradient_norm"], strict=True)
    assert all(a[1] == pytest.approx(b[1], rel=1e-4) for a, b in pairs)


@pytest.mark.parametrize("kind", TRAINED)
def test_only_what_is_to_be_trained_moves_and_the_names_are_the_published_ones(trained, begin, kind):
    config = trained[kind]
    before, after = safetensors.torch.load_file(begin), weights(config)
    assert before.keys() == after.keys() == weights(config, "ema").keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {f"{block}.{layer}.weight" for block in BLOCKS for layer in ("qkv", "out")}
    wanted = {
        "temporal": {name for name in before if name.startswith(("fine_in_attention.", "fine_out_attention."))},
        "lora": attention,
        "unet": set(before),
    }
    assert moved == wanted[kind]


BLOCKS = ("fine_in_attention", "coarse_attention", "fine_out_attention")


def test_adapters_of_a_rank_are_what_is_stored_and_they_are_added_to_the_weights(trained, begin):
    stored = Stored(checkpoints.found(folder_of(trained["lora"]))[-1])
    assert {len(stored[name]) if "lora_A" in name else stored[name].shape[1] for name in stored} == {3}
    assert all("lora_" in name for name in stored)
    change = weights(trained["lora"])["coarse_attention.qkv.weight"]
    change = change - safetensors.torch.load_file(begin)["coarse_attention.qkv.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 3


def test_the_newest_checkpoints_are_kept_and_the_best_one(trained):
    there = [int(Path(folder).name) for folder in checkpoints.found(folder_of(trained["best"]))]
    losses = dict(curves(trained["best"])["validation/loss"])
    best = min(losses, key=losses.__getitem__)
    assert best != 32  # the learning rate is so high that it gets worse
    assert there == [best, 32]
    assert [int(Path(f).name) for f in checkpoints.found(folder_of(trained["plain"]))] == [8, 16, 24, 32]


def exported(config: Config, checkpoint: str) -> Path:
    dumped = config.model_dump()
    dumped["export"]["checkpoint"] = int(checkpoint) if checkpoint.isdigit() else checkpoint
    return Path(export(Config.model_validate(dumped)).uri)


def test_every_checkpoint_can_be_exported(trained, capsys):
    config = trained["best"]
    losses = dict(curves(config)["validation/loss"])
    last, best = exported(config, "last"), exported(config, "best")
    assert (last.name, best.name) == ("000000032", f"{min(losses, key=losses.__getitem__):09d}")
    for kind in ("raw", "ema"):
        file = f"{kind}/toy.safetensors"
        assert (last / file).read_bytes() == Path(config.out, "weights/base", file).read_bytes()
        assert (best / file).read_bytes() != (last / file).read_bytes()
    assert exported(config, str(int(best.name))) == best
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert read_weights(config, str(best)).counts["samples"] == int(best.name)


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(trained):
    with pytest.raises(
        UserError, match=r"export\.checkpoint=9: .*/training/base-\w{8} has 8, 16, 24, 32; `best` needs"
    ):
        exported(trained["plain"], "9")
    with pytest.raises(UserError, match=r"export\.checkpoint=best: .* needs finetune\.validate_every"):
        exported(trained["plain"], "best")
    dumped = trained["plain"].model_dump()
    dumped["export"]["row"] = "other"
    with pytest.raises(UserError, match=r"export\.row=other: one of base"):
        export(Config.model_validate(dumped))


def test_the_run_says_which_commit_it_was_and_the_memory_of_every_rank(trained):
    (run,) = runs(trained["plain"], "train")
    assert len(run.data.tags["cil.commit"].removesuffix("-dirty")) == 40
    found = curves(trained["plain"])
    for rank in (0, 1):
        assert [step for step, _ in found[f"memory_gib_rank{rank}"]] == [8, 16, 24, 32]
        assert all(0.05 < gib < 8 for _, gib in found[f"memory_gib_rank{rank}"])


# DynamiCrafter, whose networks have a projector and temporal layers


@pytest.fixture(scope="module")
def crafter():
    return families.load("dynamicrafter", 2, 32, 32)


@pytest.fixture
def answer(crafter) -> Callable[..., torch.Tensor]:
    """answer(net) -> what it says of fixed inputs."""
    torch.manual_seed(0)
    frames = torch.randint(0, 255, (1, crafter.frames, crafter.height, crafter.width, 3), dtype=torch.uint8)
    x = torch.randn(1, *crafter.latent_shape)
    condition, _ = crafter.condition(crafter.encode(frames), CleanCondition(), torch.zeros(1), None)
    return lambda net: crafter.denoise(net, x, torch.tensor([500]), condition)


def shaken(crafter) -> torch.nn.Module:
    """Without the zeros of a new network, past which no gradient comes."""
    net = crafter.network(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    return net


def moved(net: torch.nn.Module, answer, steps: int = 2) -> set[str]:
    """The parameters that Adam moves."""
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        answer(net).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("kind", ["unet", "temporal"])
def test_a_part_of_dynamicrafter_moves_and_the_rest_stays(crafter, answer, kind):
    net = freeze(shaken(crafter), crafter, kind)
    names = {name for name, _ in net.named_parameters()}
    projector = {name for name in names if name.startswith("image_proj_model.")}
    temporal = {
        name for name in names if re.search(r"temopral_conv|init_attn|\.2\.transformer_blocks|\.2\.(norm|proj)", name)
    }
    assert projector
    assert len(temporal) > 20
    assert temporal < names - projector
    assert moved(net, answer) == {"unet": names - projector, "temporal": temporal}[kind]


def test_adapters_of_dynamicrafter_move_alone_and_merged_they_answer_the_same(crafter, answer, tmp_path):
    plain = shaken(crafter)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    first = answer(plain)
    net = freeze(plain, crafter, "lora", rank=2, seed=0)
    torch.testing.assert_close(answer(net), first)  # they begin as nothing
    assert moved(net, answer) == {name for name, _ in net.named_parameters() if "lora_" in name}
    adapted = answer(net).detach()
    assert (adapted - first).abs().max() > 1e-2
    together = merged(net)
    assert {name: tensor.shape for name, tensor in together.items()} == {n: t.shape for n, t in state.items()}
    changed = {name for name in state if not torch.equal(state[name], together[name])}
    assert changed
    assert all(
        re.search(r"\.(to_q|to_k|to_v|to_k_ip|to_v_ip|to_out\.0|to_out)\.weight|to_kv\.weight", name)
        for name in changed
    )
    (file,) = crafter.export(together, tmp_path)
    again = crafter.network(0, crafter.restore(tmp_path / file))
    torch.testing.assert_close(answer(again), adapted, rtol=0, atol=1e-5)


def test_what_is_recomputed_is_the_same(crafter, answer):
    gradients = []
    for recompute in (False, True):
        net = shaken(crafter)
        if recompute:
            crafter.recompute(net)
        answer(net).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=0, atol=1e-6) for name in gradients[0])
