"""Pictures of any kind as conditional images, from real files; what is no picture is said in one line."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from cil import images
from cil.images import read_image
from pipelines.video import fit


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def saved(path: Path, picture: Image.Image, **options) -> Path:
    picture.save(path, **options)
    return path


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, kind: int, rows: bytes, **chunks: bytes) -> bytes:
    """What PIL does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = {"IHDR": header, **chunks, "IDAT": zlib.compress(rows), "IEND": b""}
    framed = [
        struct.pack(">I", len(data)) + name.encode() + data + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def colours(picture: torch.Tensor) -> list[list[int]]:
    return picture.flatten(0, 1).tolist()


def refusal(source, height: int = 8, width: int = 8) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_image(source, height, width)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(90, 160), (161, 77), (32, 48), (31, 47), (5, 9), (1, 1), (64, 96), (20, 150)])
@pytest.mark.parametrize("wanted", [(32, 48), (40, 40), (49, 25)])
def test_a_picture_has_the_pixels_that_the_same_frame_of_a_video_has(tmp_path, size, wanted):
    frames = np.stack([noise(*size), noise(*size)[::-1]])
    path = saved(tmp_path / "frame.png", Image.fromarray(frames[1]))
    found = read_image(path, *wanted)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, fit(frames, *wanted)[1])


def test_a_path_a_string_bytes_and_a_pil_image_of_one_picture_give_the_same(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(noise(20, 30)))
    expected = read_image(path, 16, 16)
    for source in (str(path), path.read_bytes(), Image.open(path), Image.fromarray(noise(20, 30))):
        assert torch.equal(read_image(source, 16, 16), expected)


