"""Pictures in 8-bit RGB, resized bit for bit as the checkpoints' own processors did.

Those ran on Pillow up to 12, whose `Image.resize` filters rows first and columns second. Pillow 13 turns the
order round where the height shrinks more than the width, which changes levels by up to 28 of 255 at hard
edges; two calls, each along one axis, give the old levels on every release.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.access import MAX_PIXELS

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic"]
Colour = tuple[int, int, int]

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
RESAMPLE: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""The filters by the numbers that a `preprocessor_config.json` gives them."""
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """The picture as a person sees it, in 8-bit RGB: turned as its EXIF data say, transparent parts on
    `background`, 16-bit levels scaled to 8, the first frame of an animation.

    Raises RequestError for a picture of floating-point levels, whose range nobody knows.
    """
    if image.mode == "F":
        raise RequestError("the image has floating-point levels (mode F); convert it to 8 or 16 bits first")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    below = Image.new("RGBA", layer.size, (*background, 255))
    return Image.alpha_composite(below, layer).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """The high byte, which is what Pillow itself keeps of 16-bit RGB; its own conversion clips instead."""
    levels = np.clip(np.asarray(image), 0, 2**16 - 1).astype(np.uint16)
    return Image.fromarray((levels >> 8).astype(np.uint8))


def resize(image: Image.Image, height: int, width: int, resample: Resample) -> Image.Image:
    """The picture stretched to a size, rows filtered first.

    Raises RequestError for one so thin that it would take gigabytes on the way.
    """
    _check(image, image.height, width)
    _check(image, height, width)
    chosen = FILTERS[resample]
    return image.resize((width, image.height), chosen).resize((width, height), chosen)


def _check(image: Image.Image, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise RequestError(
            f"the image is {image.width} pixels wide and {image.height} high, and would become {width} x "
            f"{height}, more than {MAX_PIXELS} pixels; crop it or pad it"
        )


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """A part of the picture."""
    return image.crop((left, top, left + width, top + height))


def pad(image: Image.Image, height: int, width: int, top: int, left: int, colour: Colour) -> Image.Image:
    """The picture at a place within a larger one of one colour. Raises RequestError as `resize` does."""
    _check(image, height, width)
    padded = Image.new("RGB", (width, height), colour)
    padded.paste(image, (left, top))
    return padded


def levels(image: Image.Image) -> np.ndarray:
    """The picture as uint8 [H, W, 3]."""
    return np.asarray(image, np.uint8)


def normalize(values: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Levels 0...255 [..., C] -> (levels / 255 - mean) / std in float32, a mean and a deviation a channel."""
    scaled = values.astype(np.float32) - np.float32(255) * np.asarray(mean, np.float32)
    return scaled / (np.float32(255) * np.asarray(std, np.float32))
