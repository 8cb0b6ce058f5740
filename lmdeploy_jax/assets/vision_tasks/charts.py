"""Bar charts: heights from 1 to 9 between lines at every whole number, bars known by their colours."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import ImageDraw
from PIL.Image import Image

from . import canvas
from .scenes import Question, ask

TOP = 10  # the value of the frame's upper edge
BARS = (2, 6)  # bounds of their number


@dataclass(frozen=True)
class Chart:
    """Pairs of (colour, height), from left to right; no two of one colour or height."""

    bars: tuple[tuple[str, int], ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return ("bars " + ", ".join(f"{colour} {height}" for colour, height in self.bars),)

    def draw(self, rng: random.Random) -> tuple[Image, ...]:
        image = canvas.paper(rng)
        frame = _frame(rng, image)
        _lines(rng, image, frame)
        slot, share = (frame[2] - frame[0]) / len(self.bars), rng.uniform(0.5, 0.85)
        unit = (frame[3] - frame[1]) / TOP
        for index, (colour, height) in enumerate(self.bars):
            left = frame[0] + slot * (index + (1 - share) / 2)
            box = (left, frame[3] - unit * height, left + slot * share, frame[3])
            ImageDraw.Draw(image).rectangle(box, canvas.tint(rng, colour))
        return (image,)


def _frame(rng: random.Random, image: Image) -> canvas.Box:
    """The area of the bars: most of the image."""
    left, right = rng.uniform(0.03, 0.12) * image.width, rng.uniform(0.88, 0.97) * image.width
    return left, rng.uniform(0.03, 0.08) * image.height, right, rng.uniform(0.92, 0.97) * image.height


def _lines(rng: random.Random, image: Image, frame: canvas.Box) -> None:
    """The frame, and lines at whole numbers, that at 5 the darkest."""
    draw, grey = ImageDraw.Draw(image), rng.randint(165, 200)
    for value in range(1, TOP):
        y = frame[3] - (frame[3] - frame[1]) * value / TOP
        level = 90 if value == 5 else grey
        draw.line((frame[0], y, frame[2], y), (level, level, level), 2 if value == 5 else 1)
    draw.rectangle(frame, None, (60, 60, 60), rng.randint(1, 3))


def chart(rng: random.Random) -> Chart:
    count = rng.randint(*BARS)
    colours, heights = rng.sample(list(canvas.COLOURS), count), rng.sample(range(1, TOP), count)
    return Chart(tuple(zip(colours, heights, strict=True)))


def ask_chart(rng: random.Random, scene: Chart) -> Question:
    """The highest or lowest bar's colour, a bar's height, or how many there are."""
    roll = rng.random()
    if roll < 0.3:
        best = max(scene.bars, key=lambda bar: bar[1])
        return ask(
            rng, ("Which bar is the highest?", "What colour is the tallest bar?", "The highest bar?"), best[0]
        )
    if roll < 0.6:
        least = min(scene.bars, key=lambda bar: bar[1])
        return ask(
            rng, ("Which bar is the lowest?", "What colour is the shortest bar?", "The lowest bar?"), least[0]
        )
    if roll < 0.9:
        colour, height = rng.choice(scene.bars)
        templates = ("How high is the {colour} bar?", "What is the value of the {colour} bar?",
                     "What value has the {colour} bar?")  # fmt: skip
        return ask(rng, templates, height, colour=colour)
    return ask(
        rng, ("How many bars are there?", "Count the bars.", "How many bars do you see?"), len(scene.bars)
    )
