"""A user's picture, of whatever kind, as the conditional image of a family: `read_image("a.jpg", height, width)`."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

# Not all that PIL knows: it would run Ghostscript on an EPS, and takes much that is no picture for a TGA.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
LARGEST = 2**27  # pixels; that many take 1.5 GB at most while they are read
DRAFTED = 2**24  # pixels beyond which a JPEG is decoded at a half, a quarter or an eighth
LONGEST = 16  # times what is kept of it: a longer picture is cropped first, or a line would become gigabytes
UPRIGHT = dict(enumerate((Image.Transpose(i) for i in (0, 3, 1, 5, 4, 6, 2)), start=2))  # by EXIF's orientation

Source = str | os.PathLike[str] | bytes | Image.Image


def read_image(source: Source, height: int, width: int) -> Tensor:
    """A file, its bytes or a PIL image -> uint8 [H, W, 3] RGB, pixel for pixel what a video's frame would become.

    It is turned as its EXIF says; of an animation, the first frame. Transparency is laid over white. 16 bits of grey
    become 8 by division by 257, also in mode I; floats are taken from 0..1. RGB and CMYK of another colour profile
    become sRGB. Then it is resized to cover height x width with its aspect kept, and cropped to the centre. A JPEG of
    more than DRAFTED pixels, and what is longer than LONGEST, are made smaller before that.

    What is no such picture is a ValueError of one line; what the file system refuses stays an OSError.
    """
    if isinstance(source, Image.Image):
        name = f"PIL image of mode {source.mode}"
    else:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else repr(os.fspath(source))
    if min(height, width) < 1:
        raise ValueError(f"{name}: wanted as {height}x{width}; expected a height and a width of at least 1")
    try:
        with warnings.catch_warnings(action="ignore"), _opened(source, 2 * max(height, width)) as image:
            pixels = np.array(_rgb(image))
    except Exception as error:  # PIL's decoders raise of every kind, from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno and not isinstance(error, IsADirectoryError):
            raise
        found = "a folder" if isinstance(error, IsADirectoryError) else " ".join(str(error).split())
        expected = f"one picture of 1 to {LARGEST} pixels, as {', '.join(FORMATS)}"
        raise ValueError(f"{name}: {found}; expected {expected}") from error
    return cover(_shortened(torch.from_numpy(pixels)[None], height, width), height, width)[0]


@contextmanager
def _opened(source: Source, side: int) -> Iterator[Image.Image]:
    """`side`: what a JPEG's height and width keep at least."""
    if isinstance(source, Image.Image):
        yield source
        return
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        head = file.read(12)
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it begins with {head!r}" if head else "empty") from None
        if image.width * image.height > DRAFTED:
            image.draft(None, (side, side))
        yield image


def _rgb(image: Image.Image) -> Image.Image:
    """Upright, 8 bits, opaque, sRGB."""
    if not 0 < image.width * image.height <= LARGEST:
        raise ValueError(f"{image.width}x{image.height} pixels")
    image.load()
    profile = image.info.get("icc_profile")
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _grey(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode != "CMYK":
        image = image.convert("RGB")
    return (_srgb(image, profile) if profile else image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF says nothing, and the picture may be whole
        return image
    return image if turn is None else image.transpose(turn)


def _grey(image: Image.Image) -> Image.Image:
    """8 bits from 16, or from floats."""
    values, top = np.asarray(image), 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # which also refuses NaN
        raise ValueError(f"values {values.min()} to {values.max()} of mode {image.mode}, where 0 to {top} are read")
    grey = np.rint(values * np.float32(255 / top)).astype(np.uint8)
    return Image.fromarray(np.where(values == image.info.get("transparency"), np.uint8(255), grey))


def _srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A profile that is damaged, or of another colour space than the picture, is passed over."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(given):
            return image
        return ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image


def _shortened(x: Tensor, height: int, width: int) -> Tensor:
    """[1, H, W, 3], without most of what `cover` would cut off."""
    scale = max(height / x.shape[1], width / x.shape[2])
    for axis, side in ((1, height), (2, width)):
        cut = (x.shape[axis] - int(LONGEST * max(1, side / scale))) // 2
        x = x.narrow(axis, cut, x.shape[axis] - 2 * cut) if cut > 0 else x
    return x


def cover(x: Tensor, height: int, width: int) -> Tensor:
    """uint8 [T, H, W, 3] resized to cover height x width with its aspect kept, then cropped to the centre."""
    if x.shape[1:3] == (height, width):
        return x
    scale = max(height / x.shape[1], width / x.shape[2])
    size = [max(height, round(x.shape[1] * scale)), max(width, round(x.shape[2] * scale))]
    x = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[:, top : top + height, left : left + width].contiguous()
