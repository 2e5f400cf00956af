"""`python -m benchmarks.parity`: our networks against a folder of figures."""

import json
from pathlib import Path

import pytest
import torch
from golden.fill import fill

from benchmarks.parity import run
from cil.nets.lvdm import Resampler

GOLDEN = Path(__file__).with_name("golden")


def figures(folder: Path, prefix: str = "", off: float = 0.0, **changed: object) -> Path:
    """A file in the golden format, of a projector of another size, with outputs that are `off` by so much."""
    config = {"dim": 16, "depth": 1, "dim_head": 4, "heads": 2, "num_queries": 3, "embedding_dim": 8, "output_dim": 12}
    net = Resampler(3, 16, 1, 2, 4, 8, 12).eval()
    keys = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    net.load_state_dict({name: torch.from_numpy(fill(prefix + name, shape)) for name, shape in keys.items()})
    tokens = torch.from_numpy(fill("input:clip_tokens", (2, 5, 8)))
    output = [float(value) + off for value in net(tokens).detach().flatten()]
    made = {"config": config, "keys": keys, "inputs": {"input:clip_tokens": [2, 5, 8]}, "output": output}
    made |= {"fill_prefix": prefix} if prefix else {}
    folder.mkdir(exist_ok=True)
    (folder / "other_small.json").write_text(json.dumps(made | changed))
    return folder


def test_our_networks_answer_as_the_reference(capsys):
    assert run([str(GOLDEN)]) == 0
    said = capsys.readouterr().out
    for path in GOLDEN.glob("*_small.json"):
        assert path.name in said
    assert "NO" not in said


def test_another_configuration_and_a_prefix_of_names_are_taken(tmp_path):
    assert run([str(figures(tmp_path / "plain"))]) == 0
    assert run([str(figures(tmp_path / "prefixed", prefix="seed7."))]) == 0


def test_a_prefix_that_is_left_out_is_noticed(tmp_path):
    assert run([str(figures(tmp_path, prefix="seed7.", fill_prefix=""))]) == 1


def test_a_deviation_beyond_the_tolerance_is_exit_status_1(tmp_path, capsys):
    folder = figures(tmp_path, off=1e-3)
    assert run([str(folder)]) == 1
    assert "1.0e-03" in capsys.readouterr().out
    assert run([str(folder), "--tolerance", "2e-3"]) == 0


def test_other_names_or_an_unknown_network_are_a_row_that_failed(tmp_path, capsys):
    folder = figures(tmp_path, keys={"latents": [1, 3, 16], "other": [1]})
    (folder / "unknown_small.json").write_text(json.dumps({"config": {"layers": 3}, "keys": {}}))
    assert run([str(folder)]) == 1
    said = capsys.readouterr().out
    assert "names or shapes differ" in said
    assert "no network of ours" in said


@pytest.mark.parametrize("made", ["empty", "broken"])
def test_a_folder_without_figures_is_exit_status_2(made, tmp_path, capsys):
    if made == "broken":
        (tmp_path / "x_small.json").write_text("{")
    assert run([str(tmp_path)]) == 2
    assert "benchmarks.parity: " in capsys.readouterr().err
