"""The shapes that are compiled. No other file decides on a shape."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

REPORT_ROWS = 64  # rows whose logits are reported on, or pass through Python, in one call
PAGE_COPIES = 64  # pages duplicated in one call


@dataclass(frozen=True)
class Buckets:
    """Sizes in rising order; the last is the limit."""

    decode: tuple[int, ...]  # sequences of a decode step; also rows of a greedy head
    sampling: tuple[int, ...]  # rows of the heads that do more
    tokens: tuple[int, ...]  # tokens of a ragged step

    @property
    def max_batch_size(self) -> int:
        return self.decode[-1]

    @property
    def max_tokens(self) -> int:
        return self.tokens[-1]


def plan(platform: str, max_batch_size: int, max_tokens: int) -> Buckets:
    """Buckets for a device kind. A CPU computes every padding row in full, so its steps are finer at the low end."""
    least = 16 if platform == "cpu" else 64
    decode = _ladder(1, max_batch_size, 2 if platform != "cpu" else 4)
    if platform == "cpu" and max_batch_size > 16:
        decode = tuple(sorted({*decode, *(n for n in (32,) if n < max_batch_size)}))
    return Buckets(decode, _ladder(1, max_batch_size, 8), _ladder(least, max(max_tokens, max_batch_size), 4))


def _ladder(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * factor, last))
    return tuple(sizes)


def fit(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest size that holds `wanted`. Raises ValueError beyond the last."""
    i = bisect_left(sizes, wanted)
    if i == len(sizes):
        raise ValueError(f"{wanted} is beyond the largest compiled size {sizes[-1]}")
    return sizes[i]
