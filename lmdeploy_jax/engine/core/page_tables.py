"""Which pages each slot's sequence has: the host's table, its share of a packed step, and the way from a
position in a sequence to a slot of the KV cache. No other file knows how page tables are packed.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.cache.pages import DUMP_PAGE, PAGE_SIZE, pages_for
from lmdeploy_jax.engine.request import Sequence


class PageTables:
    """A row of pages for each slot, unused entries being the dump page; the last row is that of padding."""

    def __init__(self, max_batch_size: int, session_len: int) -> None:
        self.width = pages_for(session_len)
        self._pages = np.zeros((max_batch_size + 1, self.width), np.int32)

    def shape(self, rows: int) -> tuple[int, ...]:
        """That of the packed table of a step of so many sequences."""
        return rows, self.width

    def update(self, sequences: Iterable[Sequence]) -> None:
        """Take over what the scheduler has given and taken since each sequence's last step."""
        for sequence in sequences:
            known, pages = sequence.table_len, sequence.pages
            if known != len(pages):
                row = self._pages[sequence.slot]
                row[known : len(pages)] = pages[known:]
                row[len(pages) :] = DUMP_PAGE
                sequence.table_len = len(pages)

    def put(self, packed: np.ndarray, slots: np.ndarray) -> None:
        """Write the tables of these slots to the packed field; the rows of padding stay as they are, 0."""
        packed[: len(slots)] = self._pages[slots]

    def cache_slots(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where the K and V of these positions go: page * page size + offset."""
        return self._pages[slots, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE


def cache_slots(page_table: Array, positions: Array) -> Array:
    """`PageTables.cache_slots` on the device: the table's rows and one position of each, i32 [R] -> i32 [R].

    A position that has no page, since its token will not be wanted, goes to the dump page.
    """
    index = (positions // PAGE_SIZE)[:, None]
    pages = jnp.take_along_axis(page_table, index, axis=1, mode="fill", fill_value=DUMP_PAGE)[:, 0]
    return pages * PAGE_SIZE + positions % PAGE_SIZE
