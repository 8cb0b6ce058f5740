"""Shapes on a grid of nine places: what they are, where, how many."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from . import canvas
from .scenes import Question, ask

PLACES: tuple[str, ...] = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
COLOURS = tuple(canvas.COLOURS)
SHAPES = canvas.SHAPES


@dataclass(frozen=True)
class Placed:
    """A shape of a colour in a place: the number of one of `PLACES`."""

    shape: str
    colour: str
    place: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Arrangement:
    """Shapes in places of their own, in reading order."""

    objects: tuple[Placed, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return ("; ".join(f"{one.name} at {one.place}" for one in self.objects),)

    def draw(self, rng: random.Random) -> tuple[Image, ...]:
        image = canvas.paper(rng)
        width, height = image.width / 3, image.height / 3
        size = rng.uniform(0.3, 0.42)  # all of an image's shapes are of like size
        for one in self.objects:
            radius = min(width, height) * size * rng.uniform(0.88, 1.12)
            x, y = one.place % 3 * width, one.place // 3 * height
            dx, dy = rng.uniform(-0.08, 0.08) * width, rng.uniform(-0.08, 0.08) * height
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            canvas.shape(rng, image, one.shape, one.colour, box, radius)
        return (image,)


def arranged(rng: random.Random, kinds: Sequence[tuple[str, str]]) -> Arrangement:
    """Pairs of (shape, colour), each in a place of its own."""
    places = rng.sample(range(len(PLACES)), len(kinds))
    found = (Placed(shape, colour, place) for (shape, colour), place in zip(kinds, places, strict=True))
    return Arrangement(tuple(sorted(found, key=lambda one: one.place)))


def distinct(rng: random.Random, most: int = 4) -> Arrangement:
    """One to `most` shapes, no two of one shape or one colour."""
    count = rng.randint(1, most)
    return arranged(rng, list(zip(rng.sample(SHAPES, count), rng.sample(COLOURS, count), strict=True)))


def crowd(rng: random.Random) -> Arrangement:
    """Several shapes of one colour or of one form, as many as any other number, beside a few others."""
    wanted = rng.randint(1, 6)
    others = rng.randint(0, min(3, 8 - wanted))
    if rng.random() < 0.5:
        shape, rest = _one_and_rest(rng, SHAPES)
        kinds = [(shape, rng.choice(COLOURS)) for _ in range(wanted)]
        kinds += [(rng.choice(rest), rng.choice(COLOURS)) for _ in range(others)]
    else:
        colour, rest = _one_and_rest(rng, COLOURS)
        kinds = [(rng.choice(SHAPES), colour) for _ in range(wanted)]
        kinds += [(rng.choice(SHAPES), rng.choice(rest)) for _ in range(others)]
    return arranged(rng, kinds)


def _one_and_rest(rng: random.Random, names: Sequence[str]) -> tuple[str, list[str]]:
    one = rng.choice(names)
    return one, [name for name in names if name != one]


def ask_shape(rng: random.Random, scene: Arrangement) -> Question:
    one = rng.choice(scene.objects)
    if len(scene.objects) == 1 and rng.random() < 0.6:
        return ask(
            rng, ("What shape is this?", "Which shape is in the image?", "What shape do you see?"), one.shape
        )
    templates = ("What shape is the {colour} object?", "Which shape is {colour}?", "What is {colour} here?",
                 "The {colour} object is what shape?")  # fmt: skip
    return ask(rng, templates, one.shape, colour=one.colour)


def ask_colour(rng: random.Random, scene: Arrangement) -> Question:
    one = rng.choice(scene.objects)
    if len(scene.objects) == 1 and rng.random() < 0.4:
        return ask(
            rng, ("What colour is this?", "What colour is the object?", "What color is it?"), one.colour
        )
    templates = ("What colour is the {shape}?", "Which colour does the {shape} have?",
                 "What color is the {shape}?", "The {shape} is of what colour?")  # fmt: skip
    return ask(rng, templates, one.colour, shape=one.shape)


def ask_position(rng: random.Random, scene: Arrangement) -> Question:
    one = rng.choice(scene.objects)
    place = PLACES[one.place]
    if rng.random() < 0.3:
        where = "in the center" if place == "center" else f"at the {place}"
        templates = ("What is {where}?", "Which object is {where}?", "What do you see {where}?")
        return ask(rng, templates, one.name, where=where)
    templates = ("Where is the {name}?", "In which place is the {name}?", "Where do you see the {name}?")
    return ask(rng, templates, place, name=one.name if rng.random() < 0.5 else one.shape)


def ask_count(rng: random.Random, scene: Arrangement) -> Question:
    """Of what the crowd is made of: the most frequent shape or colour, or of all objects."""
    total = len(scene.objects)
    if rng.random() < 0.2:
        templates = ("How many objects are there?", "How many shapes are in the image?", "Count the objects.")
        return ask(rng, templates, total)
    (shape, shapes), (colour, colours) = _most(scene, "shape"), _most(scene, "colour")
    if shapes > colours or (shapes == colours and rng.random() < 0.5):
        plural = shape + ("es" if shape == "cross" else "s")
        templates = ("How many {plural} are there?", "Count the {plural}.", "How many {plural} do you see?")
        return ask(rng, templates, shapes, plural=plural)
    templates = ("How many {colour} objects are there?", "Count the {colour} shapes.",
                 "How many objects are {colour}?")  # fmt: skip
    return ask(rng, templates, colours, colour=colour)


def _most(scene: Arrangement, attribute: str) -> tuple[str, int]:
    ((name, count),) = Counter(getattr(one, attribute) for one in scene.objects).most_common(1)
    return str(name), count


def ask_describe(rng: random.Random, scene: Arrangement) -> Question:
    templates = ("Describe this image.", "Describe the image.", "What is in this image?", "What do you see?",
                 "What is in the picture?", "Describe the picture.")  # fmt: skip
    return ask(rng, templates, description(scene))


def description(scene: Arrangement) -> str:
    """`a red circle at the top left and a blue star in the center`."""
    parts = [
        f"{article(one.name)} {'in' if one.place == 4 else 'at'} the {PLACES[one.place]}"
        for one in scene.objects
    ]
    return " and ".join(parts)


def article(name: str) -> str:
    return f"an {name}" if name.startswith("o") else f"a {name}"
