"""What a user may choose of a family beside its size, presets as they are published, and files as they are found."""

import io
import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from published import write_published
from torch import Tensor, nn

from cil import CleanCondition, Draws, Drops, Objective, TimeNoise
from cil.checkpoints import (
    digest,
    load_into,
    read,
    write_diffusers,
    write_lvdm,
    write_safetensors,
    write_svd_cil,
)
from cil.conditioning import ConstantNoise
from cil.families import NAMES, Family, Options, load
from cil.families.base import Clip, Preset, precision_of
from cil.families.captions import byte_tokenizer
from cil.families.dynamicrafter import DynamiCrafter
from cil.images import read_image
from cil.moments import Moments
from cil.nets.lvdm import TEXT_TOKENS, Attention
from cil.processes import VP

PUBLISHED = ("dynamicrafter", "videocrafter1", "svd", "i2vgenxl")
HALVES = ("bfloat16", "float16")
SIZE = (2, 32, 48)
CLIPS = [Clip("A red ball", 8.6, 3, seed=5), Clip("", 3.0, 1, seed=6)]
KEYS = [(0,), (1,)]
TEXTS = {"dynamicrafter": 0, "i2vgenxl": 513}  # what their tiny tokenizers pad with
END = 513


def frames(clips: int = 2, size: tuple[int, int, int] = SIZE, seed: int = 0) -> Tensor:
    """Smooth, uint8 [B, T, H, W, 3]."""
    coarse = torch.rand(clips * size[0], 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, size=size[1:], mode="bilinear")
    return rearrange((smooth * 255).to(torch.uint8), "(b t) c h w -> b t h w c", b=clips)


def encoded(family: Family) -> dict[str, Tensor]:
    return family.encode(frames(), CLIPS)


def clean(family: Family, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return family.condition(batch, CleanCondition(), torch.zeros(len(batch["latents"])), None)[0]


@torch.no_grad()
def answer(family: Family, net: nn.Module, condition: Mapping[str, Tensor]) -> Tensor:
    """Timesteps are none that bfloat16 holds."""
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([20.3, 0.3]) if family.name == "svd" else torch.tensor([903, 333])
    return family.denoise(net.eval(), x, t, dict(condition))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in L2."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def plain() -> dict[str, Family]:
    return {name: load(name, *SIZE) for name in PUBLISHED}


@pytest.fixture(scope="module")
def batches(plain) -> dict[str, dict[str, Tensor]]:
    return {name: encoded(family) for name, family in plain.items()}


@pytest.fixture(scope="module", params=PUBLISHED)
def name(request) -> str:
    return request.param


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


# -- DynamiCrafter for 256 x 256, as it is published -----------------------------------------------------------------


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


# -- restore ---------------------------------------------------------------------------------------------------------


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


# -- digests and identities ------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 4, generator=random),
        "a.half": torch.randn(5, generator=random).half(),
        "a.scale": torch.tensor(0.5),
        "c.count": torch.arange(4),
    }


def test_a_digest_is_the_same_whatever_the_file_and_the_order_and_the_memory(state, tmp_path):
    wanted = digest(state)
    assert len(wanted) == 16
    assert digest(dict(reversed(state.items()))) == wanted
    write_safetensors(tmp_path / "a.safetensors", state)
    write_lvdm(tmp_path / "a.ckpt", state)
    write_lvdm(tmp_path / "module.ckpt", state, "module")
    write_diffusers(tmp_path / "folder", state, limit=50)
    for file in ("a.safetensors", "a.ckpt", "module.ckpt", "folder"):
        assert digest(read(tmp_path / file)) == wanted, file
    strided = {**state, "b.weight": state["b.weight"].T.contiguous().T}
    assert not strided["b.weight"].is_contiguous()
    assert digest(strided) == wanted
    assert digest({key: nn.Parameter(t) if t.is_floating_point() else t for key, t in state.items()}) == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_digest_is_the_same_on_a_gpu(state):
    assert digest({key: value.cuda() for key, value in state.items()}) == digest(state)


