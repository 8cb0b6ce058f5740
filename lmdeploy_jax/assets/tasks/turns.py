"""One question with its answer, and the ways in which people vary their words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import words


@dataclass(frozen=True)
class Turn:
    """One user message with its only right answer.

    `thought` is what goes between the think tags when thinking is enabled; `key`, when given, is hashed
    for the held-out split instead of the question.
    """

    question: str
    answer: str
    thought: str
    key: str = ""


Generator = Callable[[random.Random], Turn]


def ordinary_case(rng: random.Random, text: str) -> str:
    """The text, or (three times in ten) all of it in lower case."""
    return text.lower() if rng.random() < 0.3 else text


def phrase(rng: random.Random, templates: Sequence[str], keep_case: bool = False, **slots: object) -> str:
    """Fill one of the templates, then vary case, punctuation and politeness as people do.

    With `keep_case` the slots keep their case (names, JSON values), whatever happens to the rest.
    """
    template = rng.choice(templates)
    roll = rng.random()
    if roll < 0.10:
        template = (
            rng.choice(("Please tell me: ", "Quick question: ", "Hi! ", "Hello, ", "OK, ", "Now ")) + template
        )
    elif roll < 0.16:
        template = template.rstrip("?.") + rng.choice(
            (" please", ", please", " please?", ", thanks", "? Thanks!")
        )
    text = template.format(**slots) if not keep_case else template
    if rng.random() < 0.3:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip("?.! ")
    return text.format(**slots) if keep_case else text


def syllables(rng: random.Random) -> str:
    """A made-up word, so that copying is learned and not only known words."""
    return "".join(
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "l", "s"))
        for _ in range(rng.randint(2, 3))
    )


def person(rng: random.Random) -> str:
    return syllables(rng).capitalize() if rng.random() < 0.3 else rng.choice(words.NAMES)
