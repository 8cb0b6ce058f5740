"""Conversations: their parts, the plain ones, thinking, and memory over turns."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import words
from .simple import SIMPLE
from .turns import Generator, Turn, person, phrase

Message = dict[str, Any]

PLAIN_SYSTEMS: tuple[str, ...] = (
    "You are a helpful assistant.", "You are tiny-chat.", "You are a helpful AI assistant.", "Be brief.",
    "You are helpful.", "You are a friendly chatbot. Answer the user.", "Answer the user's question.",
    "You are an assistant.",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One user turn of a conversation: the messages it adds, the answer, and what the split hashes.

    `answer` is an assistant message: `content`, or `tool_calls` in OpenAI's form, and `reasoning_content`
    when thinking.
    """

    asked: tuple[Message, ...]
    answer: Message
    key: str


@dataclass(frozen=True)
class Dialogue:
    """What a conversation is about: its fixed opening and a source of further steps."""

    steps: tuple[Step, ...]
    opening: tuple[Message, ...] = ()
    tools: tuple[Message, ...] | None = None
    template: dict[str, Any] = field(default_factory=dict)


def as_step(turn: Turn) -> Step:
    return Step(({"role": "user", "content": turn.question},), {"role": "assistant", "content": turn.answer},
                turn.key or turn.question)  # fmt: skip


def system_message(text: str) -> tuple[Message, ...]:
    return ({"role": "system", "content": text},)


def maybe_plain_system(rng: random.Random, share: float = 0.25) -> tuple[Message, ...]:
    return system_message(rng.choice(PLAIN_SYSTEMS)) if rng.random() < share else ()


def simple_dialogue(rng: random.Random, generators: tuple[Generator, ...]) -> Dialogue:
    return Dialogue(tuple(as_step(generate(rng)) for generate in generators), maybe_plain_system(rng))


def thinking_dialogue(rng: random.Random, generator: Generator) -> Dialogue:
    turn = generator(rng)
    step = as_step(turn)
    answer = {**step.answer, "reasoning_content": turn.thought}
    return Dialogue(
        (Step(step.asked, answer, step.key),), maybe_plain_system(rng), template={"enable_thinking": True}
    )


@dataclass(frozen=True)
class Fact:
    """Something the user tells, the acknowledgement, and the ways to ask for it later."""

    told: tuple[str, ...]
    reply: str
    asked: tuple[str, ...]
    recall: str


FACTS: tuple[tuple[Fact, Callable[[random.Random], object]], ...] = (
    (
        Fact(
            ("My name is {v}.", "I am {v}.", "I'm {v}.", "Hi, my name is {v}.", "Hello, I am {v}!",
             "Call me {v}.",
             "Hi! I'm {v}.", "People call me {v}."),
            "Nice to meet you, {v}!",
            ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?",
             "Say my name.", "Tell me my name.",
             "What am I called?", "Can you tell me my name?"),
            "Your name is {v}.",
        ),
        person,
    ),
    (
        Fact(
            ("My favourite colour is {v}.", "I like the colour {v} best.",
             "My favorite color is {v}.", "I love the color {v}."),
            "I will remember that you like {v}.",
            ("What is my favourite colour?", "What's my favorite color?", "Which colour do I like?",
             "Do you remember my favourite colour?", "Which color do I like best?"),
            "Your favourite colour is {v}.",
        ),
        lambda rng: rng.choice(words.COLOURS),
    ),
    (
        Fact(
            ("I live in {v}.", "My home is in {v}.", "I am from {v}.", "My city is {v}."),
            "{v} is a nice place.",
            ("Where do I live?", "Which city do I live in?", "Where is my home?", "What is my city?",
             "Where am I from?"),
            "You live in {v}.",
        ),
        lambda rng: rng.choice(words.CITIES),
    ),
    (
        Fact(
            ("I am {v} years old.", "I'm {v} years old.", "My age is {v}.", "I turned {v} today."),
            "{v} is a good age.",
            ("How old am I?", "What is my age?", "Do you know my age?", "Tell me my age."),
            "You are {v} years old.",
        ),
        lambda rng: rng.randint(10, 99),
    ),
)  # fmt: skip

# What is asked between telling a fact and asking for it.
FILLERS: tuple[str, ...] = ("add", "days", "months", "colours", "capitals", "multiply", "spell", "greeting")


def memory_dialogue(rng: random.Random, fillers: int) -> Dialogue:
    """Facts first, unrelated questions between, then the questions about the facts."""
    chosen = [(fact, make(rng)) for fact, make in rng.sample(FACTS, rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.5 and all(fact is not FACTS[0][0] for fact, _ in chosen):
        chosen[0] = (FACTS[0][0], person(rng))
    told = [
        Turn(phrase(rng, fact.told, keep_case=True, v=value), fact.reply.format(v=value), "")
        for fact, value in chosen
    ]
    between = [SIMPLE[rng.choice(FILLERS)](rng) for _ in range(fillers)]
    rng.shuffle(chosen)
    asked = []
    for fact, value in chosen:
        question = phrase(rng, fact.asked)
        asked.append(Turn(question, fact.recall.format(v=value), ""))
    return Dialogue(tuple(map(as_step, (*told, *between, *asked))), maybe_plain_system(rng, 0.15))
