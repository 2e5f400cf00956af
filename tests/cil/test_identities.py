"""Digests of weights, and what changes an encoder's identity."""

import shutil
from pathlib import Path

import pytest
import torch
from published import write_published
from torch import Tensor, nn

from cil.checkpoints import (
    digest,
    read,
    write_diffusers,
    write_lvdm,
    write_safetensors,
)
from cil.families import load
from cil.families.captions import byte_tokenizer


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