def test_a_pil_image_is_left_as_it_was_and_open():
    given = Image.new("LA", (4, 6), (9, 100))
    given.getexif()[0x0112] = 6
    read_image(given, 8, 8)
    assert (given.mode, given.size, given.getpixel((0, 0))) == ("LA", (4, 6), (9, 100))


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(("across", "along"), [(1, 5000), (3, 20000), (1, 65000)])
def test_a_line_of_pixels_is_read_from_its_middle_without_gigabytes(monkeypatch, across, along, tall):
    line = np.zeros((across, along, 3), np.uint8)
    line[:, along // 2 - 2 : along // 2 + 2] = (200, 100, 50)
    given = Image.fromarray(line.swapaxes(0, 1).copy() if tall else line)
    largest = 0
    interpolate = images.F.interpolate

    def measured(x, *args, **kwargs):
        nonlocal largest
        result = interpolate(x, *args, **kwargs)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(images.F, "interpolate", measured)
    found = read_image(given, 64, 64)
    assert largest <= 2 * images.LONGEST * 64 * 64 * 3
    assert found.shape == (64, 64, 3)
    assert found[32, 32].tolist() == [200, 100, 50]


def test_up_to_the_longest_shape_nothing_is_cropped_before_it_is_resized():
    frames = noise(7, 7 * images.LONGEST)[None]
    assert torch.equal(read_image(encoded(Image.fromarray(frames[0])), 16, 16), fit(frames, 16, 16)[0])


def test_a_huge_jpeg_is_decoded_smaller_and_no_smaller_than_twice_what_is_wanted(monkeypatch, tmp_path):
    smooth = Image.linear_gradient("L").resize((1600, 1200), Image.Resampling.BICUBIC).convert("RGB")
    path = saved(tmp_path / "a.jpg", smooth, quality=95)
    whole = read_image(path, 90, 120)
    sizes = []
    rgb = images._rgb
    monkeypatch.setattr(images, "_rgb", lambda image: sizes.append(image.size) or rgb(image))
    read_image(path, 90, 120)
    monkeypatch.setattr(images, "DRAFTED", 1600 * 1200 - 1)
    drafted = read_image(path, 90, 120)
    assert sizes == [(1600, 1200), (400, 300)]
    assert (whole.int() - drafted.int()).abs().max() <= 2  # of 255: JPEG's own rounding, on a smooth picture


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded_and_without_a_warning(recwarn):
    above_ours, above_pils = refusal(png(12000, 12000, 8, 0, b"")), refusal(png(100000, 100000, 8, 0, b""))
    assert "12000x12000 pixels; expected one picture of 1 to 134217728 pixels" in above_ours
    assert "10000000000 pixels" in above_pils
    assert not recwarn.list


def test_below_the_limit_pils_warning_does_not_reach_the_user(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)
    assert read_image(encoded(Image.new("RGB", (10, 10), "red")), 4, 4)[0, 0].tolist() == [255, 0, 0]
    assert not recwarn.list


# -- modes -----------------------------------------------------------------------------------------------------------

DEEP = np.array([[0, 127, 129, 257, 32896, 65406, 65408, 65535]], np.uint16)
AS_8_BITS = [0, 0, 1, 1, 128, 254, 255, 255]  # division by 257, to the nearest


@pytest.mark.parametrize("kind", ["I;16.png", "I;16.tiff", "I;16B.tiff", "I.tiff", "I;16.pgm"])
def test_16_bits_of_grey_become_8_by_division_by_257(tmp_path, kind):
    mode, _, suffix = kind.rpartition(".")
    picture = {
        "I": Image.fromarray(DEEP.astype(np.int32)),
        "I;16B": Image.frombytes("I;16B", (8, 1), DEEP.astype(">u2").tobytes()),
    }.get(mode, Image.fromarray(DEEP))
    found = read_image(saved(tmp_path / f"a.{suffix}", picture), 1, 8)
    assert colours(found) == [[grey] * 3 for grey in AS_8_BITS]


@pytest.mark.parametrize("outside", [-1, 65536])
def test_integers_of_more_than_16_bits_are_refused_rather_than_clipped(outside):
    message = refusal(Image.fromarray(np.array([[0, outside]], np.int32)))
    assert f"{outside}" in message
    assert "mode I, where 0 to 65535 are read" in message


def test_floats_are_taken_from_0_to_1(tmp_path):
    floats = np.array([[0, 0.25, 0.5, 0.999, 1]], np.float32)
    found = read_image(saved(tmp_path / "a.tiff", Image.fromarray(floats)), 1, 5)
    assert [grey for grey, _, _ in colours(found)] == [0, 64, 128, 255, 255]


@pytest.mark.parametrize("outside", [-0.1, 1.1, 255.0, float("nan"), float("inf")])
def test_floats_outside_of_0_to_1_are_refused(tmp_path, outside):
    path = saved(tmp_path / "a.tiff", Image.fromarray(np.array([[0.5, outside]], np.float32)))
    message = refusal(path)
    assert str(path) in message
    assert "mode F, where 0 to 1 are read" in message


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "RGBX", "PA", "HSV", "LAB"])
def test_every_mode_shows_its_colour(mode):
    colour = (200, 200, 200) if mode in ("L", "LA") else (255, 255, 255) if mode == "1" else (200, 100, 50)
    given = Image.new("RGB", (6, 4), colour)
    if mode == "LAB":
        given = ImageCms.profileToProfile(
            given, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        given = given.convert("P").convert("PA") if mode == "PA" else given.convert(mode)
    found = read_image(given, 4, 6)
    # A palette of web colours has steps of 51; the other modes round.
    tolerance = 26 if mode in ("P", "PA") else 3
    assert (found.int() - torch.tensor(colour)).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("JPEG", "L"), ("GIF", "P"), ("PNG", "1")]
)
def test_files_of_other_modes_show_their_colour(kind, mode):
    white_and_black = Image.new("L", (32, 16), 255)
    white_and_black.paste(0, (16, 0, 32, 16))
    if mode == "CMYK":
        given = white_and_black.convert("RGB").convert("CMYK")
    else:
        given = white_and_black.convert(mode)
    data = encoded(given, kind)
    assert Image.open(io.BytesIO(data)).mode == mode
    found = read_image(data, 16, 32)
    assert found[8, 4].tolist() == [255] * 3
    assert found[8, 28].tolist() == [0] * 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "MPO"])
