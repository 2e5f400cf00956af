"""SVD as a family, at its tiny size, and its UNet against the reference's figures."""

import numpy as np
import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from golden.fill import fill_state
from torch import Tensor

from cil import CleanCondition, Draws, Objective, TimeNoise, frame_ramp, guided, sample
from cil.checkpoints import load_into, write_diffusers, write_svd_cil
from cil.families import load
from cil.families.base import Clip, Dropped
from cil.families.svd import SVD
from cil.initial_noise import InitialNoise

CLIPS = [Clip(fps=8.0), Clip(fps=3.0)]


def frames(batch: int = 2) -> Tensor:
    coarse = torch.rand(batch, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(32, 48), mode="bilinear")
    return (smooth * 255).to(torch.uint8).unflatten(0, (batch, 4)).permute(0, 1, 3, 4, 2)


@pytest.fixture(scope="module")
def family() -> SVD:
    return load("svd", 4, 32, 48, "tiny")


@pytest.fixture(scope="module")
def batch(family) -> dict[str, Tensor]:
    return family.encode(frames(), CLIPS)


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A pipeline as diffusers keeps it, of tiny random weights."""
    where = tmp_path_factory.mktemp("svd")
    parts = {"unet": family.network(3), "vae": family.frozen["vae"], "image_encoder": family.frozen["image"]}
    for part, model in parts.items():
        write_diffusers(where / part, model.state_dict())
    return where


def test_names_and_shapes_are_those_of_the_published_unet(golden):
    with torch.device("meta"):
        unet = load("svd", 16, 320, 512, "512")._fresh()
    assert {name: list(tensor.shape) for name, tensor in unet.state_dict().items()} == golden["svd_unet_full_keys"]


@torch.no_grad()
def test_each_sample_of_a_batch_is_answered_as_the_reference_answers_it_alone(golden, reference_input):
    """The reference's own UNet mixes the samples of a batch (its defect 8)."""
    figures = golden["svd_unet_small"]
    unet = UNetSpatioTemporalConditionModel(**figures["config"]).eval()
    unet.load_state_dict({name: torch.from_numpy(value) for name, value in fill_state(figures["keys"]).items()})
    x, clip = (reference_input(name, *figures["inputs"][f"input:{name}"]) for name in ("x", "clip"))
    ids, t = torch.tensor(figures["added_time_ids"]), torch.tensor(figures["timesteps"])
    together = unet(x, t, clip, ids).sample
    # float32 on a CPU.
    np.testing.assert_allclose(together.flatten(), figures["output"], rtol=0, atol=2e-5)
    for i in range(2):
        alone = unet(x[i : i + 1], t[i : i + 1], clip[i : i + 1], ids[i : i + 1]).sample
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=2e-5)


def test_what_is_cached_of_a_clip_has_the_shapes_and_types_that_the_family_says(family, batch):
    assert {name: (list(t.shape[1:]), t.dtype) for name, t in batch.items()} == {
        "latents": ([4, 4, 4, 6], torch.float16),
        "image": ([28, 28, 3], torch.uint8),
        "rate": ([], torch.float32),
    }
    assert tuple(batch["latents"].shape[1:]) == family.latent_shape
    assert torch.equal(family.encode(frames()[1:], CLIPS[1:])["latents"][0], batch["latents"][1])
    assert family.decode(batch["latents"]).shape == (2, 4, 32, 48, 3)


def test_noise_is_put_on_the_unscaled_latent_once_and_its_level_is_told(family, batch):
    u, keys = torch.tensor([0.2, 0.9]), [(0,), (1,)]
    noisy, level = family.condition(batch, TimeNoise(15.0), u, Draws(keys))
    clean, _ = family.condition(batch, CleanCondition(), u, None)
    torch.testing.assert_close(clean["image"][:, 2], batch["latents"][:, 0].float() / 0.18215)
    change = noisy["image"] - clean["image"]
    torch.testing.assert_close(change[:, 0], change[:, 3])
    torch.testing.assert_close(change[:, 0].flatten(1).std(1), level, rtol=5 / (2 * 96) ** 0.5, atol=0)
    assert noisy["ids"].tolist() == [[7.0, 20.0, float(level[0])], [2.0, 20.0, float(level[1])]]
    assert clean["ids"][:, 2].tolist() == [0.0, 0.0]
    assert torch.equal(noisy["clip"], clean["clip"])


def test_a_drop_takes_the_latent_and_clip_together_and_leaves_the_ids(family, batch):
    condition, _ = family.condition(batch, CleanCondition(), torch.zeros(2), None)
    dropped = family.drop(condition, Dropped(text=torch.tensor([True, False]), image=torch.tensor([False, True])))
    for name in ("image", "clip"):
        assert torch.equal(dropped[name][0], condition[name][0])
        assert not dropped[name][1].any()
    assert torch.equal(dropped["ids"], condition["ids"])


