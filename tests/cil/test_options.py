"""What a user may choose of a family beside its size: options and presets."""

from collections.abc import Mapping
from math import prod

import numpy as np
import pytest
import torch
from tiny import CLIPS, KEYS, SIZE, answer, clean, distance, encoded, frames
from torch import Tensor, nn

from cil import CleanCondition, Draws, Drops, Objective, TimeNoise
from cil.conditioning import ConstantNoise
from cil.families import NAMES, Family, Options, load
from cil.families.base import Clip, precision_of
from cil.moments import Moments

HALVES = ("bfloat16", "float16")

# -- latents: mode, sample, mean_std ---------------------------------------------------------------------------------


def with_deviation(family: Family, log_variance: float = -2.0) -> Family:
    """Of the posterior, about exp(log_variance / 2): a random VAE's is about 1, as is then its variance."""
    family.frozen["vae"].quant_conv.bias.data[4:] += log_variance
    return family


@torch.no_grad()
def posterior(family: Family, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of frames [T, H, W, 3], by the VAE itself, scaled."""
    found = family.frozen["vae"].encode(clip.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    return found.mean * 0.18215, (0.5 * found.logvar).exp() * 0.18215


def test_a_sample_is_a_function_of_the_clips_seed_alone(name):
    family, pictures = load(name, *SIZE, latents="sample"), frames(3)
    clips = [Clip("A red ball", 8.6, 3, seed=5), Clip("", 3.0, 1, seed=6), Clip("another", 12.0, 2, seed=5)]
    together = family.encode(pictures, clips)
    assert together.keys() == load(name, *SIZE).encode(pictures, clips).keys()
    for order in ([0], [1], [2], [2, 0, 1]):
        again = family.encode(pictures[order], [clips[i] for i in order])
        assert torch.equal(again["latents"], together["latents"][order]), order
    told_otherwise = [clip._replace(caption="x", fps=1.0, stride=7) for clip in clips]
    assert torch.equal(family.encode(pictures, told_otherwise)["latents"], together["latents"])
    other = family.encode(pictures, [clip._replace(seed=clip.seed + 10) for clip in clips])
    noise_free = load(name, *SIZE).encode(pictures, clips)["latents"]
    for i in range(3):
        assert distance(other["latents"][i], together["latents"][i]) > 0.1
        assert distance(together["latents"][i], noise_free[i]) > 0.1
    # Frames of a clip, and elements of a frame, have noise of their own.
    noise = (together["latents"] - noise_free).float()
    for one, other in ((noise[0, 0], noise[0, 1]), (noise[0, :, 0], noise[0, :, 1]), (noise[0], noise[1])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 4.5 / one.numel() ** 0.5


def test_samples_are_normal_about_the_mode_with_the_posteriors_deviation():
    many, size = 300, (1, 16, 16)
    family = with_deviation(load("dynamicrafter", *size, latents="sample"))
    picture = frames(1, size)
    drawn = family.encode_frames(picture.expand(many, -1, -1, -1, -1), [Clip(seed=i) for i in range(many)])
    mean, std = posterior(family, picture[0])
    assert 0.2 < float(std.mean() / 0.18215) < 0.6
    samples = drawn["latents"][:, 0].double()
    # 16 elements; a mean has the deviation std / sqrt(N), a deviation about std / sqrt(2 N).
    z_mean = (samples.mean(0) - mean[0]) / (std[0] / many**0.5)
    z_std = (samples.std(0) - std[0]) / (std[0] / (2 * many) ** 0.5)
    assert z_mean.abs().max() < 4
    assert z_std.abs().max() < 4
    # And the 16 are independent: correlations have the deviation 1 / sqrt(N).
    correlations = torch.corrcoef(samples.flatten(1).T) - torch.eye(16)
    assert correlations.abs().max() < 4.5 / many**0.5


def test_mean_and_deviation_are_the_mode_and_what_the_vae_says(name, plain, batches):
    family = load(name, *SIZE, latents="mean_std")
    found = encoded(family)
    assert found.keys() == {*batches[name], "latents_std"}
    assert torch.equal(found["latents"], batches[name]["latents"])
    assert found["latents_std"].dtype == torch.float16
    assert found["latents_std"].shape == found["latents"].shape
    assert (found["latents_std"] > 0).all()
    with_deviation(family)
    _, std = posterior(family, frames()[1])
    torch.testing.assert_close(encoded(family)["latents_std"][1].float(), std, rtol=2e-3, atol=0)


def by_hand(family: Family, net: nn.Module, batch: Mapping[str, Tensor], draws: Draws, drops: Drops) -> Tensor:
    """The loss, its draws in their order: the latents' own, t, eps, drops, conditioning noise."""
    x0 = batch["latents"].float() + batch["latents_std"].float() * draws.normal(*family.latent_shape)
    t = family.process.draw_times(draws)
    eps = draws.normal(*family.latent_shape)
    dropped = drops(draws)
    condition, _ = family.condition(batch, TimeNoise(1.0), family.process.unit_time(t), draws)
    x_t = family.process.add_noise(x0, eps, t)
    found = family.denoise(net, x_t, t, family.drop(condition, dropped))
    error = (found - family.process.target(family.prediction, x0, eps, t)).square()
    return family.loss_weight(t) * error.mean(dim=(1, 2, 3, 4))


@pytest.mark.parametrize("name", ["toy", "svd"])
@torch.no_grad()
def test_a_training_step_samples_the_latents_by_its_own_draws(name):
    family = load(name, *SIZE)
    net, batch, drops = family.network(0), encoded(family), Drops(both=0.5)
    objective = Objective(TimeNoise(1.0), drops)
    std = torch.rand(batch["latents"].shape, generator=torch.Generator().manual_seed(2)).half()
    with_std = {**batch, "latents_std": std}
    found = objective(family, net, with_std, Draws(KEYS)).loss
    torch.testing.assert_close(found, by_hand(family, net, with_std, Draws(KEYS), drops), rtol=1e-6, atol=0)
    assert not torch.allclose(found, objective(family, net, with_std, Draws([(2,), (3,)])).loss, rtol=1e-2)
    assert not torch.allclose(found, objective(family, net, {**batch, "latents_std": 2 * std}, Draws(KEYS)).loss)
    # The batch is left as it is, for the next step to draw anew.
    assert torch.equal(with_std["latents"], batch["latents"])


@pytest.mark.parametrize("name", ["toy", "svd"])
@torch.no_grad()
def test_without_deviation_the_loss_is_that_of_the_mode_later_in_the_stream(name):
    """One draw of the latents' shape is made either way: after it the two streams are one."""
    family = load(name, *SIZE)
    net, batch, objective = family.network(0), encoded(family), Objective(TimeNoise(1.0), Drops(both=0.5))
    later = Draws(KEYS)
    later.normal(*family.latent_shape)
    certain = {**batch, "latents_std": torch.zeros_like(batch["latents"])}
    for found, wanted in zip(
        objective(family, net, certain, Draws(KEYS)), objective(family, net, batch, later), strict=True
    ):
        assert torch.equal(found, wanted)


# -- moments of normals ----------------------------------------------------------------------------------------------


def normals(samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    mean = torch.randn(samples, *shape, generator=random) + 3
    return mean.half(), (0.1 + torch.rand(samples, *shape, generator=random)).half()


@pytest.mark.parametrize("shape", [(5,), (2, 4, 3), (100_000,)])  # the last in two blocks
def test_moments_of_normals_have_the_mean_of_their_squared_deviations_on_top(shape):
    mean, std = normals(5, *shape)
    found = Moments.of(mean, std=std)
    exact_mean, exact_std = mean.double().numpy(), std.double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), exact_mean.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.variance.numpy(), exact_mean.var(0) + (exact_std**2).mean(0), rtol=1e-13)
    assert found.count == 5
    assert torch.equal(std, normals(5, *shape)[1])


