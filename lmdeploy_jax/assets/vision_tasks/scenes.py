"""What the tasks' images have in common: a scene that can be drawn, and a question about it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL.Image import Image

from ..tasks.turns import phrase


class Scene(Protocol):
    """One or two images before they are drawn.

    `keys` name the combinations of objects, places and words that they show, one an image: what the held-out
    split hashes. Sizes, offsets, backgrounds and line widths are drawn anew each time and are in no key.
    """

    @property
    def keys(self) -> tuple[str, ...]: ...

    def draw(self, rng: random.Random) -> tuple[Image, ...]:
        """Its images, in RGB."""
        ...


@dataclass(frozen=True)
class Question:
    """A question about a scene with its only right answer."""

    text: str
    answer: str


Asker = Callable[[random.Random, Any], Question]


def ask(rng: random.Random, templates: tuple[str, ...], answer: object, **slots: Any) -> Question:
    """One of the templates in a person's words, as tiny-chat is asked."""
    return Question(phrase(rng, templates, **slots), str(answer))
