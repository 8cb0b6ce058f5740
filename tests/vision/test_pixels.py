"""Modes, orientation and resizing: what a person sees, at the levels of Pillow up to 12."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision import pixels
from lmdeploy_jax.vision.processor import CLIP_MEAN, CLIP_STD
from tests.vision.pictures import picture

# Checksums of what `Image.resize` of Pillow 12.3 gives.
RESIZED = [
    ((700, 933), (448, 896), "bilinear", 176382396),
    ((700, 933), (448, 896), "bicubic", 1596549852),
    ((600, 800), (588, 812), "bilinear", 2916742633),
    ((600, 800), (588, 812), "bicubic", 3104813057),
    ((1200, 600), (448, 448), "bilinear", 1219789128),
    ((1200, 600), (448, 448), "bicubic", 2139130375),
    ((1080, 1920), (728, 1316), "bilinear", 1918978624),
    ((1080, 1920), (728, 1316), "bicubic", 2139578854),
    ((37, 53), (448, 448), "bilinear", 3950586543),
    ((37, 53), (448, 448), "bicubic", 3486554403),
]


@pytest.mark.parametrize(("source", "target", "resample", "checksum"), RESIZED)
def test_rows_are_filtered_first(source, target, resample, checksum):
    resized = pixels.resize(picture(*source), *target, resample)
    assert zlib.crc32(resized.tobytes()) == checksum


def only(image: Image.Image) -> tuple[int, ...]:
    """The levels of a picture of one colour."""
    values = pixels.levels(pixels.to_rgb(image)).reshape(-1, 3)
    assert (values == values[0]).all()
    return tuple(int(value) for value in values[0])


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (4, 3), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (4, 3), (1, 2, 3)), (1, 2, 3)),
        (Image.new("RGBA", (4, 3), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 3), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (4, 3), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (4, 3), (10, 0)), (255, 255, 255)),
        (palette(transparent=False), (200, 100, 50)),
        (palette(transparent=True), (255, 255, 255)),
        (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("1", (4, 3), 1), (255, 255, 255)),
        (Image.new("L", (4, 3), 7), (7, 7, 7)),
        (Image.fromarray(np.full((3, 4), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((3, 4), 256 * 77 + 5, np.uint16)), (77, 77, 77)),
        (Image.fromarray(np.full((3, 4), 256 * 77 + 5, np.int32)), (77, 77, 77)),
    ],
)
def test_modes(image, expected):
    assert only(image) == expected


def test_big_endian_16_bits():
    data = np.full((3, 4), 256 * 77 + 5, ">u2").tobytes()
    assert only(Image.frombytes("I;16B", (4, 3), data)) == (77, 77, 77)


def test_the_background_can_be_chosen():
    image = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    assert pixels.levels(pixels.to_rgb(image, (1, 2, 3)))[0, 0].tolist() == [1, 2, 3]


def test_floating_point_levels_are_refused():
    with pytest.raises(RequestError, match="mode F"):
        pixels.to_rgb(Image.new("F", (4, 3)))


def reopened(image: Image.Image, form: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation, turn):
    image = picture(16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = pixels.levels(pixels.to_rgb(reopened(image, "PNG", exif=exif)))
    np.testing.assert_array_equal(turned, np.rot90(pixels.levels(image), turn))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animations_show_their_first_frame(form):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    assert only(reopened(frames[0], form, save_all=True, append_images=frames[1:], **options)) == (255, 0, 0)


def test_normalisation():
    values = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    exact = (values / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(pixels.normalize(values, CLIP_MEAN, CLIP_STD), exact, atol=1e-6)
