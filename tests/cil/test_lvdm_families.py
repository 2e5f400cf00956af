"""DynamiCrafter and VideoCrafter1 as families, at their tiny sizes: the same code paths as the published ones."""

import pytest
import torch
from torch import Tensor

from cil import CleanCondition, Draws, Objective, TimeNoise, guided, sample
from cil.checkpoints import read, write_lvdm
from cil.families import Family, load
from cil.families.base import Clip, Dropped
from cil.initial_noise import InitialNoise
from cil.nets.openclip import stretched

NAMES = ("dynamicrafter", "videocrafter1")
CLIPS = [Clip("A red ball &amp; a dog", 8.6, 3), Clip("", 0.4, 1)]


def frames(batch: int = 2, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 4, 3, 4, 4, generator=random)
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(32, 48), mode="bilinear")
    return (smooth * 255).to(torch.uint8).unflatten(0, (batch, 4)).permute(0, 1, 3, 4, 2)


@pytest.fixture(scope="module", params=NAMES)
def family(request) -> Family:
    return load(request.param, 4, 32, 48, "tiny")


@pytest.fixture(scope="module")
def batch(family) -> dict[str, Tensor]:
    return family.encode(frames(), CLIPS)


def test_what_is_cached_of_a_clip_has_the_shapes_and_types_that_the_family_says(family, batch):
    assert {name: (list(t.shape[1:]), t.dtype) for name, t in batch.items()} == {
        "latents": ([4, 4, 4, 6], torch.float16),
        "text": ([77, 32], torch.float16),
        "image": ([28, 28, 3], torch.uint8),
        "rate": ([], torch.int64),
    }
    assert tuple(batch["latents"].shape[1:]) == family.latent_shape
    assert batch["rate"].tolist() == [8, 1]  # floor(fps), at least 1


def test_a_clips_tensors_are_independent_of_the_batch_it_is_in(family, batch):
    for i in range(2):
        alone = family.encode(frames()[i : i + 1], CLIPS[i : i + 1])
        for name, tensor in alone.items():
            # Captions of a batch go through the text tower together; fp16 keeps eleven bits.
            torch.testing.assert_close(tensor[0], batch[name][i], rtol=2e-3, atol=2e-3)
        assert torch.equal(alone["latents"][0], batch["latents"][i])


def test_ids_are_cleaned_cut_with_their_end_kept_and_padded_with_zeros(family):
    ids = family.ids(["  A  CAT&amp;amp;dog\n", "x" * 500, ""])
    assert ids.shape == (3, 77)
    assert torch.equal(ids[0], family.ids(["a cat&dog"])[0])
    assert ids[1, -1] == ids[2, 1] == 513
    assert (ids[2, 2:] == 0).all()
    assert (ids[:, 0] == 512).all()


def test_a_broken_caption_still_becomes_ids(family):
    for caption in (
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        "\x00\x01",
        "日本 é",
        " " * 2000,
    ):
        assert family.ids([caption]).shape == (1, 77)


def test_frames_come_back_from_the_vae_in_their_shape_and_type(family, batch):
    videos = family.decode(batch["latents"])
    assert videos.shape == (2, 4, 32, 48, 3)
    assert videos.dtype == torch.uint8


def test_clips_picture_is_what_is_cached_of_an_image_within_rounding(family):
    image = frames()[:, 0]
    seen = stretched(image, 28)
    assert seen.shape == (2, 28, 28, 3)
    assert torch.equal(stretched(seen, 28), seen)


def answer(family: Family, net, condition: dict[str, Tensor]) -> Tensor:
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return family.denoise(net.eval(), x, torch.tensor([900, 30]), condition)


def test_the_answer_depends_on_text_image_and_rate(family, batch):
    net = family.network(0)
    condition, _ = family.condition(batch, CleanCondition(), torch.zeros(2), None)
    before = answer(family, net, condition)
    assert before.shape == (2, *family.latent_shape)
    for name in ("text", "image", "rate"):
        other = {**batch, name: batch[name].flip(0)}
        if name == "image" and "image" in condition:
            other["latents"] = batch["latents"].flip(0)
        changed = answer(family, net, family.condition(other, CleanCondition(), torch.zeros(2), None)[0])
        assert (changed - before).abs().amax() > 1e-4, name


