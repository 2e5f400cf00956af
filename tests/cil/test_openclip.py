"""OpenCLIP's towers through transformers: names, round trips, tokens, and frames as LVDM prepares them."""

import math

import numpy as np
import pytest
import torch
from golden.fill import fill_state
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.nn import functional as F

from cil.nets.openclip import MEAN, STD, ImageTower, TextTower, Tower, clip_pixels, image_tokens, text_tokens

TEXT = TextTower(width=32, layers=3, heads=4, projection=24, tokens=11, vocabulary=50)
IMAGE = ImageTower(width=40, layers=3, heads=4, projection=24, size=28, patch=7)
TOWERS = pytest.mark.parametrize("tower", [TEXT, IMAGE], ids=["text", "image"])
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}  # of activations up to 7; measured 4e-15 and 3e-6
PIXELS = 2e-4  # torch takes positions in float32, 3e-5 of a pixel off; between pixels of noise values change by 4


def open_clip_state(tower: Tower) -> dict[str, Tensor]:
    """Of weights by which every fault shows (golden/README.md), in open_clip's names."""
    shapes = {
        name: value.shape for name, value in tower.to_open_clip(tower.build().state_dict(), extras(tower)).items()
    }
    return {name: torch.from_numpy(value) for name, value in fill_state(shapes).items()}


def extras(tower: Tower) -> dict[str, Tensor]:
    return {name: torch.full((2, 3), i + 0.5) for i, name in enumerate(tower.extras)}


def loaded(tower, state):
    model = tower.build().to(next(iter(state.values())).dtype)
    model.load_state_dict(tower.to_transformers(state)[0], strict=True)
    return model.eval()


# -- open_clip's transformer, in our own words -------------------------------------------------------------------------


def normed(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)


def after_block(x: Tensor, state: dict[str, Tensor], name: str, heads: int, mask: Tensor | None) -> Tensor:
    """x [L, B, C]"""
    y = normed(x, state, f"{name}.ln_1")
    inward = state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"]
    outward = state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"]
    x = (
        x
        + F.multi_head_attention_forward(
            *(y, y, y, y.shape[-1], heads, *inward, None, None, False, 0.0, *outward),
            need_weights=False,
            attn_mask=mask,
        )[0]
    )
    y = normed(x, state, f"{name}.ln_2") @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"]
    y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    return x + y @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]


