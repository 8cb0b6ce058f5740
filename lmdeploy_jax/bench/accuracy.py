"""How many held-out prompts of its own tasks a model answers exactly; see `lmdeploy_jax.assets.tasks`.

    python -m lmdeploy_jax.bench.accuracy [MODEL] [--count 50] [--vision [--blank]]

`--vision` takes the tasks with images (`lmdeploy_jax.assets.vision_tasks`), `--blank` puts even grey in every
image's place: what is right then was guessed.

The judge of everything that must not cost answers: devices, kernels, quantisation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Protocol

from lmdeploy_jax.assets import tasks as chat_tasks
from lmdeploy_jax.assets import vision_tasks
from lmdeploy_jax.assets.tasks import Example, grade
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.pipeline import Pipeline

MOST_TOKENS = 120  # more than any right answer has


class Tasks(Protocol):
    """Tasks by name, and examples of each that were kept from training."""

    @property
    def TASKS(self) -> tuple[str, ...]: ...

    @property
    def held_out(self) -> Callable[[str, int, int], list[Example]]: ...


def answers(pipe: Pipeline, examples: Iterable[Example]) -> list[str]:
    """Greedy answers; examples of one template setting run as one batch."""
    examples = list(examples)
    texts = [""] * len(examples)
    settings: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        settings.setdefault(json.dumps([example.tools, example.template], sort_keys=True), []).append(i)
    for indices in settings.values():
        first = examples[indices[0]]
        found = pipe.infer(
            [list(examples[i].messages) for i in indices],
            GenerationConfig(max_new_tokens=MOST_TOKENS),
            tools=list(first.tools) if first.tools else None,
            chat_template_kwargs=first.template,
        )
        assert isinstance(found, list)
        for i, response in zip(indices, found, strict=True):
            texts[i] = response.text
    return texts


def unchanged(example: Example) -> Example:
    return example


def accuracy(
    pipe: Pipeline,
    count: int = 50,
    seed: int = 1,
    tasks: Tasks = chat_tasks,
    change: Callable[[Example], Example] = unchanged,
) -> dict[str, float]:
    """Share of exact answers a task, over `count` held-out prompts each (fewer where a task has fewer).

    change: what is done to every prompt before it is asked.
    """
    examples = [change(example) for task in tasks.TASKS for example in tasks.held_out(task, count, seed)]
    right: dict[str, list[bool]] = {task: [] for task in tasks.TASKS}
    for example, text in zip(examples, answers(pipe, examples), strict=True):
        right[example.task].append(grade(example, text))
    return {task: sum(marks) / len(marks) for task, marks in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-chat")
    parser.add_argument("--count", type=int, default=50, help="prompts a task")
    parser.add_argument("--vision", action="store_true", help="tasks with images")
    parser.add_argument("--blank", action="store_true", help="with --vision: even grey for every image")
    options = parser.parse_args()
    if options.blank and not options.vision:
        parser.error("--blank is for tasks with images; add --vision")
    tasks: Tasks = vision_tasks if options.vision else chat_tasks
    with Pipeline(options.model) as pipe:
        shares = accuracy(
            pipe, options.count, tasks=tasks, change=vision_tasks.blanked if options.blank else unchanged
        )
    print(json.dumps({"mean": round(sum(shares.values()) / len(shares), 4)} | shares, indent=1))


if __name__ == "__main__":
    main()
