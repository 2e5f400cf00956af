"""Weights of families from files as they are found."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from cil.checkpoints import (
    load_into,
    read,
    write_diffusers,
    write_lvdm,
    write_svd_cil,
)


def assert_same(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert state.keys() == wanted.keys()
    assert [key for key, value in wanted.items() if not torch.equal(state[key], value)] == []


@pytest.mark.parametrize("averaged", [True, False])
def test_svd_is_restored_from_every_form_that_is_published(averaged, plain, tmp_path):
    family = plain["svd"]
    raw = family.network(1).state_dict()
    averages = {key: value + 1 for key, value in raw.items()}
    write_diffusers(tmp_path / "pipeline" / "unet", raw)
    write_diffusers(tmp_path / "pipeline" / "vae", family.frozen["vae"].state_dict())
    write_svd_cil(tmp_path / "averaged.ckpt", raw, averages, wrapped=True)
    write_svd_cil(tmp_path / "raw.ckpt", raw)
    for file in ("pipeline", "pipeline/unet", "pipeline/unet/diffusion_pytorch_model.safetensors", "raw.ckpt"):
        assert_same(family.restore(tmp_path / file, averaged), raw)
    assert_same(family.restore(tmp_path / "averaged.ckpt", averaged), averages if averaged else raw)
    assert_same(family.restore(tmp_path / "averaged.ckpt"), averages)
    load_into(family.network(2), family.restore(tmp_path / "averaged.ckpt", averaged), wanted="svd")


def test_what_are_not_the_networks_weights_is_refused_by_its_path(name, plain, tmp_path):
    family = plain[name]
    stranger = tmp_path / "stranger.ckpt"
    write_svd_cil(stranger, {"weight": torch.zeros(3)}, {"weight": torch.ones(3)})
    for averaged in (True, False):
        with pytest.raises(ValueError, match=rf"{stranger}: not the weights of {name}"):
            family.restore(stranger, averaged)
    (tmp_path / "text.ckpt").write_text("no weights\n")
    with pytest.raises(ValueError, match=r"text\.ckpt: a text file"):
        family.restore(tmp_path / "text.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nosuch\.ckpt"):
        family.restore(tmp_path / "nosuch.ckpt")


@pytest.mark.parametrize("name", ["dynamicrafter", "videocrafter1"])
def test_what_deepspeed_leaves_in_training_is_restored(name, plain, tmp_path):
    family = plain[name]
    net = family.network(5).state_dict()
    (file,) = family.export(net, tmp_path)
    write_lvdm(tmp_path / "module.ckpt", read(tmp_path / file), "module")
    assert set(torch.load(tmp_path / "module.ckpt", weights_only=True)) == {"module"}
    assert_same(family.restore(tmp_path / "module.ckpt"), net)