def test_every_format_is_read(kind):
    found = read_image(encoded(Image.new("RGB", (32, 32), (204, 102, 51)), kind), 16, 16)
    assert (found.int() - torch.tensor([204, 102, 51])).abs().max() <= 3  # what lossy formats make of one colour


# -- transparency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_are_white_and_half_transparent_ones_half_so(kind):
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [10, 20, 30, 128]]], np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = colours(read_image(encoded(Image.fromarray(pixels), kind, **options), 1, 3))
    assert found[:2] == [[255, 255, 255], [10, 20, 30]]
    assert found[2] == pytest.approx([132, 137, 142], abs=1)  # 255 - (255 - c) * 128 / 255


def test_transparent_grey_is_white():
    pixels = np.array([[[10, 0], [10, 255], [10, 128]]], np.uint8)
    found = colours(read_image(encoded(Image.fromarray(pixels)), 1, 3))
    assert found[:2] == [[255] * 3, [10] * 3]
    assert found[2] == pytest.approx([132] * 3, abs=1)


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 0), ("PNG", b"\x00\xff"), ("GIF", 0)])
def test_transparent_colours_of_a_palette_are_white(kind, transparency):
    given = Image.new("P", (2, 1))
    given.putpalette([200, 0, 0, 0, 0, 200])
    given.putpixel((1, 0), 1)
    found = colours(read_image(encoded(given, kind, transparency=transparency), 1, 2))
    assert found == [[255, 255, 255], [0, 0, 200]]


@pytest.mark.parametrize(
    ("bits", "kind", "rows", "key", "expected"),
    [
        (8, 0, bytes([0, 3, 5]), struct.pack(">H", 3), 5),
        (16, 0, struct.pack(">xHH", 1285, 1286), struct.pack(">H", 1285), 5),
        (8, 2, bytes([0, 3, 3, 3, 5, 5, 5]), struct.pack(">3H", 3, 3, 3), 5),
        (1, 0, bytes([0, 0b10000000]), struct.pack(">H", 1), 0),
    ],
)
def test_the_colour_that_a_png_calls_transparent_is_white(bits, kind, rows, key, expected):
    found = colours(read_image(png(2, 1, bits, kind, rows, tRNS=key), 1, 2))
    assert found == [[255] * 3, [expected] * 3]


# -- orientation, animation, profiles ----------------------------------------------------------------------------------

TURNS = {  # how a camera that was held so has stored the upright picture
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),  # shown turned clockwise, so stored counter-clockwise
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(kind, orientation):
    upright = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright)))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert torch.equal(read_image(encoded(stored, kind, exif=exif, **options), 20, 30), torch.from_numpy(upright))


def test_a_turned_jpeg_is_the_upright_one(tmp_path):
    upright = Image.linear_gradient("L").resize((64, 32)).rotate(20).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = saved(tmp_path / "a.jpg", upright.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=100)
    difference = read_image(stored, 32, 64).int() - torch.from_numpy(np.array(upright)).int()
    assert difference.abs().max() <= 2  # JPEG's rounding at its best quality


@pytest.mark.parametrize(
    "damaged", [b"Exif\0\0MM", b"Exif\0\0MX\0*\0\0\0\x08", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_exif_does_not_cost_the_picture(recwarn, kind, damaged):
    found = read_image(encoded(Image.new("RGB", (8, 8), "red"), kind, exif=damaged), 4, 4)
    assert not recwarn.list
    assert (found.int() - torch.tensor([255, 0, 0])).abs().max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    found = read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), 8, 8)
    assert (found.int() - torch.tensor([255, 0, 0])).abs().max() <= 2


