"""Two images compared."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL.Image import Image

from .arrangements import COLOURS, SHAPES, Arrangement, arranged, article
from .scenes import Question, ask

KINDS = ("shape", "colour", "more", "new")


@dataclass(frozen=True)
class Pair:
    """Two arrangements; kind: the question of `KINDS` that they are made for."""

    first: Arrangement
    second: Arrangement
    kind: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.first.keys, *self.second.keys)

    def draw(self, rng: random.Random) -> tuple[Image, ...]:
        return (*self.first.draw(rng), *self.second.draw(rng))


def pair(rng: random.Random) -> Pair:
    kind = rng.choice(KINDS)
    makers = {
        "shape": _sharing_a_shape,
        "colour": _sharing_a_colour,
        "more": _of_unlike_number,
        "new": _with_one_new,
    }
    return Pair(*makers[kind](rng), kind)


def _sharing_a_shape(rng: random.Random) -> tuple[Arrangement, Arrangement]:
    common, *rest = rng.sample(SHAPES, 5)
    colours = rng.sample(COLOURS, 6)
    return (arranged(rng, list(zip((common, *rest[:2]), colours[:3], strict=True))),
            arranged(rng, list(zip((common, *rest[2:]), colours[3:], strict=True))))  # fmt: skip


def _sharing_a_colour(rng: random.Random) -> tuple[Arrangement, Arrangement]:
    common, *rest = rng.sample(COLOURS, 5)
    shapes = rng.sample(SHAPES, 6)
    return (arranged(rng, list(zip(shapes[:3], (common, *rest[:2]), strict=True))),
            arranged(rng, list(zip(shapes[3:], (common, *rest[2:]), strict=True))))  # fmt: skip


def _of_unlike_number(rng: random.Random) -> tuple[Arrangement, Arrangement]:
    """Differences from -3 to 3, all alike frequent."""
    difference = rng.randint(-3, 3)
    fewer = rng.randint(1, 4)
    counts = (fewer + max(difference, 0), fewer + max(-difference, 0))
    first, second = ([(rng.choice(SHAPES), rng.choice(COLOURS)) for _ in range(count)] for count in counts)
    return arranged(rng, first), arranged(rng, second)


def _with_one_new(rng: random.Random) -> tuple[Arrangement, Arrangement]:
    """The second has the first's objects in other places, and one more."""
    count = rng.randint(1, 3)
    kinds = list(zip(rng.sample(SHAPES, count + 1), rng.sample(COLOURS, count + 1), strict=True))
    return arranged(rng, kinds[:-1]), arranged(rng, kinds)


def ask_compare(rng: random.Random, scene: Pair) -> Question:
    return _ASKERS[scene.kind](rng, scene)


def _common(rng: random.Random, scene: Pair, attribute: str, templates: tuple[str, ...]) -> Question:
    first, second = (
        {getattr(one, attribute) for one in half.objects} for half in (scene.first, scene.second)
    )
    (answer,) = first & second
    return ask(rng, templates, answer)


def _ask_shape(rng: random.Random, scene: Pair) -> Question:
    templates = (
        "Which shape is in both images?",
        "What shape do both images have?",
        "Name the common shape.",
    )
    return _common(rng, scene, "shape", templates)


def _ask_colour(rng: random.Random, scene: Pair) -> Question:
    templates = (
        "Which colour is in both images?",
        "What colour do both images have?",
        "Name the common colour.",
    )
    return _common(rng, scene, "colour", templates)


def _ask_more(rng: random.Random, scene: Pair) -> Question:
    difference = len(scene.first.objects) - len(scene.second.objects)
    which = "first" if difference > 0 else "second"
    answer = f"the {which}, {abs(difference)} more" if difference else "the same"
    templates = (
        "Which image has more objects, and how many more?",
        "Which image shows more shapes, by how many?",
    )
    return ask(rng, templates, answer)


def _ask_new(rng: random.Random, scene: Pair) -> Question:
    old = {one.name for one in scene.first.objects}
    (new,) = (one.name for one in scene.second.objects if one.name not in old)
    templates = ("What is new in the second image?", "What is only in the second image?",
                 "Which object was added in the second image?")  # fmt: skip
    return ask(rng, templates, article(new))


_ASKERS = {"shape": _ask_shape, "colour": _ask_colour, "more": _ask_more, "new": _ask_new}
