"""`python -m cil.pictures`, as a user runs it."""

import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread

from cil import InitialNoise, Moments
from cil.pictures import PROCESSES


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "cil.pictures", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def moments() -> Moments:
    x = 0.7 + 0.5 * torch.randn(40, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return Moments.of(x)


@pytest.mark.parametrize("process", PROCESSES)
def test_both_pictures_are_drawn_for_every_familys_process(process, moments, tmp_path):
    from cil.pictures import main

    InitialNoise.from_moments(moments).save(tmp_path / "noise.safetensors")
    assert main([str(tmp_path), "--noise", str(tmp_path / "noise.safetensors"), "--process", process]) == 0
    for name in ("timenoise.png", "initial_noise.png"):
        pixels = imread(tmp_path / name)[:, :, :3]
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 0.05  # something is on it


def test_the_command_names_the_files_that_it_has_written(tmp_path):
    done = run(str(tmp_path / "new"), "--a", "5", "--beta-m", "25")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "new" / "timenoise.png")
    small, large = imread(tmp_path / "new/timenoise.png"), tmp_path / "more"
    assert run(str(large), "--a", "5", "1", "--beta-m", "25").returncode == 0
    assert imread(large / "timenoise.png").shape[1] != small.shape[1]  # two panels


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--a", "-1"], "a=-1.0: above 0"),
        (["--beta-m", "-2"], "beta_m=-2.0: at least 0"),
        (["--noise", "/no/such/file"], "/no/such/file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, tmp_path):
    done = run(str(tmp_path), *arguments)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("cil.pictures: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_published_file_has_no_diagonal_to_know_the_marginal_by(moments, tmp_path):
    InitialNoise.from_moments(moments).save(tmp_path / "noise.pt", "lvdm")
    done = run(str(tmp_path), "--noise", str(tmp_path / "noise.pt"))
    assert done.returncode == 2
    assert "published files hold tr(Cov)/d only" in done.stderr
