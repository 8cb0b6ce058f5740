"""Heads that judge a text in the place of one that goes on with it, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["none", "sigmoid", "softmax"]


@dataclass(frozen=True)
class ScoreConfig:
    """What the numbers that a head gives for a text stand for, and what makes them."""

    labels: tuple[str, ...]
    """Of its numbers, one each."""
    purpose: Literal["classes", "reward", "steps"] = "classes"
    """classes: whether, or which of its labels, a text is. reward: how good an answer is. steps: whether each
    step of a solution is right.
    """
    activation: Activation = "none"
    """What makes probabilities of its numbers."""
    width: int | None = None
    """Of a layer with biases and a ReLU before the last product; None: there is only that product."""
    bias: bool = False
    """Whether the last product has one."""
    words: bool = False
    """There are no weights of its own: its numbers are the logits of the labels as next tokens."""
    step: str = ""
    """The token at the end of each step."""
    qwen3_prompt: bool = False
    """Query and document stand in the prompt that Qwen3-Reranker was trained on."""

    @property
    def has_weights(self) -> bool:
        """Whether it stands in the place of the output head: such a model gives no text."""
        return not self.words