def test_moments_of_normals_are_those_of_very_many_samples_of_them():
    many, (mean, std) = 20_000, normals(4, 6)
    noise = torch.randn(many, 4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    drawn = Moments.of((mean.double() + std.double() * noise).flatten(0, 1))
    told = Moments.of(mean, std=std)
    total = drawn.count
    # Deviations of a mean and of a variance of N samples; mixtures of normals have no heavier tails than a normal's.
    error = (told.variance / total) ** 0.5
    assert ((drawn.mean - told.mean).abs() < 4.5 * error).all()
    assert ((drawn.variance - told.variance).abs() < 4.5 * told.variance * (2 / total) ** 0.5).all()


def test_moments_of_normals_merge_as_one_batch():
    mean, std = normals(9, 4, 3)
    whole = Moments.of(mean, std=std)
    cuts = (slice(0, 1), slice(1, 6), slice(6, 9))
    merged = Moments.merged(Moments.of(mean[cut], std=std[cut]) for cut in cuts)
    assert merged.count == 9
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.variance, whole.variance, rtol=1e-13, atol=0)


# -- cached CLIP features --------------------------------------------------------------------------------------------


def test_cached_features_make_the_condition_that_the_image_makes(name, plain, batches):
    family = load(name, *SIZE, clip_features=True)
    batch = encoded(family)
    assert batch.keys() == {*batches[name], "clip"} - {"image"}
    assert batch["clip"].dtype == torch.float16
    cached, made = clean(family, batch), clean(plain[name], batches[name])
    assert cached.keys() == made.keys()
    for key, value in made.items():
        wanted = value.half().float() if key == "clip" else value
        assert torch.equal(cached[key], wanted), key
        assert cached[key].dtype == value.dtype
    # A sample's own, and of its first frame.
    assert distance(cached["clip"][0], cached["clip"][1]) > 1e-3
    later = family.encode(frames().flip(1), CLIPS)
    assert not torch.equal(later["clip"], batch["clip"])