def test_a_digest_changes_with_a_bit_a_name_a_kind_and_a_shape(state):
    bit = state["b.weight"].clone()
    bit.view(torch.int32)[2, 3] ^= 1
    other = [
        {**state, "b.weight": bit},
        {("b.weights" if key == "b.weight" else key): value for key, value in state.items()},
        {**state, "a.half": state["a.half"].view(torch.bfloat16)},
        {**state, "a.half": state["a.half"].float()},
        {**state, "b.weight": state["b.weight"].reshape(4, 3)},
        {**state, "a.scale": state["a.scale"][None]},
        {**state, "d": torch.empty(0)},
        {key: value for key, value in state.items() if key != "c.count"},
        {**state, "c.count": torch.zeros(4, dtype=torch.int64)},
    ]
    assert len({digest(each) for each in [state, *other]}) == 1 + len(other)


def identity(name: str, weights: Path | None, **options: object) -> str:
    return load(name, 4, 32, 48, weights=weights and str(weights), **options).encoder_identity


def altered(weights: Path, prefix: str, folder: str = "") -> str:
    """One value of the first weight of that name, by its last bit; answers its name."""
    file = weights if weights.is_file() else next((weights / folder).glob("*.safetensors"))
    state = {key: value.clone() for key, value in read(file).items()}
    key = next(key for key in state if key.startswith(prefix) and state[key].dim() > 1)
    state[key].view(torch.int32).view(-1)[0] ^= 1
    (write_lvdm if weights.is_file() else write_safetensors)(file, state)
    return key


# The prefix of names in a file, or the subfolder: what is trained, and what is frozen.
PARTS = {
    "dynamicrafter": ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "embedder.model.visual."),
    "svd": ("unet", "vae", "image_encoder"),
    "i2vgenxl": ("unet", "vae", "text_encoder", "image_encoder"),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_encoders_identity_is_of_the_frozen_weights_wherever_they_lie(name, tmp_path):
    found = write_published(name, tmp_path / "here")
    wanted = identity(name, found)
    assert wanted.startswith(f"{name}-tiny-")
    copy = shutil.copytree if found.is_dir() else shutil.copy
    (tmp_path / "there").mkdir()
    there = Path(copy(found, tmp_path / "there" / ("other" if found.is_dir() else "other.pt")))
    assert identity(name, there) == wanted
    trained, *frozen = PARTS[name]
    seen = {wanted}
    for part in (trained, *frozen):
        altered(there, "" if found.is_dir() else part, part)
        now = identity(name, there)
        assert (now in seen) == (part == trained), part
        seen.add(now)
    if found.is_file():
        write_lvdm(tmp_path / "module.ckpt", read(found), "module")
        assert identity(name, tmp_path / "module.ckpt") == wanted
    assert identity(name, found, precision="bfloat16") != wanted


