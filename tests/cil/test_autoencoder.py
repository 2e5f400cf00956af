"""The VAE of LVDM checkpoints: the reference's names and figures, through diffusers' model."""

import numpy as np
import pytest
import torch
from golden.fill import fill_state

from cil.nets.autoencoder import Autoencoder

NETWORK = 2e-5  # float32 on a CPU; the reference itself is off its float64 run by 5e-6


@pytest.fixture(scope="module")
def small(golden) -> Autoencoder:
    c = golden["lvdm_autoencoder_small"]["config"]["ddconfig"]
    return Autoencoder(c["ch"], tuple(c["ch_mult"]), c["num_res_blocks"], c["z_channels"])


@pytest.fixture(scope="module")
def state(golden) -> dict[str, torch.Tensor]:
    filled = fill_state(golden["lvdm_autoencoder_small"]["keys"])
    return {name: torch.from_numpy(value) for name, value in filled.items()}


@pytest.fixture(scope="module")
def vae(small, state):
    model = small.build()
    model.load_state_dict(small.to_diffusers(state), strict=True)
    return model.eval()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_names_and_shapes_are_those_of_the_published_checkpoints(golden):
    with torch.device("meta"):
        state = Autoencoder().to_ldm(Autoencoder().build().state_dict())
    shapes = {f"first_stage_model.{name}": list(tensor.shape) for name, tensor in state.items()}
    assert shapes == golden["lvdm_autoencoder_full_keys"]


@torch.no_grad()
def test_moments_and_samples_are_the_references(vae, golden, reference_input):
    figures = golden["lvdm_autoencoder_small"]
    posterior = vae.encode(reference_input("image", *figures["inputs"]["input:image"])).latent_dist
    assert list(posterior.parameters.shape) == figures["moments_shape"]
    np.testing.assert_allclose(posterior.parameters.flatten(), figures["moments"], rtol=0, atol=NETWORK)
    noise = reference_input("posterior_noise", *figures["inputs"]["input:posterior_noise"])
    sample = posterior.mean + posterior.std * noise
    np.testing.assert_allclose(sample.flatten(), figures["sample"], rtol=0, atol=NETWORK)


@torch.no_grad()
def test_decoded_images_are_the_references(vae, golden, reference_input):
    figures = golden["lvdm_autoencoder_small"]
    image = vae.decode(reference_input("latent", *figures["inputs"]["input:latent"])).sample
    assert list(image.shape) == figures["decode_shape"]
    np.testing.assert_allclose(image.flatten(), figures["decode"], rtol=0, atol=NETWORK)


def test_latents_are_scaled_by_stable_diffusions_factor(vae):
    assert vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_state_is_bit_for_bit_the_same_after_the_way_there_and_back(dtype, small, state):
    given = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert_same(small.to_ldm(small.to_diffusers(given)), given)


@pytest.mark.parametrize(
    "sizes", [Autoencoder(32, (1,), 1), Autoencoder(32, (1, 1, 3), 3, 2), Autoencoder(64, (1, 2, 1, 2), 2, 8)], ids=str
)
def test_no_tensor_of_any_sizes_is_left_out_or_left_over(sizes):
    state = sizes.build().state_dict()
    assert_same(sizes.to_diffusers(sizes.to_ldm(state)), state)


def test_a_missing_and_an_unknown_tensor_are_named(small, state):
    wrong = dict(state)
    wrong["encoder.mid.attn_2.q.weight"] = wrong.pop("encoder.mid.attn_1.q.weight")
    with pytest.raises(ValueError, match=r"1 missing: \S+attn_1\.q\.weight; 1 unknown: \S+attn_2\.q\.weight$"):
        small.to_diffusers(wrong)
    ours = small.to_diffusers(state)
    del ours["quant_conv.bias"]
    with pytest.raises(ValueError, match=r"1 missing: quant_conv\.bias$"):
        small.to_ldm(ours)


def test_of_many_wrong_names_ten_are_shown_and_all_are_counted(small, state):
    with pytest.raises(ValueError, match="152 missing") as error:
        small.to_diffusers({f"first_stage_model.{name}": tensor for name, tensor in state.items()})
    missing, unknown = str(error.value).split("; ")
    assert unknown.startswith("152 unknown: first_stage_model.decoder.conv_in.bias, ")
    assert unknown.count("first_stage_model.") == 10
    assert missing.count("decoder.") == 10


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"channels": 48}, "channels=48: a multiple of 32"),
        ({"multiples": (2, 4)}, r"multiples=\(2, 4\): the first is 1"),
    ],
)
def test_sizes_that_no_such_model_has_are_refused(sizes, told):
    with pytest.raises(ValueError, match=told):
        Autoencoder(**sizes)
