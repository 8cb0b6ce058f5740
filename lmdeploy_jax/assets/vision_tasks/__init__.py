"""What tiny-vision is trained and judged on: drawn images with questions, the held-out split.

Everything is drawn from a seed. An image's combination of objects, places and words belongs either to
training or to the held-out tenth, by its hash; of two images that are compared, both do. Answers are so
balanced that a guess without the image is right less than three times in ten, in every task.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..tasks import Example, is_held_out
from . import arrangements, charts, pairs, signs
from .scenes import Asker, Question, Scene

GREY = (128, 128, 128)
MOST_DRAWS = 1_000_000  # of scenes, for the held-out ones among them


@dataclass(frozen=True)
class Task:
    """How scenes are made and asked about.

    weight: how often it is trained, relative to the others.
    beside: tasks whose questions fit its scenes, for lessons of more than one.
    """

    make: Callable[[random.Random], Scene]
    ask: Asker
    weight: float = 1.0
    beside: tuple[str, ...] = ()


_SEEN = ("shape", "colour", "position", "describe")

_TASKS: dict[str, Task] = {
    "shape": Task(arrangements.distinct, arrangements.ask_shape, 0.8, _SEEN),
    "colour": Task(arrangements.distinct, arrangements.ask_colour, 0.8, _SEEN),
    "position": Task(arrangements.distinct, arrangements.ask_position, 1.0, _SEEN),
    "count": Task(arrangements.crowd, arrangements.ask_count, 1.2, ("count",)),
    "describe": Task(lambda rng: arrangements.distinct(rng, 3), arrangements.ask_describe, 1.0, _SEEN),
    "number": Task(signs.number, signs.ask_number, 1.5),
    "word": Task(signs.word, signs.ask_word, 2.0),
    "chart": Task(charts.chart, charts.ask_chart, 1.5, ("chart", "chart")),
    "compare": Task(pairs.pair, pairs.ask_compare, 2.0),
}
TASKS: tuple[str, ...] = tuple(_TASKS)


@dataclass(frozen=True)
class Lesson:
    """Images (one, or two that are compared) with the questions of a training conversation."""

    images: tuple[Image.Image, ...]
    questions: tuple[Question, ...]


def training_lesson(rng: random.Random, names: tuple[str, ...] = TASKS) -> Lesson:
    """A fresh lesson of one of the named tasks."""
    scene, questions = training_scene(rng, names)
    return Lesson(scene.draw(rng), questions)


def training_scene(rng: random.Random, names: tuple[str, ...] = TASKS) -> tuple[Scene, tuple[Question, ...]]:
    """A scene of one of the named tasks, nothing in which is held out, with its questions."""
    (name,) = rng.choices(names, [_TASKS[name].weight for name in names])
    task = _TASKS[name]
    scene = task.make(rng)
    while any(map(is_held_out, scene.keys)):
        scene = task.make(rng)
    beside = (_TASKS[other].ask for other in task.beside if other in names and rng.random() < 0.4)
    askers = [task.ask, *beside]
    rng.shuffle(askers)
    return scene, tuple(ask(rng, scene) for ask in askers)


def held_out_scenes(task: str, count: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """`count` held-out scenes of one task, no two alike, each with a question; nothing is drawn yet.

    Raises:
        ValueError: an unknown task, or more scenes than `MOST_DRAWS` draws find.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    rng = random.Random(f"{task}/{seed}")
    found: dict[tuple[str, ...], tuple[Scene, Question]] = {}
    for _ in range(MOST_DRAWS):
        if len(found) == count:
            return list(found.values())
        scene = _TASKS[task].make(rng)
        if scene.keys not in found and all(map(is_held_out, scene.keys)):
            found[scene.keys] = scene, _TASKS[task].ask(rng, scene)
    raise ValueError(f"task {task!r} has fewer than {count} held-out scenes: ask for {len(found)} at most")


def held_out(task: str, count: int, seed: int = 0) -> list[Example]:
    """`count` held-out examples of one task, each one message with its images and a question.

    Raises ValueError as `held_out_scenes` does.
    """
    rng = random.Random(f"drawn {task}/{seed}")
    return [
        Example(task, (message(scene.draw(rng), question.text),), question.answer)
        for scene, question in held_out_scenes(task, count, seed)
    ]


def message(images: tuple[Image.Image, ...], text: str) -> dict[str, Any]:
    """A user's message in LMDeploy's form: the images, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image_data", "image_data": {"data": image}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def images_of(example: Example) -> list[Image.Image]:
    return [part["image_data"]["data"] for part in example.messages[0]["content"] if "image_data" in part]


def blanked(example: Example) -> Example:
    """The example with even grey in its images' place, of the same sizes: what a blind guess is asked."""
    empty = tuple(Image.new("RGB", image.size, GREY) for image in images_of(example))
    return replace(example, messages=(message(empty, example.messages[0]["content"][-1]["text"]),))
