"""What a choice of experts is told besides its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LEAST_SUM = 1e-20  # of weights that are divided by their sum, which sigmoids may all but lose


@dataclass(frozen=True)
class TopK:
    """`count` experts a token.

    scores: what logits become before the choice; "chosen": nothing, and the weights are a softmax over the
    chosen ones. normalise: whether weights are divided by their sum; scale multiplies them. Of `groups` equal
    groups of neighbouring experts only the best `top_groups` are chosen from: those with the best score, or
    sum of two (`group_score`).
    """

    count: int
    scores: Literal["softmax", "sigmoid", "chosen"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"
