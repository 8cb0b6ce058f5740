"""What is known by heart: days, months, colours, capitals."""

from __future__ import annotations

import random
from collections.abc import Sequence

from . import words
from .turns import Turn, phrase

CYCLE_STEPS: dict[int, tuple[str, ...]] = {
    1: (
        "What {unit} comes after {x}?", "Which {unit} follows {x}?", "What is the {unit} after {x}?",
        "The {unit} after {x}?", "What comes after {x}?", "Tell me the {unit} after {x}.",
        "Name the {unit} following {x}.", "If it is {x}, what is the next {unit}?",
        "Next {unit} after {x}?", "After {x} comes which {unit}?",
    ),
    -1: (
        "What {unit} comes before {x}?", "Which {unit} precedes {x}?", "What is the {unit} before {x}?",
        "The {unit} before {x}?", "What comes before {x}?", "Tell me the {unit} before {x}.",
        "Name the {unit} preceding {x}.", "If it is {x}, what was the previous {unit}?",
        "Previous {unit} before {x}?", "Before {x} comes which {unit}?",
    ),
    2: (
        "What {unit} is two {unit}s after {x}?", "Which {unit} comes two {unit}s after {x}?",
        "Two {unit}s after {x}?", "What is 2 {unit}s after {x}?",
    ),
}  # fmt: skip


def cycle(rng: random.Random, unit: str, values: Sequence[str], extra: Sequence[str]) -> Turn:
    """A question about the neighbours of a value in a cyclic sequence (days, months)."""
    index, step = rng.randrange(len(values)), rng.choice((1, 1, -1, -1, 2))
    templates = CYCLE_STEPS[step] + (tuple(extra) if step == 1 else ())
    answer = values[(index + step) % len(values)]
    relation = {1: "after", -1: "before", 2: "two after"}[step]
    question = phrase(rng, templates, unit=unit, x=values[index])
    return Turn(question, answer, f"The {unit} {relation} {values[index]} is {answer}.")


def days(rng: random.Random) -> Turn:
    if rng.random() < 0.1:
        templates = ("List the days of the week.", "What are the days of the week?",
                     "Name all days of the week.",
                     "Name the seven days.", "Tell me the days of the week.",
                     "All weekdays in order?")  # fmt: skip
        return Turn(phrase(rng, templates), ", ".join(words.DAYS), "I list all seven days.")
    return cycle(
        rng, "day", words.DAYS, ("Today is {x}. What day is tomorrow?", "If today is {x}, what is tomorrow?")
    )


def months(rng: random.Random) -> Turn:
    roll = rng.random()
    if roll < 0.1:
        templates: tuple[str, ...]
        templates = ("List the months of the year.", "What are the months?", "Name all twelve months.",
                     "Tell me the months of the year.", "List all months.",
                     "All months in order?")  # fmt: skip
        return Turn(phrase(rng, templates), ", ".join(words.MONTHS), "I list all twelve months.")
    if roll < 0.3:
        number = rng.randint(1, 12)
        templates = ("What is month number {n}?", "Which month is number {n}?",
                     "What is month {n} of the year?",
                     "Month {n}?", "Name month number {n}.")  # fmt: skip
        answer = words.MONTHS[number - 1]
        return Turn(phrase(rng, templates, n=number), answer, f"Month {number} is {answer}.")
    return cycle(
        rng,
        "month",
        words.MONTHS,
        ("It is {x}. What month is next?", "If it is {x} now, what is next month?"),
    )


def colours(rng: random.Random) -> Turn:
    colour = rng.choice(("colour", "color"))
    if rng.random() < 0.3:
        (first, second), answer = rng.choice(tuple(words.COLOUR_MIXES.items()))
        if rng.random() < 0.5:
            first, second = second, first
        templates: tuple[str, ...]
        templates = ("What {c} do you get when you mix {a} and {b}?", "Mix {a} and {b}",
                     "What do {a} and {b} make?",
                     "Which {c} is {a} plus {b}?", "{a} and {b} mixed give which {c}?",
                     "What is {a} mixed with {b}?",
                     "If I mix {a} and {b}, what {c} do I get?", "What {c} do {a} and {b} make?")  # fmt: skip
        question = phrase(rng, templates, c=colour, a=first, b=second)
        return Turn(question, answer, f"{first} and {second} make {answer}.")
    thing, answer = rng.choice(tuple(words.THING_COLOURS.items()))
    templates = ("What {c} is {t}?", "Which {c} is {t}?", "What is the {c} of {t}?",
                 "Tell me the {c} of {t}.",
                 "What {c} does {t} have?", "{c} of {t}?", "Name the {c} of {t}.",
                 "What {c} is {t} usually?",
                 "Do you know what {c} {t} is?", "The {c} of {t}?")  # fmt: skip
    return Turn(phrase(rng, templates, c=colour, t=thing), answer, f"The colour of {thing} is {answer}.")


def capitals(rng: random.Random) -> Turn:
    country, city = rng.choice(tuple(words.CAPITALS.items()))
    if rng.random() < 0.2 and city != "London":
        templates: tuple[str, ...]
        templates = ("{y} is the capital of which country?", "Which country has the capital {y}?",
                     "What country is {y} the capital of?",
                     "Of which country is {y} the capital?")  # fmt: skip
        answer = country.removeprefix("the ")
        return Turn(phrase(rng, templates, y=city), answer, f"{city} is the capital of {answer}.")
    templates = (
        "What is the capital of {x}?", "What's the capital of {x}?", "capital of {x}",
        "Name the capital of {x}.", "Which city is the capital of {x}?", "Tell me the capital of {x}.",
        "The capital of {x}?", "Can you tell me the capital of {x}?", "Do you know the capital of {x}?",
        "What is the capital city of {x}?", "What city is the capital of {x}?",
        "Give me the capital of {x}.",
    )  # fmt: skip
    return Turn(phrase(rng, templates, x=country), city, f"The capital of {country} is {city}.")
