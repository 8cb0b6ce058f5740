"""Numbers and words on signs."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image as images
from PIL.Image import Image

from ..tasks import words
from . import canvas
from .scenes import Question, ask

LETTERS = (3, 5)  # bounds of a word's length
WORDS: tuple[str, ...] = tuple(word.upper() for word in words.WORDS if LETTERS[0] <= len(word) <= LETTERS[1])
MOST_DIGITS = 4
VOWELS, CONSONANTS = "AEIOUY", "BCDFGHJKLMNPQRSTVWXZ"


@dataclass(frozen=True)
class Sign:
    """A number, or a word in capitals."""

    text: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.text,)

    def draw(self, rng: random.Random) -> tuple[Image, ...]:
        """Dark on light, or light on dark."""
        image = canvas.paper(rng)
        dark = canvas.tint(rng, rng.choice([name for name in canvas.COLOURS if name != "yellow"]))
        if rng.random() < 0.3:
            light = image.getpixel((0, 0))
            assert isinstance(light, tuple)
            image, dark = images.new("RGB", image.size, dark), (light[0], light[1], light[2])
        canvas.text(rng, image, self.text, dark)
        return (image,)


def number(rng: random.Random) -> Sign:
    """Of one to four digits; the more digits, the more numbers there are."""
    (digits,) = rng.choices(range(1, MOST_DIGITS + 1), (1, 3, 4, 4))
    return Sign(str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)))


def word(rng: random.Random) -> Sign:
    """A common word, or a made-up one, so that letters are read and not known words."""
    if rng.random() < 0.35:
        return Sign(rng.choice(WORDS))
    start = rng.randrange(2)
    return Sign(
        "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(rng.randint(*LETTERS)))
    )


def ask_number(rng: random.Random, scene: Sign) -> Question:
    templates = ("What number is this?", "Which number do you see?", "Read the number.",
                 "What is the number?", "What number is in the image?")  # fmt: skip
    return ask(rng, templates, scene.text)


def ask_word(rng: random.Random, scene: Sign) -> Question:
    templates = ("What does it say?", "Which word is this?", "Read the word.", "What is the word?",
                 "What is written in the image?")  # fmt: skip
    return ask(rng, templates, scene.text)
