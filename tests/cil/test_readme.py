"""The README's examples for people who use nothing else of ours: they run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cil import InitialNoise
from cil.families import load
from cil.recipes import CORRECTED

ROOT = Path(__file__).parents[2]


def examples(page: str = "README.md") -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_an_x_M_is_drawn_from_a_published_file_and_sampled_from(tmp_path, monkeypatch):
    mean = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    InitialNoise(mean.double(), 0.4).save(tmp_path / "initial_noise_512.pt", "lvdm")
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x)

    names = {"denoise": denoise, "seed": 0}
    exec(examples()[0], names)
    assert names["video"].shape == (4, 4, 4, 8, 8)
    assert len(seen) == 50
    assert seen[0][1].tolist() == [939] * 4
    assert torch.equal(seen[0][0], names["x_M"])
    assert names["times"][:2].tolist() == [939, 920]
    assert names["times"][-1] == 18


@pytest.mark.parametrize("family", CORRECTED)
def test_timenoise_goes_into_a_training_loop_of_every_family(family):
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 8, 4, 8, 8, generator=random)
    weight = torch.zeros((), requires_grad=True)
    names = {
        "seed": 0,
        "position": 0,
        "latents": latents,
        "image_latent": latents[:, 0],
        "model": lambda x, t, image: weight * x + 0 * image,
    }
    assert 'recipe("dynamicrafter")' in examples()[1]
    exec(examples()[1].replace('"dynamicrafter"', f'"{family}"'), names)
    names["loss"].backward()
    assert weight.grad.abs() > 0
    assert names["image"].shape == latents.shape
    assert torch.equal(names["image"][:, 0], names["image"][:, -1])
    assert not torch.equal(names["image"][:, 0], latents[:, 0])
    assert (names["level"] > 0).all()


def test_a_picture_becomes_a_video_as_the_page_of_families_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "navy").save("cat.png")
    names = {"weights": None, "tokenizer": None}
    exec(examples("docs/families.md")[0].replace('preset="512"', 'preset="tiny"').replace("steps=50", "steps=3"), names)
    assert names["video"].shape == (1, 8, 32, 32, 3)


def test_a_ckpt_of_an_export_is_made_as_the_page_of_families_says(tmp_path, monkeypatch):
    family = load("svd")
    weights = tmp_path / "outputs/study/weights/timenoise"
    for kind in ("raw", "ema"):
        family.export(family.network(len(kind + kind[:1])).state_dict(), weights / kind)
    monkeypatch.chdir(tmp_path)
    exec(examples("docs/families.md")[1].replace('preset="512"', 'preset="tiny"'), {})
    for kind, averaged in (("raw", False), ("ema", True)):
        ours, theirs = family.restore(Path("svd.ckpt"), averaged), family.restore(weights / kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