def test_the_answer_depends_on_image_clip_and_ids(family, batch):
    net = family.network(0).eval()
    x, t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1)), torch.tensor([20.0, 0.3])
    condition, _ = family.condition(batch, CleanCondition(), torch.zeros(2), None)
    with torch.no_grad():
        before = family.denoise(net, x, t, condition)
        for name in condition:
            after = family.denoise(net, x, t, {**condition, name: condition[name].flip(0)})
            assert (after - before).abs().amax() > 1e-4, name


def test_a_training_step_lowers_the_loss_and_reaches_every_parameter(family, batch):
    net, objective = family.network(0).train(), Objective(TimeNoise(1.0))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses, silent = [], set()
    for _ in range(8):
        loss = objective(family, net, batch, Draws([(0,), (1,)])).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        silent = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    # One token of context: its softmax is 1 whatever query and key are, so cross-attention trains neither.
    assert {
        name for name in silent if "attn2.to_q" not in name and "attn2.to_k" not in name and "norm2" not in name
    } == set()


def test_a_video_is_sampled_from_M_with_guidance_that_rises_over_frames(family, batch):
    net = family.network(0).eval()
    condition, _ = family.condition(batch, CleanCondition(), torch.zeros(2), None)
    nothing = family.drop(condition, Dropped.all(2))
    times = family.process.times(3, 100.0)
    x = InitialNoise.standard(family.latent_shape).sample(family.process, times[0], 2, Draws([(0,), (1,)]))
    both = [lambda x, t, c=c: family.denoise(net, x, t, c) for c in (condition, nothing)]
    video = sample(guided(*both, frame_ramp(1, 3, 4)), x, family.process, times, family.prediction)
    assert video.shape == x.shape
    assert torch.isfinite(video).all()


def test_a_pipeline_folder_is_read_and_the_unet_written_as_diffusers_reads_it(family, folder, tmp_path):
    again = load("svd", 4, 32, 48, "tiny", weights=str(folder))
    net = again.network(0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), family.network(3).parameters(), strict=True))
    assert torch.equal(again.encode(frames(), CLIPS)["latents"], family.encode(frames(), CLIPS)["latents"])
    one, other = (
        each.condition(family.encode(frames(), CLIPS), CleanCondition(), torch.zeros(2), None)
        for each in (again, family)
    )
    assert torch.equal(one[0]["clip"], other[0]["clip"])
    names = again.export(net.state_dict(), tmp_path)
    assert names == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    theirs = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "unet", local_files_only=True)
    restored = again.restore(tmp_path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
        assert torch.equal(restored[name], tensor), name


def test_the_authors_file_gives_raw_and_averaged_weights(family, tmp_path):
    net = family.network(1)
    averaged = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    write_svd_cil(tmp_path / "svd.ckpt", net.state_dict(), averaged, wrapped=True)
    file = tmp_path / "svd.ckpt"
    for state, wanted in ((family.restore(file, averaged=False), net.state_dict()), (family.restore(file), averaged)):
        fresh = family.network(2)
        load_into(fresh, state, wanted="svd")
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in fresh.state_dict().items())


def test_a_ckpt_of_an_export_has_its_averages_where_diffusers_looks_for_them(family, tmp_path):
    """By the order of the parameters, which is not that of names in a safetensors file."""
    from diffusers.training_utils import EMAModel

    raw = family.network(1)
    averaged = {name: tensor + 1 for name, tensor in raw.state_dict().items()}
    for kind, state in (("raw", raw.state_dict()), ("ema", averaged)):
        family.export(state, tmp_path / kind)
    kept = [family.restore(tmp_path / kind) for kind in ("raw", "ema")]
    family.write_ckpt(tmp_path / "svd.ckpt", *kept)
    content = torch.load(tmp_path / "svd.ckpt", weights_only=True)
    fresh = family.network(2)
    fresh.load_state_dict(content["state_dict"])
    assert all(torch.equal(tensor, raw.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    average = EMAModel(fresh.parameters())
    average.load_state_dict(content["ema_state"])
    average.copy_to(fresh.parameters())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in fresh.state_dict().items())


def test_a_folder_that_lacks_a_part_or_has_another_is_refused_by_its_path(family, folder, tmp_path):
    with pytest.raises(ValueError, match="no folder unet in it; expected a diffusers pipeline of SVD"):
        load("svd", 4, 32, 48, "tiny", weights=str(tmp_path)).network(0)
    write_diffusers(tmp_path / "unet", family.frozen["vae"].state_dict())
    with pytest.raises(ValueError, match=r"unet: not the weights of svd: .*looks like the VAE of svd"):
        load("svd", 4, 32, 48, "tiny", weights=str(tmp_path)).network(0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((4, 32, 40, "tiny"), "multiples of 16"),
        ((4, 32, 48, "big"), "preset='big': the family svd has tiny, 512, 1024"),
    ],
)
def test_what_the_family_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        load("svd", *arguments)
    with pytest.raises(ValueError, match="has no such option"):
        load("svd", 4, 32, 48, "tiny", tokenizer="x")
