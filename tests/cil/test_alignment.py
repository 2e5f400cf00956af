"""The first frame against the conditional image: PSNR and SSIM as torchmetrics has them, CLIP as transformers does."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import write_clip
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from cil.metrics.alignment import MOST, ClipSimilarity, psnr, ssim


def picture(height: int = 24, width: int = 40, seed: int = 0) -> torch.Tensor:
    """Smooth, uint8 [H, W, 3]."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (255 * smooth[0]).to(torch.uint8).permute(1, 2, 0).contiguous()


def noisy(image: torch.Tensor, deviation: float) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return (image + deviation * torch.randn(image.shape, generator=random)).clamp(0, 255).round().to(torch.uint8)


def batched(image: torch.Tensor) -> torch.Tensor:
    return image.permute(2, 0, 1)[None].double()


@pytest.mark.parametrize("deviation", [1, 10, 80])
@pytest.mark.parametrize("size", [(24, 40), (11, 11), (33, 12)])
def test_psnr_and_ssim_are_those_of_torchmetrics(deviation, size):
    image = picture(*size)
    other = noisy(image, deviation)
    a, b = batched(other), batched(image)
    assert psnr(other, image) == pytest.approx(float(peak_signal_noise_ratio(a, b, data_range=255.0)), rel=1e-6)
    _, whole = structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    want = float(whole[..., 5:-5, 5:-5].mean())  # its mean is over windows too that reach beyond the border, mirrored
    assert ssim(other, image) == pytest.approx(want, rel=1e-6)
    assert ssim(image, other) == pytest.approx(ssim(other, image), rel=1e-12)


def test_ssim_is_the_formula_of_wang_in_a_loop_over_windows():
    image = picture(14, 13)
    a, b = noisy(image, 20).double().numpy(), image.double().numpy()
    x = np.arange(11) - 5
    window = np.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for top, left, colour in np.ndindex(4, 3, 3):
        p, q = (y[top : top + 11, left : left + 11, colour] for y in (a, b))
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq, pq = (
            (window * (y - my) * (z - mz)).sum() for y, my, z, mz in ((p, mp, p, mp), (q, mq, q, mq), (p, mp, q, mq))
        )
        c1, c2 = 2.55**2, 7.65**2
        found.append((2 * mp * mq + c1) * (2 * pq + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(noisy(image, 20), image) == pytest.approx(np.mean(found), rel=1e-12)


def test_psnr_of_one_grey_level_is_48_dB_and_of_the_same_picture_finite():
    image = torch.full((16, 16, 3), 100, dtype=torch.uint8)
    assert psnr(image + 1, image) == pytest.approx(20 * math.log10(255), rel=1e-12)
    assert psnr(image - 2, image) == pytest.approx(20 * math.log10(255 / 2), rel=1e-12)  # uint8 does not wrap
    assert psnr(image, image) == MOST
    assert ssim(image, image) == pytest.approx(1, abs=1e-12)
    large = torch.zeros(500, 500, 3, dtype=torch.uint8)
    large[0, 0, 0] = 1
    assert psnr(large, torch.zeros_like(large)) == MOST  # 106.9


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_pictures_of_two_sizes_or_kinds_are_refused(measure):
    image = picture()
    for other in (picture(24, 41), image.float(), image[None]):
        with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\], of one size"):
            measure(other, image)
    with pytest.raises(ValueError, match="pictures of 10x40: SSIM needs 11x11"):
        ssim(picture(10), picture(10))


# -- CLIP --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("alignment") / "clip")


def embedded(image: torch.Tensor, folder: Path) -> torch.Tensor:
    """By transformers alone: its preprocessing with PIL, and its model."""
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"shortest_edge": 28}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 28, "width": 28})
    model = CLIPVisionModelWithProjection.from_pretrained(folder)
    with torch.no_grad():
        return model(processor(Image.fromarray(image.numpy()), return_tensors="pt")["pixel_values"]).image_embeds[0]


@pytest.mark.parametrize("size", [(28, 28), (24, 40), (64, 33)])
def test_the_clip_similarity_is_the_cosine_of_transformers_embeddings(folder, size):
    clip = ClipSimilarity.load(folder).to("cpu")
    a, b = picture(*size), noisy(picture(*size, seed=3), 60)
    x, y = (embedded(image, folder).double() for image in (a, b))
    assert clip(a, b) == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-5)
    assert clip(a, b) < 0.999
    assert clip(a, a) == pytest.approx(1, abs=1e-6)


def test_pictures_of_two_sizes_may_be_alike_to_clip(folder):
    """It sees the middle square of each."""
    image = picture(28, 28)
    edge = torch.zeros(28, 6, 3, dtype=torch.uint8)
    assert ClipSimilarity.load(folder)(torch.cat([edge, image, edge], 1), image) == pytest.approx(1, abs=1e-6)


def test_clips_are_known_by_their_weights(folder, tmp_path):
    one, again = ClipSimilarity.load(folder), ClipSimilarity.load(folder)
    assert one.identity == again.identity
    assert one.identity != ClipSimilarity.load(write_clip(tmp_path / "other", seed=1)).identity
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        ClipSimilarity.load(tmp_path)