@pytest.mark.parametrize("name", ["dynamicrafter", "i2vgenxl"])
def test_the_encoders_identity_is_of_what_the_tokenizer_does_wherever_it_lies(name, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    own, same = identity(name, None), identity(name, None, tokenizer=str(tmp_path / "b"))
    assert identity(name, None, tokenizer=str(tmp_path / "a")) == same
    assert own == same  # tiny's own is the one that was saved
    words = byte_tokenizer().get_vocab()
    type(byte_tokenizer())(vocab=words | {"d": words["o"], "o": words["d"]}, merges=[]).save_pretrained(tmp_path / "c")
    assert identity(name, None, tokenizer=str(tmp_path / "c")) != own
    more = byte_tokenizer()
    more.add_tokens(["dog"])
    more.save_pretrained(tmp_path / "e")
    with pytest.raises(ValueError, match=f"515 words, and the text tower of {name}, tiny, knows 514"):
        identity(name, None, tokenizer=str(tmp_path / "e"))
    (tmp_path / "b/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not CLIP's tokenizer, or damaged"):
        identity(name, None, tokenizer=str(tmp_path / "b"))
    padding = byte_tokenizer()
    padding.pad_token = "!"
    padding.save_pretrained(tmp_path / "d")
    assert identity(name, None, tokenizer=str(tmp_path / "d")) != own


# -- captions of any kind --------------------------------------------------------------------------------------------

CAPTIONS = {
    "lone high surrogate": "a \ud83d cat",
    "lone low surrogate": "\ude00",
    "surrogates only": "\ud800\udfff" * 50,
    "a surrogate pair apart": "\ud83d\ude00 smiles",
    "100,000 characters": "abcdefghi " * 10_000,
    "100,000 characters of one word": "x" * 100_000,
    "empty": "",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 😀",
    "null bytes": "\x00a\x00",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u200b\u202e\ufeff",
    "the marks themselves": "<|startoftext|><|endoftext|>",
    "entities": "&#0;&#xD800;&amp;lt;",
}


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
@pytest.mark.parametrize("name", TEXTS)
def test_any_caption_becomes_77_ids_with_the_end_kept(name, caption, plain):
    ids = plain[name].ids([caption])
    assert ids.shape == (1, 77)
    assert ids.dtype == torch.int64
    row = ids[0].tolist()
    padded = row[:]
    while padded[-1] == TEXTS[name] and len(padded) > 1:
        padded.pop()
    end = len(padded) - (name == "dynamicrafter")
    assert row[0] == 512
    assert row[end] == END
    assert len(caption) < 10_000 or row[-1] == END
    assert 0 <= min(row) <= max(row) <= END
    # Beside others it is what it is alone.
    assert torch.equal(plain[name].ids(["a longer caption", caption, ""])[1], ids[0])


@pytest.mark.parametrize("name", TEXTS)
def test_half_of_a_surrogate_pair_is_a_question_mark_and_a_broken_caption_is_encoded(name, plain):
    family = plain[name]
    assert torch.equal(family.ids(["a \ud83d cat"]), family.ids(["a ? cat"]))
    assert torch.isfinite(family.encode_captions(list(CAPTIONS.values()))["text"]).all()


@pytest.mark.parametrize("name", TEXTS)
def test_no_captions_at_all_are_refused(name, plain):
    with pytest.raises(ValueError, match="captions: at least one"):
        plain[name].ids([])


# -- a picture as the conditional image ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_without_a_video_is_the_condition_that_its_video_has(name):
    """An RGBA PNG, half of it transparent."""
    family = load(name, *SIZE)
    first = frames(1, seed=7)[0, 0].numpy()
    first[:, 24:] = 255
    alpha = np.full((32, 48, 1), 255, np.uint8)
    alpha[:, 24:] = 0
    colours = first.copy()
    colours[:, 24:] = (10, 200, 30)
    png = io.BytesIO()
    Image.fromarray(np.concatenate([colours, alpha], 2)).save(png, "PNG")
    picture = read_image(png.getvalue(), family.height, family.width)
    assert torch.equal(picture, torch.from_numpy(first))
    clip = [Clip("a ball", 8.0, 3)]
    alone = family.encode(picture[None, None], clip)
    assert alone["latents"].shape == (1, 1, *family.latent_shape[1:])
    video = torch.stack([picture, frames(1, seed=8)[0, 1]])[None]
    found, wanted = clean(family, alone), clean(family, family.encode(video, clip))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        # The VAE is called on another number of frames; fp16 keeps eleven bits.
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-3)
    if name != "toy":
        net, x = family.network(0).eval(), torch.zeros(1, *family.latent_shape)
        with torch.no_grad():
            assert torch.isfinite(family.denoise(net, x, torch.tensor([1.5 if name == "svd" else 500]), found)).all()
    bare = clean(family, family.encode(picture[None, None]))
    assert bare.keys() == wanted.keys()