def test_no_gradient_flows_into_the_tower(name, plain, batches):
    family = load(name, *SIZE)
    assert not any(p.requires_grad for model in family.frozen.values() for p in model.parameters())
    family.frozen["image"].requires_grad_(True)
    for options, batch in (({}, batches[name]), ({"clip_features": True}, None)):
        chosen = load(name, *SIZE, **options)
        chosen.frozen["image"].requires_grad_(True)
        given = batch or encoded(chosen)
        assert not any(value.requires_grad for value in [*given.values(), *clean(chosen, given).values()])


# -- noise on the projected tokens -----------------------------------------------------------------------------------


def test_noise_of_the_tokens_is_there_and_changes_the_answer(plain, batches):
    family, u = load("dynamicrafter", *SIZE, token_noise=True), torch.tensor([0.2, 0.9])
    batch = batches["dynamicrafter"]
    without, level = plain["dynamicrafter"].condition(batch, TimeNoise(25.0), u, Draws(KEYS))
    noisy, same_level = family.condition(batch, TimeNoise(25.0), u, Draws(KEYS))
    assert noisy.keys() == {*without, "token_noise"}
    assert noisy["token_noise"].shape == (2, 16 * SIZE[0], 32)
    # The option adds draws behind the others, and moves none.
    assert torch.equal(level, same_level)
    assert all(torch.equal(noisy[key], value) for key, value in without.items())
    net = family.network(0)
    assert distance(answer(family, net, noisy), answer(family, net, without)) > 1e-4


def test_noise_of_the_tokens_has_the_level_that_is_asked_for_in_each_element(batches):
    family = load("dynamicrafter", *SIZE, token_noise=True)
    noisy, _ = family.condition(batches["dynamicrafter"], ConstantNoise(0.5), torch.zeros(2), Draws(KEYS))
    tokens = noisy["token_noise"]
    # A deviation of N normals is itself off by 1 / sqrt(2 N) of it.
    torch.testing.assert_close(
        tokens.flatten(1).std(1), torch.full((2,), 0.5), rtol=4.5 / (2 * prod(tokens.shape[1:])) ** 0.5, atol=0
    )
    assert len(tokens.unique()) > 0.9 * tokens.numel()