def test_conditioning_noise_is_put_where_the_family_takes_its_image(family, batch):
    noisy, level = family.condition(batch, TimeNoise(25.0), torch.tensor([0.2, 0.9]), Draws([(0,), (1,)]))
    clean, none = family.condition(batch, CleanCondition(), torch.tensor([0.2, 0.9]), Draws([(0,), (1,)]))
    assert torch.equal(none, torch.zeros(2))
    assert torch.equal(noisy["clip"], clean["clip"])
    if family.name == "dynamicrafter":
        change = noisy["image"] - clean["image"]
        assert torch.equal(change[:, 0], change[:, 3])  # once, before it is repeated
        assert torch.equal(clean["image"][:, 2], batch["latents"][:, 0].float())
    else:
        change = noisy["token_noise"]
        assert change.shape == (2, 16, 32)
        assert not clean["token_noise"].any()
    # 96 numbers or more a sample: the deviation within five standard errors.
    torch.testing.assert_close(change.flatten(1).std(1), level, rtol=5 / (2 * 96) ** 0.5, atol=0)


def test_drops_take_text_and_image_each_for_itself(family, batch):
    condition, _ = family.condition(batch, CleanCondition(), torch.zeros(2), None)
    dropped = family.drop(condition, Dropped(text=torch.tensor([True, False]), image=torch.tensor([False, True])))
    empty = family.encode(frames(), [Clip(), Clip()])["text"].float()
    torch.testing.assert_close(dropped["text"][0], empty[0], rtol=2e-3, atol=2e-3)  # fp16 in the cache
    assert torch.equal(dropped["text"][1], condition["text"][1])
    assert torch.equal(dropped["clip"][0], condition["clip"][0])
    grey = {**batch, "image": torch.full_like(batch["image"], 128)}
    blank = family.condition(grey, CleanCondition(), torch.zeros(2), None)[0]["clip"]
    torch.testing.assert_close(dropped["clip"][1], blank[1])


def test_a_training_step_lowers_the_loss_and_reaches_unet_and_projector(family, batch):
    net, objective = family.network(0).train(), Objective(TimeNoise(1.0))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = objective(family, net, batch, Draws([(0,), (1,)])).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert silent == []