def text_tokens_of_open_clip(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    x = (state["token_embedding.weight"][ids] + state["positional_embedding"]).transpose(0, 1)
    future = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
    for layer in range(TEXT.layers - 1):
        x = after_block(x, state, f"transformer.resblocks.{layer}", TEXT.heads, future)
    return normed(x.transpose(0, 1), state, "ln_final")


def image_tokens_of_open_clip(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    patches = F.unfold(pixels, IMAGE.patch, stride=IMAGE.patch).mT @ state["visual.conv1.weight"].flatten(1).T
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    x = normed(x, state, "visual.ln_pre").transpose(0, 1)
    for layer in range(IMAGE.layers):
        x = after_block(x, state, f"visual.transformer.resblocks.{layer}", IMAGE.heads, None)
    return x.transpose(0, 1)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@torch.no_grad()
def test_text_tokens_are_what_leaves_open_clips_last_block_but_one(dtype):
    state = {name: tensor.to(dtype) for name, tensor in open_clip_state(TEXT).items()}
    ids = torch.randint(TEXT.vocabulary, (3, TEXT.tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 7:] = 0  # padding, which is attended to
    answer, wanted = text_tokens(loaded(TEXT, state), ids), text_tokens_of_open_clip(state, ids)
    assert answer.shape == (3, TEXT.tokens, TEXT.width)
    torch.testing.assert_close(answer, wanted, rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@torch.no_grad()
def test_image_tokens_are_all_that_leave_open_clips_last_block(dtype, reference_input):
    state = {name: tensor.to(dtype) for name, tensor in open_clip_state(IMAGE).items()}
    pixels = reference_input("pixels", 2, 3, IMAGE.size, IMAGE.size).to(dtype)
    answer, wanted = image_tokens(loaded(IMAGE, state), pixels), image_tokens_of_open_clip(state, pixels)
    assert answer.shape == (2, 1 + (IMAGE.size // IMAGE.patch) ** 2, IMAGE.width)
    torch.testing.assert_close(answer, wanted, rtol=0, atol=ROUNDING[dtype])


def test_ids_that_fill_no_context_are_refused():
    with pytest.raises(ValueError, match=r"ids of shape \[2, 10\]: \[B, 11\]"):
        text_tokens(TEXT.build(), torch.zeros(2, 10, dtype=torch.long))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dynamicrafter", "videocrafter1"])
@pytest.mark.parametrize(
    ("tower", "prefix"), [(TextTower(), "cond_stage_model.model."), (ImageTower(), "embedder.model.")]
)
def test_names_and_shapes_are_those_of_the_published_checkpoints(family, tower, prefix, golden):
    whole = golden[f"{family}_checkpoint_full_keys"]
    wanted = {name.removeprefix(prefix): shape for name, shape in whole.items() if name.startswith(prefix)}
    with torch.device("meta"):
        aside = {name: torch.empty(wanted[name]) for name in tower.extras}  # transformers cannot say their shapes
        state = tower.to_open_clip(tower.build().state_dict(), aside)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == wanted


@TOWERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_state_is_bit_for_bit_the_same_after_the_way_there_and_back(tower, dtype):
    given = {name: tensor.to(dtype) for name, tensor in open_clip_state(tower).items()}
    returned = tower.to_open_clip(*tower.to_transformers(given))
    assert returned.keys() == given.keys()
    assert [name for name in given if not torch.equal(returned[name], given[name])] == []


@TOWERS
def test_a_models_state_is_bit_for_bit_the_same_after_the_way_back_and_there(tower):
    state, aside = tower.build().state_dict(), extras(tower)
    ours, kept = tower.to_transformers(tower.to_open_clip(state, aside))
    assert ours.keys() == state.keys()
    assert [name for name in state if not torch.equal(ours[name], state[name])] == []
    assert kept.keys() == aside.keys()
    assert all(kept[name] is aside[name] for name in aside)


@TOWERS
def test_the_projection_to_the_common_width_is_the_transpose_of_open_clips(tower):
    given = open_clip_state(tower)
    model, x = loaded(tower, given), torch.randn(2, tower.width)
    projection = model.text_projection if tower is TEXT else model.visual_projection
    torch.testing.assert_close(projection(x), x @ given[tower.turned], rtol=1e-6, atol=1e-6)


@TOWERS
def test_a_missing_and_an_unknown_tensor_are_named(tower):
    given = open_clip_state(tower)
    wrong = {name: tensor for name, tensor in given.items() if name != "logit_scale"} | {"attn_mask": torch.ones(2)}
    with pytest.raises(ValueError, match=r"1 missing: logit_scale; 1 unknown: attn_mask$"):
        tower.to_transformers(wrong)
    state, aside = tower.to_transformers(given)
    with pytest.raises(ValueError, match=r"extras .* 1 missing: logit_scale$"):
        tower.to_open_clip(state, {name: tensor for name, tensor in aside.items() if name != "logit_scale"})
    name = f"{tower.root[1]}.2.self_attn.k_proj.bias"
    del state[name]
    with pytest.raises(ValueError, match=f"1 missing: {name}$"):
        tower.to_open_clip(state, aside)


def test_of_many_wrong_names_ten_are_shown_and_all_are_counted():
    given = open_clip_state(TEXT)
    with pytest.raises(ValueError, match=f"; {len(given)} unknown: ") as error:
        TEXT.to_transformers({f"cond_stage_model.model.{name}": tensor for name, tensor in given.items()})
    assert str(error.value).count("cond_stage_model.") == 10


@pytest.mark.parametrize(
    ("kind", "sizes", "told"),
    [
        (TextTower, {"width": 100}, "width=100: a multiple of heads=16"),
        (ImageTower, {"size": 225}, "size=225: a multiple"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(kind, sizes, told):
    with pytest.raises(ValueError, match=told):
        kind(**sizes)


# -- frames ------------------------------------------------------------------------------------------------------------


def cubic(length: int, size: int) -> np.ndarray:
    """[size, length]: cubic convolution with a = -0.75 between pixels; first and last pixels stay where they are."""
    matrix = np.zeros((size, length))
    for i in range(size):
        at = i * (length - 1) / (size - 1)
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            d, a = abs(at - j), -0.75
            weight = ((a + 2) * d - (a + 3)) * d * d + 1 if d <= 1 else ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            matrix[i, min(max(j, 0), length - 1)] += weight
    return matrix


def resized_as_lvdm(frames: np.ndarray, size: int) -> np.ndarray:
    x = frames / 255.0
    for axis in (1, 2):
        factor = x.shape[axis] / size
        if factor > 1:
            reach = max(int(2 * (factor - 1)), 3) // 2
            x = gaussian_filter1d(x, (factor - 1) / 2, axis=axis, mode="mirror", radius=reach)
    return cubic(x.shape[1], size) @ x.transpose(0, 3, 1, 2) @ cubic(x.shape[2], size).T


def random_frames(*shape: int) -> Tensor:
    return torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(320, 512), (200, 300), (90, 100), (1080, 225), (224, 226), (2, 700)], ids=str)
def test_frames_are_blurred_resized_and_normalised_as_lvdm_does(shape):
    frames = random_frames(2, *shape)
    wanted = resized_as_lvdm(frames.numpy(), 224)
    wanted = (wanted - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    pixels = clip_pixels(frames)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels, wanted, rtol=0, atol=PIXELS)


def test_frames_are_what_kornia_makes_of_them():
    """Figures of kornia 0.6.12: resize(.., (224, 224), "bicubic", align_corners=True, antialias=True)."""
    pixels = clip_pixels(random_frames(1, 320, 512))[0]
    assert pixels[:, 100, 150].tolist() == pytest.approx([-0.59121048, 0.59817678, -0.19256113], abs=1e-5)
    assert pixels[:, 0, 223].tolist() == pytest.approx([0.19567721, 0.20647022, 1.23967111], abs=1e-5)


def test_frames_of_the_right_size_are_only_normalised():
    frames = random_frames(2, 224, 224)
    wanted = (frames.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(clip_pixels(frames), wanted)


def test_a_frame_of_one_colour_keeps_it():
    colour = torch.tensor([10, 128, 250], dtype=torch.uint8)
    pixels = clip_pixels(colour.expand(1, 300, 500, 3))
    wanted = (colour / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(pixels, wanted[None, :, None, None].expand_as(pixels), rtol=0, atol=PIXELS)


@pytest.mark.parametrize("frames", [torch.zeros(2, 3, 224, 224, dtype=torch.uint8), torch.zeros(2, 224, 224, 3)])
def test_frames_of_another_layout_or_type_are_refused(frames):
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\]"):
        clip_pixels(frames)
