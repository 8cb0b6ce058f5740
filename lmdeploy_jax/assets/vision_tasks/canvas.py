"""Drawing with Pillow alone: backgrounds, shapes, text in Pillow's own font (Aileron, CC0)."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom

COLOURS: dict[str, Colour] = {
    "red": (215, 25, 30), "orange": (255, 140, 0), "yellow": (245, 215, 20), "green": (30, 150, 50),
    "blue": (30, 80, 215), "purple": (135, 40, 165), "brown": (120, 72, 35), "black": (25, 25, 25),
}  # fmt: skip

# Corners on the unit circle: (degrees from the top, clockwise; distance from the centre).
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": tuple((45 + 90 * i, 1.0) for i in range(4)),
    "diamond": tuple((90 * i, 1.0 if i % 2 == 0 else 0.68) for i in range(4)),
    "triangle": tuple((120 * i, 1.0) for i in range(3)),
    "star": tuple((36 * i, 1.0 if i % 2 == 0 else 0.42) for i in range(10)),
    "cross": tuple((90 * i + at, far) for i in range(4) for at, far in ((-18, 1.0), (18, 1.0), (45, 0.42))),
}  # fmt: skip
SHAPES: tuple[str, ...] = ("circle", *OUTLINES)

SIDES = (170, 260)  # bounds of an image's edges, in pixels
TURN = 9.0  # the most degrees by which a shape stands askew: a square stays no diamond
FONT_SIZE = 100  # at which text is measured


def paper(rng: random.Random) -> Image.Image:
    """A light background of a size of its own: even, shaded from one side to another, or grainy."""
    size = rng.randint(*SIDES), rng.randint(*SIDES)
    image = Image.new("RGB", size, _light(rng))
    roll = rng.random()
    if roll < 0.25:
        shade = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size)
        image = Image.composite(image, Image.new("RGB", size, _light(rng)), shade)
    elif roll < 0.5:
        image = _grainy(rng, image)
    return image


def _light(rng: random.Random) -> Colour:
    return rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255)


def _grainy(rng: random.Random, image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 9), (*image.size[::-1], 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def tint(rng: random.Random, name: str) -> Colour:
    """A colour by name, never twice quite the same."""
    red, green, blue = (min(255, max(0, level + rng.randint(-14, 14))) for level in COLOURS[name])
    return red, green, blue


def shape(rng: random.Random, image: Image.Image, name: str, colour: str, centre: Box, radius: float) -> None:
    """A shape of `SHAPES` around the middle of a box, filled or (three times in ten) as an outline."""
    x, y = (centre[0] + centre[2]) / 2, (centre[1] + centre[3]) / 2
    paint, draw = tint(rng, colour), ImageDraw.Draw(image)
    width = max(3, round(radius * rng.uniform(0.18, 0.3)))
    hollow = rng.random() < 0.3
    if name == "circle":
        radius *= 0.92
        around = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(around, None if hollow else paint, paint, width)
        return
    turn = rng.uniform(-TURN, TURN)
    corners = [_corner(x, y, radius * far, degrees + turn) for degrees, far in OUTLINES[name]]
    if hollow:
        draw.line([*corners, *corners[:2]], paint, width, joint="curve")
    else:
        draw.polygon(corners, paint)


def _corner(x: float, y: float, far: float, degrees: float) -> tuple[float, float]:
    angle = math.radians(degrees)
    return x + far * math.sin(angle), y - far * math.cos(angle)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text(rng: random.Random, image: Image.Image, words: str, colour: Colour) -> None:
    """Words anywhere on the image where they fit, a little askew, light or bold."""
    mask = _lettering(rng, words, image.size)
    left, top = (
        rng.randint(0, max(0, whole - part)) for whole, part in zip(image.size, mask.size, strict=True)
    )
    image.paste(Image.new("RGB", mask.size, colour), (left, top), mask)


def _lettering(rng: random.Random, words: str, room: tuple[int, int]) -> Image.Image:
    """A mask of the words, between a quarter and half of the image high where its width allows it."""
    left, top, right, bottom = _font(FONT_SIZE).getbbox(words)
    most = min(0.9 * room[0] / (right - left), 0.6 * room[1] / (bottom - top))
    font = _font(max(12, round(FONT_SIZE * most * rng.uniform(0.72, 1.0))))
    stroke = rng.choice((0, 0, 1, 2))
    box = font.getbbox(words, stroke_width=stroke)
    mask = Image.new("L", (math.ceil(box[2] - box[0]), math.ceil(box[3] - box[1])))
    ImageDraw.Draw(mask).text((-box[0], -box[1]), words, 255, font, stroke_width=stroke)
    mask = mask.rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, expand=True)
    mask.thumbnail(room)
    return mask