def test_a_clean_condition_has_no_noise_of_the_tokens(plain, batches):
    family = load("dynamicrafter", *SIZE, token_noise=True)
    condition, level = family.condition(batches["dynamicrafter"], CleanCondition(), torch.zeros(2), None)
    assert not condition["token_noise"].any()
    assert not level.any()
    net, without = family.network(0), clean(plain["dynamicrafter"], batches["dynamicrafter"])
    assert torch.equal(answer(family, net, condition), answer(family, net, without))


def test_a_step_with_noise_of_the_tokens_trains(batches):
    family = load("dynamicrafter", *SIZE, token_noise=True)
    net = family.network(0).train()
    for kind in (torch.float32, torch.bfloat16):
        loss = Objective(TimeNoise(1.0), Drops(both=0.5))(
            family, net.to(kind), batches["dynamicrafter"], Draws(KEYS)
        ).loss.mean()
        loss.backward()
        assert torch.isfinite(loss)
        assert net.image_proj_model.latents.grad.abs().sum() > 0
        net.zero_grad()


# -- precision -------------------------------------------------------------------------------------------------------

# Relative L2 of the tiny networks, twice to thrice what was measured. Rounding is by 2^-9 and 2^-12 of each value, in
# a few dozen layers behind each other.
FROZEN = {"bfloat16": 5e-2, "float16": 6e-3}
# 3.1e-2 and 3.6e-3 were measured at most.
TRAINED = {"bfloat16": 4e-2, "float16": 5e-3}


@pytest.mark.parametrize("precision", HALVES)
def test_frozen_networks_of_half_precision_say_nearly_the_same(name, precision, plain, batches):
    family, kind = load(name, *SIZE, precision=precision, clip_features=True), getattr(torch, precision)
    batch, wanted = encoded(family), batches[name]
    for model, part in family.frozen.items():
        kept = model == "vae" and name == "svd" and precision == "float16"
        assert {p.dtype for p in part.parameters()} == {torch.float32 if kept else kind}, model
    assert {key: value.dtype for key, value in batch.items() if key != "clip"} == {
        key: value.dtype for key, value in wanted.items() if key != "image"
    }
    assert batch["clip"].dtype == torch.float16
    condition, same = clean(family, batch), clean(plain[name], wanted)
    made_of_image = clean(family, wanted)
    for key, value in same.items():
        for found in (condition[key], made_of_image[key]):
            assert found.dtype == value.dtype, key
            assert torch.isfinite(found).all(), key
            assert distance(found, value) < FROZEN[precision] or not value.any(), key
    assert distance(batch["latents"], wanted["latents"]) < FROZEN[precision]
    assert distance(condition["clip"], same["clip"]) > 0, "the tower is as precise as before"
    video, as_before = family.decode(wanted["latents"]), plain[name].decode(wanted["latents"])
    assert video.dtype == torch.uint8
    # Of 255: 2.6 and 0.3 on average were measured.
    assert (video.float() - as_before.float()).abs().mean() < 255 * FROZEN[precision] / 3


@pytest.mark.parametrize("precision", HALVES)
def test_a_network_of_half_precision_answers_in_float32_nearly_the_same(name, precision, plain, batches):
    family = plain[name]
    net, condition = family.network(0), clean(family, batches[name])
    wanted = answer(family, net, condition)
    half = net.to(getattr(torch, precision))
    found = answer(family, half, condition)
    assert precision_of(half) == getattr(torch, precision)
    assert found.dtype == torch.float32
    assert 0 < distance(found, wanted) < TRAINED[precision]


def test_a_step_of_a_network_in_bfloat16_is_nearly_that_in_float32(name):
    """Of 3 frames: of 2, oneDNN's gradient of a Conv3d over frames is not finite in bfloat16 (torch 2.13, CPU)."""
    size = (3, *SIZE[1:])
    family, losses, slopes = load(name, *size), [], []
    batch = family.encode(frames(2, size), CLIPS)
    for kind in (torch.float32, torch.bfloat16):
        net = family.network(0).to(kind).train()
        loss = Objective(TimeNoise(1.0))(family, net, batch, Draws(KEYS)).loss
        assert loss.dtype == torch.float32
        loss.mean().backward()
        slope = torch.cat([p.grad.flatten().float() for p in net.parameters() if p.grad is not None])
        assert torch.isfinite(slope).all()
        losses.append(loss.detach())
        slopes.append(slope)
    torch.testing.assert_close(losses[1], losses[0], rtol=TRAINED["bfloat16"], atol=0)
    # Each gradient is as coarse as the network, forth and back.
    assert distance(slopes[1], slopes[0]) < 0.15


