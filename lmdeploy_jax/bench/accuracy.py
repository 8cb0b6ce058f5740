"""How many held-out prompts of its own tasks a model answers exactly; see `lmdeploy_jax.assets.tasks`.

    python -m lmdeploy_jax.bench.accuracy [MODEL] [--count 50]

The judge of everything that must not cost answers: devices, kernels, quantisation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from lmdeploy_jax.assets.tasks import TASKS, Example, grade, held_out
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.pipeline import Pipeline

MOST_TOKENS = 120  # more than any right answer has


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


def accuracy(pipe: Pipeline, count: int = 50, seed: int = 1) -> dict[str, float]:
    """Share of exact answers a task, over `count` held-out prompts each (fewer where a task has fewer)."""
    examples = [example for task in TASKS for example in held_out(task, count, seed)]
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    for example, text in zip(examples, answers(pipe, examples), strict=True):
        right[example.task].append(grade(example, text))
    return {task: sum(marks) / len(marks) for task, marks in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-chat")
    parser.add_argument("--count", type=int, default=50, help="prompts a task")
    options = parser.parse_args()
    with Pipeline(options.model) as pipe:
        shares = accuracy(pipe, options.count)
    print(json.dumps({"mean": round(sum(shares.values()) / len(shares), 4)} | shares, indent=1))


if __name__ == "__main__":
    main()
