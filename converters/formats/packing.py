"""What a device can make a weight's values of: words of a file, or plain rows. Works without JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Packing:
    """How int32 words hold the codes of a weight [N, K].

    across: a word's codes are neighbours in N, instead of in K. transposed: the words lie as those of [K, N].
    order: which of a word's codes lies at each place, from the lowest bits on; (): one after the other.
    """

    bits: int
    across: bool
    transposed: bool
    order: tuple[int, ...] = ()

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def places(self) -> tuple[int, ...]:
        """Of a word's codes."""
        return tuple(self.order.index(i) if self.order else i for i in range(self.per_word))

    def is_whole(self, rows: range, columns: range) -> bool:
        """Whether the words that hold these elements hold no others."""
        packed = rows if self.across else columns
        return packed.start % self.per_word == packed.stop % self.per_word == 0


@dataclass(frozen=True)
class Rounding:
    """Rows of so many columns that are rounded to E4M3, each with a scale; a part of one does not tell it."""

    columns: int

    def is_whole(self, rows: range, columns: range) -> bool:
        """Whether all of each row is there."""
        return len(columns) == self.columns


@runtime_checkable
class WordTensor(Protocol):
    """A `QuantTensor` of which a device can make the values."""

    @property
    def packing(self) -> Packing | Rounding:
        """How they lie in what `words` gives."""

    def words(self, rows: range, columns: range) -> np.ndarray:
        """What holds these elements, as the file has it."""
