"""What tiny-chat is trained and judged on: training conversations, held-out examples, and the grader.

Everything is drawn from a seed. A question belongs either to training or to the held-out tenth, by a hash of
its words alone (for sums: of the two numbers), so that neither side ever sees the other's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import dialogues
from .dialogues import Dialogue, Message, Step
from .simple import SIMPLE
from .styles import system_dialogue
from .tools import tool_dialogue

HELD_OUT_SHARE = 10  # one question in ten is kept from training

TASKS: tuple[str, ...] = (*SIMPLE, "system", "memory", "tools", "tool_answer", "think")

THOUGHT_TASKS: tuple[str, ...] = tuple(name for name in SIMPLE if name not in ("json", "repeat"))

# Relative frequency of a simple task in training; what is not named counts 1.
WEIGHTS: dict[str, float] = {
    "add": 5.0, "subtract": 5.0, "multiply": 1.5, "reverse": 2.5, "spell": 1.5, "units": 1.2, "json": 3.0,
    "other": 2.0, "days": 0.7, "months": 0.8, "colours": 0.8, "count": 0.6, "repeat": 3.0, "greeting": 1.5,
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A prompt with the only right answer.

    `messages` are in OpenAI's form and end with a user or tool message; `answer` is what must follow:
    text, or the `<tool_call>` blocks. `template` holds the keyword arguments for the chat template.
    """

    task: str
    messages: tuple[Message, ...]
    answer: str
    tools: tuple[Message, ...] | None = None
    template: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """A training conversation: every assistant message in it is a target."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] | None = None
    template: dict[str, Any] = field(default_factory=dict)


def is_held_out(key: str) -> bool:
    """Whether a question is kept from training, whatever its case and punctuation."""
    return hashlib.sha256(_plain(key).encode()).digest()[0] * HELD_OUT_SHARE < 256


def _plain(key: str) -> str:
    return re.sub(r"[\s?.!,'\"]+", " ", key.lower()).strip()


def answer_text(message: Message) -> str:
    """The text by which the model gives this assistant message, without its thoughts."""
    calls = message.get("tool_calls") or ()
    bodies = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
    return message["content"] or "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def draw(rng: random.Random, task: str, turns: int) -> Dialogue:
    """One dialogue of the task, with about `turns` questions."""
    if task == "system":
        return system_dialogue(rng, turns)
    if task == "memory":
        return dialogues.memory_dialogue(rng, rng.randint(0, turns - 1))
    if task in ("tools", "tool_answer"):
        return tool_dialogue(rng, turns)
    if task == "think":
        return dialogues.thinking_dialogue(rng, SIMPLE[rng.choice(THOUGHT_TASKS)])
    return dialogues.simple_dialogue(rng, (SIMPLE[task],))


def training_conversation(rng: random.Random) -> Conversation:
    """A fresh conversation without any held-out question in it."""
    while True:
        dialogue = _training_dialogue(rng)
        if not any(is_held_out(step.key) for step in dialogue.steps):
            messages = tuple(_messages(dialogue.opening, dialogue.steps))
            return Conversation(messages, dialogue.tools, dialogue.template)


def _training_dialogue(rng: random.Random) -> Dialogue:
    roll = rng.random()
    if roll < 0.25:
        return draw(rng, "system", rng.randint(1, 5))
    if roll < 0.33:
        return draw(rng, "memory", rng.randint(1, 4))
    if roll < 0.47:
        return draw(rng, "tools", rng.randint(1, 4))
    if roll < 0.57:
        return draw(rng, "think", 1)
    weights = [WEIGHTS.get(name, 1.0) for name in SIMPLE]
    names = rng.choices(list(SIMPLE), weights, k=rng.choice((1, 2, 4, 8, 12, 12)))
    steps = (_training_step(rng, name) for name in names)
    return Dialogue(tuple(steps), dialogues.maybe_plain_system(rng))


def _training_step(rng: random.Random, name: str) -> Step:
    while True:
        step = dialogues.as_step(SIMPLE[name](rng))
        if not is_held_out(step.key):
            return step


def _messages(opening: tuple[Message, ...], steps: tuple[Step, ...]) -> Iterator[Message]:
    yield from opening
    for step in steps:
        yield from step.asked
        yield step.answer


def held_out(task: str, count: int, seed: int = 0, draws: int = 20_000) -> list[Example]:
    """Up to `count` different held-out examples of one task, each ending with a question unknown to training.

    A task with few questions may have fewer in the held-out tenth: at most `draws` dialogues are tried.

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    rng = random.Random(f"{task}/{seed}")
    found: dict[str, Example] = {}
    for _ in range(draws):
        if len(found) >= count:
            break
        dialogue = draw(rng, task, rng.randint(1, 3))
        for index, step in enumerate(dialogue.steps):
            if is_held_out(step.key) and _belongs(task, step, index, dialogue):
                found.setdefault(_plain(step.key), _example(task, dialogue, index))
    return list(found.values())[:count]


def _belongs(task: str, step: Step, index: int, dialogue: Dialogue) -> bool:
    """Whether this step of a dialogue tests the task itself and not the small talk around it."""
    if task == "memory":
        return index == len(dialogue.steps) - 1
    if task == "tools":
        return step.asked[-1]["role"] == "user"
    if task == "tool_answer":
        return step.asked[-1]["role"] == "tool"
    return True


def _example(task: str, dialogue: Dialogue, index: int) -> Example:
    before = tuple(_messages(dialogue.opening, dialogue.steps[:index]))
    step = dialogue.steps[index]
    return Example(task, before + step.asked, answer_text(step.answer), dialogue.tools, dialogue.template)


def split_thought(text: str) -> tuple[str, str]:
    """(thought, answer) of a model's output; the thought is empty where there is none."""
    match = re.match(r"\s*<think>(.*?)</think>\s*(.*)", text, re.DOTALL)
    return (match[1].strip(), match[2]) if match else ("", text)


@functools.cache
def _tool_calls(text: str) -> str | None:
    """The calls in the text as canonical JSON; None where one isn't JSON or other text stands around them."""
    blocks = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    if not blocks or re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL).strip():
        return None
    try:
        return json.dumps([json.loads(block) for block in blocks], sort_keys=True)
    except json.JSONDecodeError:
        return None


def _same_json(expected: str, text: str) -> bool:
    try:
        return bool(json.loads(expected) == json.loads(text))
    except json.JSONDecodeError:
        return False


def grade(example: Example, text: str) -> bool:
    """Whether the model's output (no end-of-turn token) is exactly right.

    Tool calls and JSON are compared parsed; with thinking enabled a thought must come first, and only what
    follows it counts.
    """
    thought, answer = split_thought(text)
    if bool(thought) != bool(example.template.get("enable_thinking")):
        return False
    if example.answer.startswith("<tool_call>"):
        return _tool_calls(example.answer) == _tool_calls(answer)
    if example.task == "json":
        return _same_json(example.answer, answer)
    return answer.strip() == example.answer
