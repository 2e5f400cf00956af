"""Captions and pictures of any kind."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, clean, frames

from cil.families import NAMES, load
from cil.families.base import Clip
from cil.images import read_image

TEXTS = {"dynamicrafter": 0, "i2vgenxl": 513}  # what their tiny tokenizers pad with
END = 513

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