def swapped(name: str) -> bytes:
    """sRGB's profile of another name with its red and green exchanged: no eye can miss whether it was heeded."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data).replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))


def test_another_colour_profile_is_converted_to_srgb():
    given = Image.new("RGB", (8, 8), (200, 100, 50))
    found = read_image(encoded(given, icc_profile=swapped("odd!")), 8, 8)
    assert (found.int() - torch.tensor([100, 200, 50])).abs().max() <= 2


def test_a_profile_sees_cmyk_as_it_is_and_all_else_opaque_and_as_rgb(monkeypatch):
    seen = []
    monkeypatch.setattr(images, "_srgb", lambda image, profile: seen.append(image.mode) or image)
    for mode, kind in (("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG")):
        read_image(encoded(Image.new(mode, (8, 8)), kind, icc_profile=swapped("odd!")), 8, 8)
    assert seen == ["CMYK", "RGB", "RGB", "RGB"]


@pytest.mark.parametrize(
    "profile",
    [swapped("sRGB"), b"no profile", swapped("odd!").replace(b"RGB XYZ ", b"CMYKXYZ ")],
    ids=["sRGB by its name", "damaged", "of another colour space"],
)
def test_pixels_stay_where_the_profile_is_srgb_or_cannot_be_used(profile):
    pixels = noise(8, 8)
    found = read_image(encoded(Image.fromarray(pixels), icc_profile=profile), 8, 8)
    assert torch.equal(found, torch.from_numpy(pixels))


# -- what is no picture ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused_by_its_name(tmp_path, recwarn, kind, kept):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * kept)])
    message = refusal(path)
    assert message.startswith(f"'{path}': ")
    assert "expected one picture" in message
    assert not recwarn.list


def test_a_damaged_byte_in_a_png_is_refused():
    data = bytearray(encoded(Image.fromarray(noise(64, 64))))
    data[3000] ^= 255
    assert "broken data stream" in refusal(bytes(data))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"junk" * 100, "it begins with b'junkjunkjunk'"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 'it begins with b"<svg xmlns='),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "it begins with b'%!PS-Adobe-3'"),
        (b"\x89PNG\r\n\x1a\n", "expected"),
    ],
)
def test_what_is_no_picture_is_refused_with_what_it_is_and_what_was_expected(tmp_path, content, said):
    path = tmp_path / "thing.png"
    path.write_bytes(content)
    for source, name in ((path, f"'{path}'"), (content, f"{len(content)} bytes")):
        message = refusal(source)
        assert message.startswith(f"{name}: ")
        assert said in message
        assert "expected one picture of 1 to 134217728 pixels, as PNG, JPEG" in message


def test_a_folder_and_a_picture_without_pixels_are_refused(tmp_path):
    assert refusal(tmp_path).startswith(f"'{tmp_path}': a folder; expected one picture")
    assert refusal(Image.new("RGB", (0, 5))).startswith("PIL image of mode RGB: 0x5 pixels; expected")
    assert refusal("a\0b.png").startswith(r"'a\x00b.png': embedded null byte; expected")


def test_a_name_of_two_lines_is_said_in_one(tmp_path):
    path = tmp_path / "two\nlines.png"
    path.write_bytes(b"junk")
    assert r"two\nlines.png" in refusal(path)


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read_image(tmp_path / "nothing.png", 8, 8)


@pytest.mark.parametrize(("height", "width"), [(0, 8), (8, -1)])
def test_a_size_below_one_is_refused(height, width):
    assert f"wanted as {height}x{width}" in refusal(encoded(Image.new("RGB", (4, 4))), height, width)


@pytest.mark.parametrize("source", [None, 3, np.zeros((4, 4, 3), np.uint8)])
def test_what_is_neither_path_nor_bytes_nor_pil_image_is_a_type_error(source):
    with pytest.raises(TypeError):
        read_image(source, 8, 8)
