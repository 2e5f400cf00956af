"""DynamiCrafter for 256 x 256, as it is published."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from tiny import KEYS, SIZE, answer, clean, distance
from torch import Tensor, nn

from cil import Draws, Objective, TimeNoise
from cil.checkpoints import (
    read,
)
from cil.families import Options, load
from cil.families.base import Clip, Preset
from cil.families.dynamicrafter import DynamiCrafter
from cil.nets.lvdm import TEXT_TOKENS, Attention
from cil.processes import VP


def test_the_preset_256_has_the_published_process_and_scales_of_the_image():
    family = load("dynamicrafter", preset="256")
    assert (family.process, family.prediction) == (VP(), "eps")
    assert not family.process.zero_snr
    assert family.process.rescale == 1
    # Stable Diffusion's schedule, which does not end in pure noise.
    wanted = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    np.testing.assert_allclose(family.buffers()["alphas_cumprod"], wanted, rtol=1e-6)
    assert "scale_arr" not in family.buffers()
    assert family._rate(Clip(fps=8.0, stride=3)) == 3
    with torch.device("meta"):
        names = family._fresh().state_dict()
    scales = {key for key in names if key.endswith(".alpha")}
    image = {key.replace(".to_k_ip.weight", ".alpha") for key in names if key.endswith(".to_k_ip.weight")}
    assert scales == image
    assert len(scales) == 16  # of a Stable Diffusion UNet's attentions over space
    assert all(".attn2.alpha" in key and names[key].shape == () for key in scales)
    for other in ("512", "1024"):
        with torch.device("meta"):
            assert not [key for key in load("dynamicrafter", preset=other)._fresh().state_dict() if "alpha" in key]
        assert "scale_arr" in load("dynamicrafter", preset=other).buffers()


class Small(DynamiCrafter):
    """What the preset 256 says, of the tiny sizes."""

    networks = DynamiCrafter.presets["tiny"].networks
    small = replace(
        networks,
        unet={**networks.unet, "learned_image_scale": True},
        process=VP(),
        prediction="eps",
        rate=DynamiCrafter.presets["256"].networks.rate,
    )
    presets = {"tiny": Preset(small, 8, 32, 32)}  # noqa: RUF012


def scales(net: nn.Module) -> list[nn.Parameter]:
    return [value for key, value in net.named_parameters() if key.endswith(".alpha")]


def test_a_scale_of_zero_is_none_and_any_other_counts_and_is_trained(plain, batches):
    family, batch = Small("tiny", *SIZE, Options()), batches["dynamicrafter"]
    net, other = family.network(0), plain["dynamicrafter"].network(0)
    condition = clean(plain["dynamicrafter"], batch)
    found, wanted = answer(family, net, condition), answer(family, other, condition)
    assert len(scales(net)) == len([key for key in net.state_dict() if key.endswith("to_k_ip.weight")]) > 0
    assert torch.equal(found, wanted)
    for scale in scales(net):
        scale.data.fill_(0.7)
    assert distance(answer(family, net, condition), wanted) > 1e-3
    Objective(TimeNoise(1.0))(family, net.train(), batch, Draws(KEYS)).loss.mean().backward()
    assert all(scale.grad is not None and scale.grad.abs() > 0 for scale in scales(net))


@pytest.mark.parametrize("alpha", [None, 0.0, 0.7, -1.3])
@torch.no_grad()
def test_the_images_part_of_attention_counts_one_and_the_scales_hyperbolic_tangent(alpha):
    """Beside softmax attention written out, in float64."""
    torch.manual_seed(0)
    layer = Attention(12, 3, 4, context=10, image=True).double()
    if alpha is not None:
        layer.alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float64))
    x, context = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, TEXT_TOKENS + 16, 10, dtype=torch.float64)

    def attended(keys: nn.Module, values: nn.Module, tokens: Tensor) -> Tensor:
        q, k, v = (
            rearrange(part, "b l (h d) -> b h l d", h=3) for part in (layer.to_q(x), keys(tokens), values(tokens))
        )
        return rearrange(torch.softmax(q @ k.mT / 2, -1) @ v, "b h l d -> b l (h d)")  # 2: the root of 4

    text = attended(layer.to_k, layer.to_v, context[:, :TEXT_TOKENS])
    image = attended(layer.to_k_ip, layer.to_v_ip, context[:, TEXT_TOKENS:])
    scale = 1.0 if alpha is None else np.tanh(alpha) + 1
    torch.testing.assert_close(layer(x, context), layer.to_out(text + scale * image), rtol=1e-12, atol=1e-12)


def test_a_file_of_256_has_its_published_names_and_comes_back_by_ours(tmp_path, plain):
    family = Small("tiny", *SIZE, Options())
    net = family.network(4)
    for i, scale in enumerate(scales(net)):
        scale.data.fill_(0.1 * i - 0.3)
    (file,) = family.export(net.state_dict(), tmp_path)
    kept = read(tmp_path / file)
    assert [key for key in kept if "fps_embedding" in key] == []
    assert len([key for key in kept if key.startswith("model.diffusion_model.framestride_embed.")]) == 4
    assert "scale_arr" not in kept
    for restored in (family.restore(tmp_path), family.restore(tmp_path / file)):
        assert restored.keys() == net.state_dict().keys()
        assert all(torch.equal(restored[key], value) for key, value in net.state_dict().items())
    again = Small("tiny", *SIZE, Options(weights=str(tmp_path / file))).network(0)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in net.state_dict().items())
    with pytest.raises(ValueError, match=r"not the weights of dynamicrafter.*alpha"):
        plain["dynamicrafter"].restore(tmp_path)
