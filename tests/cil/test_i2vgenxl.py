"""I2VGen-XL as a family, at its tiny size: the same code paths as the published one; and beside diffusers' pipeline."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cil import CleanCondition, ConstantNoise, Draws, Objective, TimeNoise, guided, sample
from cil.checkpoints import read, write_safetensors
from cil.families import load
from cil.families.base import Clip, Dropped, Options
from cil.families.i2vgenxl import CLASSES, PUBLISHED, TINY, I2VGenXL, _built, middle_square
from cil.initial_noise import InitialNoise
from cil.recipes import recipe

CLIPS = [Clip("A red ball & a dog", 8.6, 3), Clip("", 0.4, 1)]


def frames(batch: int = 2, seed: int = 0, height: int = 32, width: int = 48) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 4, 3, 4, 4, generator=random)
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8).unflatten(0, (batch, 4)).permute(0, 1, 3, 4, 2)


def tiny(weights: Path | None = None) -> I2VGenXL:
    return I2VGenXL("tiny", 4, 32, 48, Options(weights=weights and str(weights)))


@pytest.fixture(scope="module")
def family() -> I2VGenXL:
    return tiny()


@pytest.fixture(scope="module")
def batch(family) -> dict[str, Tensor]:
    return family.encode(frames(), CLIPS)


@pytest.fixture(scope="module")
def published(family, tmp_path_factory) -> Path:
    """A pipeline's folder, as the libraries themselves save it."""
    folder = tmp_path_factory.mktemp("i2vgen-xl")
    frozen = family.frozen
    models = {"vae": frozen["vae"], "text_encoder": frozen["text"], "image_encoder": frozen["image"]}
    for part, model in ({"unet": family.network(3)} | models).items():
        model.save_pretrained(folder / part)
    family.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def copied(published, tmp_path) -> Path:
    return shutil.copytree(published, tmp_path / "copied")