def test_a_video_is_sampled_from_M_with_guidance(family, batch):
    net = family.network(0).eval()
    condition, _ = family.condition(batch, CleanCondition(), torch.zeros(2), None)
    nothing = family.drop(condition, Dropped.all(2))
    times = family.process.times(3, 940)
    draws = Draws([(0,), (1,)])
    x = InitialNoise.standard(family.latent_shape).sample(family.process, times[0], 2, draws)
    denoise = guided(*(lambda x, t, c=c: family.denoise(net, x, t, c) for c in (condition, nothing)), 7.5, 0.7)
    video = family.decode(sample(denoise, x, family.process, times, family.prediction))
    assert video.shape == (2, 4, 32, 48, 3)


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_published_file_written_and_read_is_the_same_to_the_bit(family, tmp_path):
    net = family.network(3)
    (name,) = family.export(net.state_dict(), tmp_path)
    again = load(family.name, 4, 32, 48, "tiny", weights=str(tmp_path / name))
    for key, tensor in again.network(0).state_dict().items():
        assert torch.equal(tensor, net.state_dict()[key]), key
    for one, other in ((again.frozen["vae"], family.frozen["vae"]), (again.frozen["text"], family.frozen["text"])):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    again.export(again.network(0).state_dict(), tmp_path / "twice")
    first, second = read(tmp_path / name), read(tmp_path / "twice" / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(again.encode(frames(), CLIPS)["text"], family.encode(frames(), CLIPS)["text"])
    restored = family.restore(tmp_path)
    assert all(torch.equal(restored[key], tensor) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_a_published_file_are_the_references(name, golden):
    """On the meta device, at the published size."""
    family = load(name, 16, 320, 512, "512")
    state = family._expected
    assert {key: list(tensor.shape) for key, tensor in state.items()} == golden[f"{name}_checkpoint_full_keys"]


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_in_a_file_is_the_references(name, golden):
    buffers = load(name, 16, 320, 512, "512").buffers()
    figures = golden["schedules"][name]
    for key, wanted in figures["buffers_float32"].items():
        ours = buffers[key][[int(t) for t in wanted]]
        torch.testing.assert_close(ours, torch.tensor(list(wanted.values())), rtol=2e-7, atol=0)
    wanted = figures["scale_arr"]["values"]
    torch.testing.assert_close(
        buffers["scale_arr"][[int(t) for t in wanted]], torch.tensor(list(wanted.values())), rtol=2e-7, atol=0
    )
    assert buffers["scale_arr"].shape == (1400,)


@pytest.mark.parametrize("published", [False, True])
def test_an_exported_file_has_the_schedule_that_was_trained_with(published, family, tmp_path):
    """Also where the file that it began with has another one."""
    (name,) = family.export(family.network(0).state_dict(), tmp_path)
    weights = str(tmp_path / name) if published else None
    shifted = load(family.name, 4, 32, 48, "tiny", weights=weights, shift=2.0)
    (name,) = shifted.export(family.network(1).state_dict(), tmp_path / "shifted")
    before, after = (read(folder / name) for folder in (tmp_path, tmp_path / "shifted"))
    abar = before["alphas_cumprod"].double()
    wanted = abar / (abar + 4 * (1 - abar))
    torch.testing.assert_close(after["alphas_cumprod"].double(), wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close((1 - after["betas"].double()).cumprod(0), wanted, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(after["alphas_cumprod"], before["alphas_cumprod"], rtol=0.1)
    if "scale_arr" in before:
        assert torch.equal(after["scale_arr"], before["scale_arr"])


def test_a_file_of_the_other_family_or_with_something_missing_is_refused_by_name(family, tmp_path):
    other = load(*(name for name in NAMES if name != family.name), 4, 32, 48, "tiny")
    (name,) = other.export(other.network(0).state_dict(), tmp_path)
    with pytest.raises(ValueError, match=rf"{name}: not the weights of {family.name}.*looks like {other.name}"):
        load(family.name, 4, 32, 48, "tiny", weights=str(tmp_path / name)).network(0)
    (name,) = family.export(family.network(0).state_dict(), tmp_path)
    state = read(tmp_path / name)
    del state["model.diffusion_model.out.2.bias"]
    write_lvdm(tmp_path / "less.ckpt", state)
    with pytest.raises(ValueError, match=r"1 missing \(model\.diffusion_model\.out\.2\.bias\)"):
        load(family.name, 4, 32, 48, "tiny", weights=str(tmp_path / "less.ckpt")).network(0)


def test_files_of_256x256_name_the_rate_a_frame_stride():
    family = load("dynamicrafter", 16, 256, 256, "256")
    assert family.process.rescale == 1.0
    assert family._rate(Clip("", 8.0, 3)) == 3
    assert load("dynamicrafter", 16, 576, 1024, "1024").process.rescale == 0.3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((4, 64, 64, "512"), "frames=4: published weights"),
        ((16, 320, 510, "512"), "multiples of 64"),
        ((4, 32, 40, "tiny"), "multiples of 16"),
        ((4, 32, 48, "huge"), "preset='huge': the family dynamicrafter has tiny, 256, 512, 1024"),
    ],
)
def test_what_the_family_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        load("dynamicrafter", *arguments)


def test_a_file_of_another_presets_process_is_refused(tmp_path):
    family = load("dynamicrafter", 4, 32, 48, "tiny")
    family.export(family.network(0).state_dict(), tmp_path)
    state = read(tmp_path / "dynamicrafter.ckpt")
    write_lvdm(tmp_path / "other.ckpt", state | {"scale_arr": state["scale_arr"].clamp_max(0.3)})
    with pytest.raises(
        ValueError, match=r"other.ckpt: trained with a dynamic rescale by 0.3, and the preset tiny by 0.7"
    ):
        family.restore(tmp_path / "other.ckpt")


def test_a_folder_is_taken_for_the_file_in_it_or_refused(tmp_path):
    family = load("videocrafter1", 4, 32, 48, "tiny")
    family.export(family.network(1).state_dict(), tmp_path)
    again = load("videocrafter1", 4, 32, 48, "tiny", weights=str(tmp_path))
    assert torch.equal(*(net.network(1).state_dict()["image_proj_model.latents"] for net in (family, again)))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: a folder; expected the .ckpt of videocrafter1"):
        family.restore(tmp_path / "none")
