"""The family toy: its latents, its condition and its network."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from cil import CleanCondition, Draws, Objective, TimeNoise
from cil.families import Family, load
from cil.families.base import Dropped
from pipelines.shapes import Shape

SIZES = [(4, 16, 16), (1, 8, 24), (8, 32, 16)]
GREY_LEVEL = 1 / 127.5  # in units of the encoder's pixels, -1..1


def random_frames(frames: int, height: int, width: int, batch: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, frames, height, width, 3), generator=random, dtype=torch.uint8)


@pytest.fixture(scope="module")
def family() -> Family:
    return load("toy", 4, 16, 16, "tiny")


@pytest.fixture(scope="module")
def shapes() -> torch.Tensor:
    videos = [Shape(0, i, frames=4, size=32, moving=True, min_speed=0.5, max_speed=2.0).render() for i in range(8)]
    return torch.from_numpy(np.stack(videos))


# -- latents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "height", "width"), SIZES)
def test_latents_have_the_shape_that_the_family_says(frames, height, width):
    family = load("toy", frames, height, width, "tiny")
    latents = family.encode(random_frames(frames, height, width))["latents"]
    assert latents.shape[1:] == family.latent_shape
    assert family.latent_shape == (frames, 4, height // 4, width // 4)
    decoded = family.decode(latents)
    assert decoded.shape == (2, frames, height, width, 3)
    assert decoded.dtype == torch.uint8


def test_the_basis_is_orthonormal(family):
    flat = family.basis.flatten(1).double()
    torch.testing.assert_close(flat @ flat.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=2e-7)  # float32


def test_latents_are_the_four_lowest_coefficients_of_each_blocks_dct(family):
    frames = random_frames(4, 16, 16)
    latents = family.encode(frames)["latents"]
    grey = frames.double().mean(-1).numpy() / 127.5 - 1
    for row, column in ((0, 0), (3, 1), (2, 2)):
        block = grey[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        low = dctn(block, axes=(2, 3), norm="ortho")[:, :, :2, :2].reshape(2, 4, 4)
        # Stored as float16: 2^-11 of a coefficient of at most 4.
        np.testing.assert_allclose(latents[..., row, column].double(), low, rtol=0, atol=4 * 2**-11)


def test_encoding_is_linear_in_the_pixels(family):
    """a + b = c + d in pixels, so the same holds in latents."""
    random = torch.Generator().manual_seed(1)
    a, c = (torch.randint(64, 192, (1, 4, 16, 16, 3), generator=random, dtype=torch.uint8) for _ in range(2))
    d = torch.randint(0, 64, a.shape, generator=random, dtype=torch.uint8)
    b = (c.int() + d.int() - a.int()).clamp(0, 255)
    d = (a.int() + b - c.int()).to(torch.uint8)
    a_, b_, c_, d_ = (family.encode(x.to(torch.uint8))["latents"].double() for x in (a, b, c, d))
    torch.testing.assert_close(a_ + b_, c_ + d_, rtol=0, atol=4 * 4 * 2**-11)  # four float16 roundings


def test_flat_blocks_come_back_exactly(family):
    blocks = torch.arange(256, dtype=torch.uint8).reshape(4, 4, 4, 4, 1)[None].expand(1, 4, 4, 4, 4, 1)
    flat = blocks[:, :, :, :, 0, 0].repeat_interleave(4, 2).repeat_interleave(4, 3)[..., None].repeat(1, 1, 1, 1, 3)
    assert torch.equal(family.decode(family.encode(flat)["latents"]), flat)


def test_pictures_in_the_span_of_the_basis_come_back_within_rounding(family):
    random = torch.Generator().manual_seed(2)
    latents = (torch.rand(3, *family.latent_shape, generator=random) - 0.5) * torch.tensor([2, 1, 1, 1]).reshape(
        4, 1, 1
    )
    pictures = family.decode(latents)
    assert pictures.min() > 5
    assert pictures.max() < 250  # nothing was clipped
    again = family.encode(pictures)["latents"].float()
    # A coefficient takes up half a grey level from each of 16 pixels, weighted by its basis, and a float16 rounding.
    bound = 0.5 * GREY_LEVEL * family.basis.abs().sum((1, 2)) + 2 * 2**-11
    assert ((again - latents).abs().amax((0, 1, 3, 4)) <= bound).all()
    assert (family.decode(again).int() - pictures.int()).abs().max() <= 1


def test_smooth_pictures_lose_little(family, shapes):
    big = load("toy", 4, 32, 32, "tiny")
    error = big.decode(big.encode(shapes)["latents"]).double() - shapes.double()
    # Measured: 5.6 grey levels of 47, which is 1.4 % of the variance.
    assert error.square().mean() < 0.03 * shapes.double().var()


def test_colours_are_seen_as_their_brightness_and_decoded_grey(family):
    frames = random_frames(4, 16, 16)
    turned = frames[..., [2, 0, 1]]
    torch.testing.assert_close(family.encode(turned)["latents"], family.encode(frames)["latents"], rtol=0, atol=2**-9)
    decoded = family.decode(family.encode(frames)["latents"])
    assert (decoded == decoded[..., :1]).all()


def test_pixels_beyond_black_and_white_are_clipped_rather_than_wrapped(family):
    latents = torch.zeros(1, *family.latent_shape)
    latents[:, 0, 0], latents[:, 1, 0] = 40.0, -40.0
    decoded = family.decode(latents)
    assert (decoded[:, 0] == 255).all()
    assert (decoded[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("name", "height", "width", "preset", "complaint"),
    [
        ("toy", 16, 16, "huge", "tiny, small"),
        ("toy", 12, 16, "tiny", "multiples of 8"),
        ("toy", 0, 16, "tiny", "multiples of 8"),
        ("toy", -8, 16, "tiny", "multiples of 8"),
        ("toy", 16, 20, "tiny", "multiples of 8"),
        ("boy", 16, 16, "tiny", "one of toy"),
    ],
)
def test_what_the_family_cannot_be_is_refused(name, height, width, preset, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(name, 4, height, width, preset)


# -- the condition -----------------------------------------------------------------------------------------------------


def test_the_image_is_noised_once_and_all_frames_are_given_the_same(family):
    net, inputs = family.network(0), []
    net.register_forward_pre_hook(lambda net, given: inputs.append(given[0]))
    batch = {"latents": torch.zeros(3, *family.latent_shape)}
    Objective(TimeNoise(100.0))(family, net, batch, Draws([(0, i) for i in range(3)]))
    image = inputs[0][:, :, 4:]
    assert torch.equal(image, image[:, :1].expand_as(image))
    assert (image[:, 0].flatten(1).std(1) > 1).all()  # it was noised


def test_the_condition_is_the_first_frame(family):
    latents = torch.randn(3, *family.latent_shape, generator=torch.Generator().manual_seed(0)).half()
    condition, level = family.condition({"latents": latents}, CleanCondition(), torch.zeros(3), None)
    assert set(condition) == {"image"}
    assert torch.equal(condition["image"], latents[:, 0].float())
    assert torch.equal(level, torch.zeros(3))


def test_only_the_samples_named_lose_their_condition(family):
    image = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    dropped = Dropped(text=torch.ones(3, dtype=torch.bool), image=torch.tensor([False, True, False]))
    kept = family.drop({"image": image}, dropped)["image"]
    assert torch.equal(kept[[0, 2]], image[[0, 2]])
    assert torch.equal(kept[1], torch.zeros(4, 4, 4))


def test_the_loss_weighs_small_t_up_to_five_fold(family):
    t = torch.arange(1000)
    weight, variance = family.loss_weight(t), (family.process.sigma(t) ** 2).float()
    assert weight.shape == (1000,)
    torch.testing.assert_close(weight, 1 / variance.clamp_min(0.2))
    assert weight.max() == pytest.approx(5)
    assert weight[-1] == pytest.approx(1, rel=0.01)


# -- the network -------------------------------------------------------------------------------------------------------


def awake(family: Family) -> torch.nn.Module:
    net = family.network(0)
    torch.nn.init.normal_(net.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return net


@pytest.fixture
def given(family) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(5)
    x_t = torch.randn(2, *family.latent_shape, generator=random)
    return x_t, torch.tensor([100, 900]), {"image": torch.randn(2, *family.latent_shape[1:], generator=random)}


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_a_fresh_network_answers_zero_in_the_shape_of_the_latents(preset):
    for frames, height, width in SIZES:
        family = load("toy", frames, height, width, preset)
        x_t = torch.randn(2, *family.latent_shape)
        answer = family.denoise(family.network(0), x_t, torch.tensor([0, 999]), {"image": x_t[:, 0]})
        assert torch.equal(answer, torch.zeros_like(x_t))


def test_the_small_network_has_about_250_000_parameters():
    net = load("toy", 4, 16, 16, "small").network(0)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(250_000, rel=0.1)


def test_a_network_is_a_function_of_its_seed_and_leaves_torchs_state_alone(family):
    before = torch.random.get_rng_state()
    first, again, other = (family.network(seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_the_answer_depends_on_everything_that_the_network_is_given(family, given):
    x_t, t, condition = given
    net = awake(family)
    answer = family.denoise(net, x_t, t, condition)
    changed = {
        "time": family.denoise(net, x_t, t + 50, condition),
        "image": family.denoise(net, x_t, t, {"image": condition["image"].flip(-1)}),
        "noisy latents": family.denoise(net, x_t.flip(-1), t, condition),
    }
    still = [what for what, other in changed.items() if not (other - answer).abs().mean() > 1e-3]
    assert still == []


def test_a_frame_hears_of_every_other_and_a_sample_of_no_other(family, given):
    x_t, t, condition = given
    net = awake(family)
    answer = family.denoise(net, x_t, t, condition)
    for frame in range(4):
        nudged = x_t.clone()
        nudged[0, frame] += 1
        moved = (family.denoise(net, nudged, t, condition) - answer).abs().amax((2, 3, 4))
        assert (moved[0] > 1e-4).all()
        assert torch.equal(moved[1], torch.zeros(4))


def test_frames_rows_and_columns_are_told_apart_by_their_place(family):
    """Of a clip that is the same everywhere. Convolution over frames, which feels the ends of the clip, is off."""
    net = awake(family)
    for name, parameter in net.named_parameters():
        if "conv_time" in name:
            torch.nn.init.zeros_(parameter)
    everywhere = torch.randn(1, 1, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    x_t = everywhere.expand(1, 4, 4, 4, 4)
    answer = family.denoise(net, x_t, torch.tensor([500]), {"image": x_t[:, 0]})
    for axis in (1, 3, 4):
        step = answer.diff(dim=axis).abs().transpose(0, axis).flatten(1).amax(1)
        assert (step > 1e-4).all()


def test_weights_written_and_read_are_the_same_to_the_bit(family, given, tmp_path):
    net = awake(family)
    names = family.export(net.state_dict(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == names
    state = family.restore(tmp_path)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    other = family.network(9)
    other.load_state_dict(state)
    x_t, t, condition = given
    assert torch.equal(family.denoise(other, x_t, t, condition), family.denoise(net, x_t, t, condition))


def test_sixty_steps_on_one_batch_lower_its_loss(family):
    videos = [Shape(0, i, frames=4, size=16, moving=True, min_speed=0.5, max_speed=1.5).render() for i in range(4)]
    batch = family.encode(torch.from_numpy(np.stack(videos)))
    net, objective, keys = family.network(0), Objective(TimeNoise(3.0)), [(0, i) for i in range(4)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(61):
        loss = objective(family, net, batch, Draws(keys)).loss.mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]  # measured: 0.006 to 0.009, over three seeds