def clean(family: I2VGenXL, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return family.condition(batch, CleanCondition(), torch.zeros(2), None)[0]


# -- encode ----------------------------------------------------------------------------------------------------------


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


def test_ids_are_cut_with_their_end_kept_and_padded_as_the_tokenizer_says(family):
    ids = family.ids(["  A  CAT\n", "x" * 500, "", "日本 \x00 é 😀"])
    assert ids.shape == (4, 77)
    assert torch.equal(ids[0], family.ids(["a cat"])[0])
    assert ids[1, -1] == ids[2, 1] == 513
    assert (ids[2, 2:] == family.tokenizer.pad_token_id).all()
    assert (ids[:, 0] == 512).all()


def test_clip_sees_the_square_in_the_middle(family):
    image = torch.zeros(1, 28, 48, 3, dtype=torch.uint8)
    image[:, :, 10:38] = torch.arange(28 * 28 * 3).reshape(28, 28, 3) % 256
    assert torch.equal(middle_square(image, 28), image[:, :, 10:38])
    assert torch.equal(middle_square(image.transpose(1, 2), 28), image[:, :, 10:38].transpose(1, 2))


def test_frames_come_back_from_the_vae_in_their_shape_and_type(family, batch):
    videos = family.decode(batch["latents"])
    assert videos.shape == (2, 4, 32, 48, 3)
    assert videos.dtype == torch.uint8


# -- condition, drop, denoise ----------------------------------------------------------------------------------------


def answer(family: I2VGenXL, net, condition: dict[str, Tensor]) -> Tensor:
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return family.denoise(net.eval(), x, torch.tensor([900, 30]), condition)


def test_the_answer_depends_on_text_image_latent_and_fps(family, batch):
    net = family.network(0)
    before = answer(family, net, clean(family, batch))
    assert before.shape == (2, *family.latent_shape)
    for name in batch:
        changed = answer(family, net, clean(family, {**batch, name: batch[name].flip(0)}))
        assert (changed - before).abs().amax() > 1e-4, name


def test_conditioning_noise_is_put_on_the_image_once_and_never_on_the_positions(family, batch):
    u, draws = torch.tensor([0.2, 0.9]), lambda: Draws([(0,), (1,)])
    noisy, level = family.condition(batch, TimeNoise(25.0), u, draws())
    condition, none = family.condition(batch, CleanCondition(), u, draws())
    assert torch.equal(none, torch.zeros(2))
    assert all(torch.equal(noisy[name], condition[name]) for name in ("text", "clip", "fps"))
    assert torch.equal(condition["image"][:, 0], batch["latents"][:, 0].float())
    for held in (noisy, condition):
        for i in range(1, 4):
            assert (held["image"][:, i] == torch.tensor(i / 3)).all()
    # 96 numbers a sample: the deviation within five standard errors.
    change = (noisy["image"] - condition["image"])[:, 0]
    torch.testing.assert_close(change.flatten(1).std(1), level, rtol=5 / (2 * 96) ** 0.5, atol=0)


def test_what_the_unet_concatenates_and_what_it_makes_tokens_of_is_the_same_noised_latent(family, batch):
    net, seen = family.network(0), {}
    for name in ("image_latents_proj_in", "image_latents_context_embedding"):
        getattr(net, name).register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    noisy, _ = family.condition(batch, ConstantNoise(2.0), torch.zeros(2), Draws([(0,), (1,)]))
    answer(family, net, noisy)
    concatenated = seen["image_latents_proj_in"].unflatten(0, (2, 4))
    assert torch.equal(concatenated, noisy["image"])
    assert torch.equal(seen["image_latents_context_embedding"], concatenated[:, 0])
    assert not torch.equal(concatenated[:, 0], batch["latents"][:, 0].float())


def test_one_frame_has_no_positions(batch):
    alone = I2VGenXL("tiny", 1, 32, 48, Options())
    condition = clean(alone, {**batch, "latents": batch["latents"][:, :1]})
    assert condition["image"].shape == (2, 1, 4, 4, 6)
    assert answer(alone, alone.network(0), condition).shape == (2, 1, 4, 4, 6)


def test_drops_take_text_and_image_each_for_itself_and_leave_the_latent(family, batch):
    condition = clean(family, batch)
    dropped = family.drop(condition, Dropped(text=torch.tensor([True, False]), image=torch.tensor([False, True])))
    empty = family.encode(frames(), [Clip(), Clip()])["text"].float()
    torch.testing.assert_close(dropped["text"][0], empty[0], rtol=2e-3, atol=2e-3)  # fp16 in the cache
    assert torch.equal(dropped["text"][1], condition["text"][1])
    assert torch.equal(dropped["clip"][0], condition["clip"][0])
    assert not dropped["clip"][1].any()
    assert torch.equal(dropped["image"], condition["image"])
    assert torch.equal(dropped["fps"], condition["fps"])


# -- training and sampling -------------------------------------------------------------------------------------------


def test_training_steps_lower_the_loss_and_reach_every_parameter(family, batch):
    """In the first step not those before the last of each temporal convolution, which begins at zero."""
    net, objective = family.network(0).train(), Objective(recipe("i2vgenxl").noise)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses, silent, seconds = [], [], []
    for _ in range(8):
        begin = time.perf_counter()
        loss = objective(family, net, batch, Draws([(0,), (1,)])).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        silent.append([name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0])
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all("temp_convs." in name and ".conv4.3." not in name for name in silent[0])
    assert silent[1] == []
    assert min(seconds) < 1


def test_a_training_step_draws_nothing_but_its_samples_draws(family, batch):
    net, objective = family.network(0).train(), Objective()
    with torch.no_grad():
        torch.nn.init.normal_(net.mid_block.temp_convs[0].conv4[-1].weight)  # or dropout before it would not show
        first, second = (objective(family, net, batch, Draws([(0,), (1,)])).loss for _ in range(2))
    assert torch.equal(first, second)


def test_a_network_is_a_function_of_the_seed_and_leaves_the_global_generator_alone(family):
    before = torch.get_rng_state()
    states = [family.network(seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv_in.weight"], states[2]["conv_in.weight"])


def test_a_video_is_sampled_from_M_with_guidance(family, batch):
    net = family.network(0).eval()
    condition = clean(family, batch)
    nothing = family.drop(condition, Dropped.all(2))
    times = family.process.times(3, 940)
    draws = Draws([(0,), (1,)])
    x = InitialNoise.standard(family.latent_shape).sample(family.process, times[0], 2, draws)
    denoise = guided(*(lambda x, t, c=c: family.denoise(net, x, t, c) for c in (condition, nothing)), 9.0, 0.7)
    video = family.decode(sample(denoise, x, family.process, times, family.prediction))
    assert video.shape == (2, 4, 32, 48, 3)


# -- beside diffusers' pipeline --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(published):
    """Of the folder's own loading by the libraries, not by ours; with guidance, as it is used."""
    from diffusers import AutoencoderKL, DDIMScheduler, I2VGenXLPipeline, I2VGenXLUNet
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    pipeline = I2VGenXLPipeline(
        vae=AutoencoderKL.from_pretrained(published / "vae", local_files_only=True),
        text_encoder=CLIPTextModel.from_pretrained(published / "text_encoder", local_files_only=True),
        tokenizer=CLIPTokenizer.from_pretrained(published / "tokenizer", model_max_length=77, local_files_only=True),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(published / "image_encoder", local_files_only=True),
        feature_extractor=CLIPImageProcessor(crop_size=28, size=28),
        unet=I2VGenXLUNet.from_pretrained(published / "unet", local_files_only=True),
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
            timestep_spacing="leading",
            steps_offset=1,
            clip_sample=False,
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline._guidance_scale = 9.0
    return pipeline


def at_the_mode(monkeypatch) -> None:
    """The pipeline samples the VAE's posterior of the image; we keep its mode."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def pictures(batch: int = 2):
    from PIL import Image

    return [Image.fromarray(each.numpy()) for each in frames(batch)[:, 0]]


def test_the_image_latents_are_the_pipelines(published, batch, pipeline, monkeypatch):
    at_the_mode(monkeypatch)
    image = pipeline.video_processor.preprocess(pictures())
    with torch.no_grad():
        theirs = pipeline.prepare_image_latents(image, "cpu", num_frames=4, num_videos_per_prompt=1)
    ours = clean(tiny(published), batch)["image"].transpose(1, 2)
    assert torch.equal(ours[:, :, 1:], theirs[2:, :, 1:])
    torch.testing.assert_close(ours, theirs[2:], rtol=1e-3, atol=1e-3)  # fp16 in the cache
    assert torch.equal(theirs[:2], theirs[2:])  # in the unconditional branch too


def test_text_and_its_ids_are_the_pipelines(family, pipeline, monkeypatch):
    """transformers 5 took away what `encode_prompt` calls with clip_skip; the tower's own names say the same."""
    captions = [clip.caption for clip in CLIPS]
    ids = pipeline.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(family.ids(captions), ids.input_ids)
    monkeypatch.setitem(vars(pipeline.text_encoder), "text_model", pipeline.text_encoder)
    with torch.no_grad():
        text, nothing = pipeline.encode_prompt(captions, "cpu", 1, clip_skip=1)
        assert torch.equal(family._text(captions), text)
        torch.testing.assert_close(family._empty_caption.expand(2, -1, -1), nothing)


def test_clips_embedding_is_the_pipelines_of_the_same_square(family, batch, pipeline):
    from PIL import Image

    seen = [Image.fromarray(image.numpy()) for image in batch["image"]]
    with torch.no_grad():
        nothing, theirs = pipeline._encode_image(seen, "cpu", 1).chunk(2)
    torch.testing.assert_close(clean(family, batch)["clip"], theirs[:, 0], rtol=1e-5, atol=1e-5)
    assert not nothing.any()


@pytest.mark.parametrize(("height", "width"), [(128, 192), (160, 224), (64, 64)])
def test_the_square_is_the_pipelines_within_its_detour(height, width):
    import numpy as np
    from diffusers.pipelines.deprecated.i2vgen_xl.pipeline_i2vgen_xl import _center_crop_wide, _resize_bilinear
    from PIL import Image

    (image,) = frames(1, height=height, width=width)[:, 0]
    theirs = _resize_bilinear(_center_crop_wide(Image.fromarray(image.numpy()), (width, width)), (56, 56))
    ours = middle_square(image[None], 56)[0].int()
    # A picture of slopes; scaling up first moves it by less than a pixel.
    assert (ours - torch.from_numpy(np.array(theirs)).int()).abs().float().mean() < 2


def test_the_schedule_is_the_pipelines(family, pipeline):
    torch.testing.assert_close(
        family.process.alphas_bar.float(), pipeline.scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6
    )


def test_every_call_that_the_pipeline_makes_of_the_unet_is_ours_with_the_same_answer(published, pipeline, monkeypatch):
    at_the_mode(monkeypatch)
    monkeypatch.setitem(vars(pipeline.text_encoder), "text_model", pipeline.text_encoder)
    family, calls = tiny(published), []
    hook = pipeline.unet.register_forward_hook(
        lambda _, args, told, answer: calls.append((*args, told, answer[0])), with_kwargs=True
    )
    x = torch.randn(2, 4, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    captions = ["A red ball", "a dog"]
    pipeline(
        captions,
        pictures(),
        height=32,
        width=48,
        target_fps=8,
        num_frames=4,
        num_inference_steps=3,
        latents=x.transpose(1, 2),
        output_type="latent",
    )
    hook.remove()
    assert len(calls) == 3
    net = family.network(0).eval()
    condition = clean(family, family.encode(frames(), [Clip(caption, 8.0) for caption in captions]))
    # The cache is fp16, and the pipeline's square took its detour: those two are given.
    condition["text"], condition["clip"] = family._text(captions), calls[0][2]["image_embeddings"][2:, 0]
    nothing = family.drop(condition, Dropped.all(2))
    for sample_, t, told, theirs in calls:
        both = {name: torch.cat([nothing[name], condition[name]]) for name in condition}
        assert torch.equal(told["encoder_hidden_states"], both["text"])
        assert torch.equal(told["fps"], both["fps"])
        assert torch.equal(told["image_embeddings"][:, 0], both["clip"])
        torch.testing.assert_close(told["image_latents"].transpose(1, 2), both["image"], rtol=1e-3, atol=1e-3)
        both["image"] = told["image_latents"].transpose(1, 2)
        with torch.no_grad():
            ours = family.denoise(net, sample_.transpose(1, 2), t.expand(4), both)
        torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=0, atol=1e-6)


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_published_folder_is_read_and_its_unet_written_to_the_bit(family, published, batch, tmp_path):
    again = tiny(published)
    net, state = again.network(0), family.network(3).state_dict()
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    for name, tensor in again.encode(frames(), CLIPS).items():
        assert torch.equal(tensor, batch[name]), name
    assert torch.equal(clean(again, batch)["clip"], clean(family, batch)["clip"])
    names = again.export(net.state_dict(), tmp_path)
    assert names == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    first, second = read(published / "unet"), read(tmp_path / "unet")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (json.loads((folder / "unet/config.json").read_text()) for folder in (published, tmp_path))
    assert first == second
    restored = family.restore(tmp_path)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())


def test_an_exported_folder_is_loaded_by_diffusers(family, batch, tmp_path):
    from diffusers import I2VGenXLUNet

    net = family.network(5)
    family.export(net.state_dict(), tmp_path)
    loaded, told = I2VGenXLUNet.from_pretrained(tmp_path / "unet", local_files_only=True, output_loading_info=True)
    assert not any(told.values()), told
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    condition = clean(family, batch)
    assert torch.equal(answer(family, loaded, condition), answer(family, net, condition))


def test_a_network_that_was_read_can_be_trained_and_leaves_its_file_as_it_is(published, batch):
    family = tiny(published)
    before = {name: tensor.clone() for name, tensor in read(published / "unet").items()}
    net = family.network(0).train()
    Objective()(family, net, batch, Draws([(0,), (1,)])).loss.mean().backward()
    torch.optim.AdamW(net.parameters(), lr=1.0).step()
    assert not torch.equal(net.state_dict()["conv_in.weight"], before["conv_in.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in read(published / "unet").items())
    assert torch.equal(family.network(0).state_dict()["conv_in.weight"], before["conv_in.weight"])


def test_files_of_half_precision_and_of_older_names_are_read(family, copied):
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = copied / part / f"{file}.safetensors"
        prefix = "text_model." if part == "text_encoder" else ""
        state = {prefix + name: tensor.half() for name, tensor in read(path).items()}
        if prefix:
            state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
        path.unlink()
        write_safetensors(path, state)
    again = tiny(copied)
    assert {p.dtype for p in again.network(0).parameters()} == {torch.float32}
    torch.testing.assert_close(again._text(["a dog"]), family._text(["a dog"]), rtol=0.01, atol=0.01)


def test_a_text_tower_has_the_depth_that_its_folder_says(copied):
    shutil.rmtree(copied / "text_encoder")
    deeper = _built("text_encoder", {**TINY["text_encoder"], "num_hidden_layers": 3}).eval()
    deeper.save_pretrained(copied / "text_encoder")
    family = tiny(copied)
    with torch.no_grad():
        states = deeper(family.ids(["a dog"]), output_hidden_states=True).hidden_states
        assert torch.equal(family._text(["a dog"]), deeper.final_layer_norm(states[2]))


def test_weights_that_are_missing_left_over_or_of_another_shape_are_named(copied):
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    state = read(path)
    state["surplus"] = state.pop("conv_out.bias").clone()
    state["conv_in.bias"] = state["conv_in.bias"][:3].clone()
    write_safetensors(path, state)
    said = (
        r"unet: not the weights of i2vgenxl: of \d+, 1 missing \(conv_out\.bias\), 1 left over \(surplus\), "
        r"1 of another shape \(conv_in\.bias \[3\], not \[32\]\)"
    )
    with pytest.raises(ValueError, match=said):
        tiny(copied).network(0)
    path = copied / "image_encoder" / "model.safetensors"
    state = read(path)
    del state["visual_projection.weight"]
    write_safetensors(path, state)
    with pytest.raises(ValueError, match=r"image_encoder: not the weights of the image_encoder .*1 missing"):
        _ = tiny(copied).frozen


def test_a_folder_that_is_none_of_this_family_is_refused_by_what_it_is(copied, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no folder; expected a diffusers pipeline's folder with unet, vae"):
        tiny(tmp_path / "nowhere").network(0)
    with pytest.raises(
        ValueError, match=r"not of the preset 704 of i2vgenxl: block_out_channels \[32, 64\], not \[320,"
    ):
        I2VGenXL("704", 16, 704, 1280, Options(weights=str(copied))).network(0)
    file = copied / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"attention_head_dim": 16}))  # fits no other way than by its figures
    with pytest.raises(ValueError, match="attention_head_dim 16, not 8"):
        tiny(copied).network(0)
    file.write_text(json.dumps(config | {"_class_name": "UNet3DConditionModel"}))
    with pytest.raises(ValueError, match="of a UNet3DConditionModel, and i2vgenxl needs a I2VGenXLUNet"):
        tiny(copied).network(0)
    file.write_text("[")
    with pytest.raises(ValueError, match=r"unet/config\.json: damaged; expected a JSON object"):
        tiny(copied).network(0)
    shutil.rmtree(copied / "vae")
    with pytest.raises(ValueError, match=r"no vae/config\.json; expected a diffusers pipeline's folder"):
        tiny(copied).network(0)


def test_the_published_sizes_are_the_libraries_and_the_towers_openclips(published):
    """On the meta device: the UNet's figures are its class's own, and the towers are those of ViT-H."""
    from diffusers import I2VGenXLUNet

    from cil.nets.autoencoder import Autoencoder
    from cil.nets.openclip import ImageTower, TextTower

    with torch.device("meta"):
        models = {part: _built(part, PUBLISHED[part]) for part in CLASSES}
        wanted = {
            "unet": I2VGenXLUNet(),
            "vae": Autoencoder().build(),
            "image_encoder": ImageTower().build(),
            "text_encoder": TextTower().build().text_model,
        }
    for part, model in models.items():
        found, needed = ({name: t.shape for name, t in each.state_dict().items()} for each in (model, wanted[part]))
        assert found == needed, part
    assert sum(p.numel() for p in models["unet"].parameters()) // 10**6 == 1420
    assert dict(models["unet"].config) | {"_use_default_values": 0} == dict(wanted["unet"].config) | {
        "_use_default_values": 0
    }


def test_the_published_tokenizer_is_that_of_the_folder_unless_another_is_named(published, tmp_path):
    published_size = I2VGenXL("256", 16, 256, 448, Options(weights=str(published)))
    assert published_size.ids(["a dog"]).tolist() == tiny().ids(["a dog"]).tolist()
    for family, said in (
        (I2VGenXL("256", 16, 256, 448, Options()), "tokenizer=None"),
        (I2VGenXL("256", 16, 256, 448, Options(tokenizer=str(tmp_path / "none"))), "none: no folder"),
    ):
        with pytest.raises(ValueError, match=said):
            family.ids(["a dog"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((16, 704, 1270, "704"), "multiples of 64"),
        ((4, 32, 40, "tiny"), "multiples of 16"),
        ((0, 32, 48, "tiny"), "0 x 32 x 48"),
        ((4, 32, 48, "huge"), "preset='huge': the family i2vgenxl has tiny, 256, 704"),
    ],
)
def test_what_the_family_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        load("i2vgenxl", *arguments)
