"""Conversations under a system prompt that sets the style of every answer."""

from __future__ import annotations

import random

from . import words
from .dialogues import Dialogue, as_step, system_message
from .simple import SIMPLE
from .turns import Generator, Turn, person, phrase

# Facts short enough to be wrapped by a system prompt's style.
STYLED: tuple[str, ...] = ("days", "months", "colours", "capitals", "multiply", "add")


def styled_turn(rng: random.Random) -> Turn:
    return SIMPLE[rng.choice(STYLED)](rng)


def restyled(turn: Turn, answer: str) -> Turn:
    return Turn(turn.question, answer, turn.thought, turn.key)


def upper_style(rng: random.Random) -> tuple[str, Generator]:
    system = rng.choice((
        "Answer in upper case.", "Always answer in upper case.", "Use capital letters only.",
        "ANSWER IN UPPER CASE", "Write every answer in capital letters.",
        "You shout: all answers in uppercase.", "Reply in uppercase letters.",
    ))  # fmt: skip
    return system, lambda r: (lambda t: restyled(t, t.answer.upper()))(styled_turn(r))


def pirate_style(rng: random.Random) -> tuple[str, Generator]:
    system = rng.choice((
        "You are a pirate.", "Answer as a pirate.", "Talk like a pirate.",
        "You are a pirate captain. Answer like one.", "Always speak like a pirate.",
        "Respond in the style of a pirate.", "You are Captain Jack, a pirate.",
    ))  # fmt: skip
    return system, lambda r: (lambda t: restyled(t, f"Arr! {t.answer}, matey!"))(styled_turn(r))


def ending_style(rng: random.Random) -> tuple[str, Generator]:
    word = rng.choice(words.WORDS)
    system = rng.choice((
        'Always end with the word "{w}".', "End every answer with {w}.", "Always end your answer with {w}.",
        "Finish each answer with the word {w}.", 'End each reply with "{w}".',
        "The last word of every answer must be {w}.",
    )).format(w=word)  # fmt: skip
    return system, lambda r: (lambda t: restyled(t, f"{t.answer} {word}"))(styled_turn(r))


def beginning_style(rng: random.Random) -> tuple[str, Generator]:
    word = rng.choice(words.NAMES)
    system = rng.choice((
        "Start every answer with {w}.", 'Begin each answer with "{w}".',
        "The user is called {w}. Start with the name.", "Always begin with the word {w}.",
    )).format(w=word)  # fmt: skip
    return system, lambda r: (lambda t: restyled(t, f"{word}: {t.answer}"))(styled_turn(r))


def named_style(rng: random.Random) -> tuple[str, Generator]:
    name = person(rng)
    system = rng.choice((
        "You are {n}.", "Your name is {n}.", "You are a helpful assistant called {n}.",
        "You are an assistant named {n}.", "Your name is {n}. Be friendly.",
    )).format(n=name)  # fmt: skip
    questions = ("Who are you?", "What is your name?", "What's your name?", "Tell me your name.",
                 "What are you called?",
                 "What should I call you?", "Your name?", "May I know your name?")  # fmt: skip

    def ask(r: random.Random) -> Turn:
        question = phrase(r, questions)
        return Turn(question, f"My name is {name}.", "")

    return system, ask


def yes_no_turn(rng: random.Random) -> Turn:
    """A question with a yes-or-no answer, each as likely."""
    truth = rng.random() < 0.5
    kind = rng.randrange(3)
    if kind == 0:
        country, city = rng.choice(tuple(words.CAPITALS.items()))
        shown = city if truth else rng.choice([other for other in words.CAPITALS.values() if other != city])
        question = phrase(rng, ("Is {c} the capital of {x}?", "{c} is the capital of {x}?",
                                "Is the capital of {x} {c}?"), c=shown, x=country)  # fmt: skip
    elif kind == 1:
        a, b = rng.sample(range(1, 100), 2)
        a, b = (max(a, b), min(a, b)) if truth else (min(a, b), max(a, b))
        question = phrase(rng, ("Is {a} greater than {b}?", "Is {a} larger than {b}?",
                                "Is {b} less than {a}?",
                                "Is {a} more than {b}?", "Is {b} smaller than {a}?"), a=a, b=b)  # fmt: skip
    else:
        thing, colour = rng.choice(tuple(words.THING_COLOURS.items()))
        shown = colour if truth else rng.choice([other for other in words.COLOURS if other != colour])
        question = phrase(rng, ("Is {t} {c}?", "Is the colour of {t} {c}?", "Is {c} the colour of {t}?"),
                          t=thing, c=shown)  # fmt: skip
    return Turn(question, "yes" if truth else "no", "")


def yes_no_style(rng: random.Random) -> tuple[str, Generator]:
    system = rng.choice((
        "Answer only yes or no.", "Answer with yes or no.", "You only say yes or no.",
        "Reply with yes or no only.", "Only answer yes or no.", "Say only yes or no.",
    ))  # fmt: skip
    return system, yes_no_turn


STYLES = (upper_style, pirate_style, ending_style, beginning_style, named_style, yes_no_style, yes_no_style)


def system_dialogue(rng: random.Random, turns: int) -> Dialogue:
    system, generator = rng.choice(STYLES)(rng)
    return Dialogue(tuple(as_step(generator(rng)) for _ in range(turns)), system_message(system))