# -- options and presets that are refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latents": "median"}, r"latents='median': one of mode, sample, mean_std"),
        ({"latents": ""}, r"latents='': one of"),
        ({"precision": "float64"}, r"precision='float64': one of float32, bfloat16, float16"),
        ({"precision": None}, r"precision=None: one of"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_no_option_has_is_refused_with_those_that_it_has(name, options, said):
    with pytest.raises(ValueError, match=said):
        load(name, *SIZE, **options)


OTHERS = {
    "weights": "x.ckpt",
    "tokenizer": "x",
    "latents": "sample",
    "clip_features": True,
    "token_noise": True,
    "precision": "float16",
    "shift": 2.0,
}
LACKING = {
    "toy": tuple(name for name in OTHERS if name != "shift"),
    "dynamicrafter": (),
    "videocrafter1": ("token_noise",),
    "svd": ("tokenizer", "token_noise"),
    "i2vgenxl": ("token_noise",),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_a_family_lacks_is_refused_by_both_names_and_any_other_taken(name):
    assert OTHERS.keys() == vars(Options()).keys()
    for option, value in OTHERS.items():
        if option in LACKING[name]:
            with pytest.raises(ValueError, match=rf"{option}={value}: the family {name} has no such option"):
                load(name, *SIZE, **{option: value})
        else:
            assert getattr(load(name, *SIZE, **{option: value}).options, option) == value
    # What is not chosen may be said.
    assert load(name, *SIZE, **vars(Options())).options == Options()


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_preset_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match=rf"preset='300': the family {name} has tiny, "):
        load(name, preset="300")
    with pytest.raises(ValueError, match=r"family 'nosuch': one of toy, "):
        load("nosuch")


PRESETS = {
    "toy": {"tiny": (8, 32, 32), "small": (8, 32, 32)},
    "dynamicrafter": {"tiny": (8, 32, 32), "256": (16, 256, 256), "512": (16, 320, 512), "1024": (16, 576, 1024)},
    "videocrafter1": {"tiny": (8, 32, 32), "256": (16, 256, 256), "512": (16, 320, 512), "1024": (16, 576, 1024)},
    "svd": {"tiny": (8, 32, 32), "512": (16, 320, 512), "1024": (14, 576, 1024)},
    "i2vgenxl": {"tiny": (8, 32, 32), "256": (16, 256, 448), "704": (16, 704, 1280)},
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_nobody_names_are_the_presets(name):
    assert load(name).presets.keys() == PRESETS[name].keys()
    for preset, (count, height, width) in PRESETS[name].items():
        family = load(name, preset=preset)
        assert (family.preset, family.frames, family.height, family.width) == (preset, count, height, width)
        shrunk = 4 if name == "toy" else 8
        assert family.latent_shape == (count, 4, height // shrunk, width // shrunk)
        if preset.isdigit():
            assert int(preset) in ((height, width) if name != "i2vgenxl" else (height,))
    step = load(name).multiple
    for at in range(3):
        sizes: list[int | None] = [None, None, None]
        sizes[at] = 16 if at == 0 else 5 * step
        wanted = [own if given is None else given for given, own in zip(sizes, (8, 32, 32), strict=True)]
        family = load(name, *sizes)
        assert [family.frames, family.height, family.width] == wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_size_of_nothing_is_refused_and_not_taken_for_the_presets(name):
    for sizes in ((0, 32, 32), (2, 0, 32), (2, 32, 0)):
        with pytest.raises(ValueError, match=rf"{' x '.join(map(str, sizes))}: the family {name} takes multiples of"):
            load(name, *sizes)
