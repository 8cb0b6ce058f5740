"""A prompt as the engine takes it: token ids, and what its pages of the KV cache depend on besides them."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start .. start + length` that stand for other content, an image for example.

    content_hash: identifies that content, since the ids of all such tokens are one placeholder.
    """

    start: int
    length: int
    content_hash: bytes

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True, eq=False)
class SpanImage:
    """What a span's image is encoded from, and which of the span's tokens its rows stand for.

    patches: levels 0...255 [views, patches a view, values]; grid: rows and columns of patches of a view.
    rows: int32 [n], rows of the vision model's result: tokens of the views by number, learned rows from -1
        down.
    places: int32 [n], the tokens that these rows take the place of, counted from the span's start, rising.
    view_rows: tokens that a view gives; view_size: what it takes of a run of the encoder.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    rows: np.ndarray
    places: np.ndarray
    view_rows: int
    view_size: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class RopePositions:
    """What RoPE turns a prompt's tokens by, where these are not their numbers (M-RoPE).

    positions: int32 [3, tokens], of time, row and column.
    offset: what is added to the number of a token behind the prompt.
    """

    positions: np.ndarray
    offset: int


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids with the spans among them, in order and apart from each other.

    images: one for each span, where the model has an encoder.
    salt: prompts share cached pages only under the same salt.
    rope: None: tokens turn by their numbers. It follows from the spans and their content.
    Raises ValueError for spans that overlap, are empty or reach beyond the ids.
    """

    ids: Sequence[int]
    spans: tuple[Span, ...] = ()
    salt: bytes = b""
    images: tuple[SpanImage, ...] = ()
    rope: RopePositions | None = None

    def __post_init__(self) -> None:
        if self.spans:
            self._check_spans()

    def _check_spans(self) -> None:
        bounds = [0, *(bound for span in self.spans for bound in (span.start, span.stop)), len(self.ids)]
        if any(low > high for low, high in pairwise(bounds)) or not all(span.length for span in self.spans):
            raise ValueError(f"spans overlap or miss a prompt of {len(self.ids)} tokens: {self.spans}")

    def __len__(self) -> int:
        """Its number of tokens."""
        return len(self.ids)

    def content(self, start: int, stop: int) -> bytes:
        """What tokens `start .. stop` are besides their ids: the content of each span among them, and which
        part of it they are.
        """
        found = b""
        for i in range(bisect_right(self.spans, start, key=lambda span: span.stop), len(self.spans)):
            span = self.spans[i]
            if span.start >= stop:
                break
            place = struct.pack("<3q", span.start - start, span.length, len(span.content_hash))
            found += place + span.content_hash
        return found
