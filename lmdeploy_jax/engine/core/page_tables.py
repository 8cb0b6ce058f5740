"""Which pages each slot's sequence has: the host's tables, their share of a packed step, and what the layers
of each cache group see of them. No other file knows how page tables are packed.

A group with a window has a narrow table, which begins with the sequence's page number `first`: its layers see
the sequence from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.cache.layout import CacheGroup
from lmdeploy_jax.cache.pages import DUMP_PAGE, PAGE_SIZE
from lmdeploy_jax.engine import request
from lmdeploy_jax.engine.core.buckets import Buckets
from lmdeploy_jax.models.batch import AttentionMetadata

Fields = dict[str, Any]  # of a packed step, see `batch.Layout`


class PageTables:
    """For each cache group a row of pages for each slot, unused entries being the dump page; the last row is
    that of padding.
    """

    def __init__(self, session_len: int, groups: Sequence[CacheGroup], buckets: Buckets) -> None:
        self._groups, self.session_len, self._buckets = tuple(groups), session_len, buckets
        self.max_batch_size = buckets.max_batch_size
        most, rows = max(buckets.max_tokens, buckets.steps), self.max_batch_size + 1
        widths = [group.width(session_len, most) for group in groups]
        self._pages = [np.full((rows, width), DUMP_PAGE, np.int32) for width in widths]
        self._first = np.zeros((len(self._groups), rows), np.int32)

    # -- fields of a packed step --------------------------------------------------------------------------

    def decode_fields(self, rows: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what a decode step of so many sequences has of them."""
        return self._fields(rows, self._buckets.steps)

    def ragged_fields(self, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what a step of `tokens` tokens of at most `rows` sequences has of them."""
        slots = {f"cache_slots_{i}": (tokens,) for i in range(len(self._groups))}
        return self._fields(rows, tokens) | slots

    def _fields(self, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, group in enumerate(self._groups):
            shapes[f"page_table_{i}"] = rows, group.width(self.session_len, tokens)
            if group.window is not None:
                shapes[f"first_page_{i}"] = (rows,)
        return shapes

    # -- on the host --------------------------------------------------------------------------------------

    def update(self, sequences: Iterable[request.Sequence]) -> None:
        """Take over what the scheduler has given and taken since each sequence's last step."""
        for sequence in sequences:
            if sequence.table_version != sequence.pages.version:
                self._copy(sequence)
                sequence.table_version = sequence.pages.version

    def _copy(self, sequence: request.Sequence) -> None:
        for i, run in enumerate(sequence.pages.runs):
            row = self._pages[i][sequence.slot]
            row[: len(run.pages)] = run.pages
            row[len(run.pages) :] = DUMP_PAGE
            self._first[i, sequence.slot] = run.first

    def put(self, field: Fields, slots: np.ndarray) -> None:
        """Write the tables of these slots to the packed fields; the rows of padding stay as they are, 0."""
        for i, group in enumerate(self._groups):
            packed = field[f"page_table_{i}"]
            packed[: len(slots)] = self._pages[i][slots, : packed.shape[1]]
            if group.window is not None:
                field[f"first_page_{i}"][: len(slots)] = self._first[i, slots]

    def put_cache_slots(self, field: Fields, slots: np.ndarray, positions: np.ndarray) -> None:
        """Write where the K and V of these positions of these slots go: page * page size + offset."""
        number, offset = np.divmod(positions, PAGE_SIZE)
        for i, group in enumerate(self._groups):
            column = number if group.window is None else number - self._first[i, slots]
            pages = self._pages[i][slots, column]
            field[f"cache_slots_{i}"][: len(positions)] = pages * PAGE_SIZE + offset


# -- on the device ------------------------------------------------------------------------------------------


def decode_metadata(field: Fields, positions: Array, active: Array) -> tuple[AttentionMetadata, ...]:
    """What each cache group sees of a decode step: one position of each row, i32 [R], and whether the row is
    a sequence, bool [R].

    A position that has no page, since its token will not be wanted, goes to the dump page.
    """
    return tuple(
        AttentionMetadata(
            slots=jnp.where(active, _cache_slots(table, seen), 0),
            page_table=table,
            kv_lens=jnp.where(active, seen + 1, 0),
        )
        for table, seen in ((table, _from(first, positions)) for table, first in _tables(field))
    )


def ragged_metadata(field: Fields) -> tuple[AttentionMetadata, ...]:
    """What each cache group sees of a packed ragged step."""
    return tuple(
        AttentionMetadata(
            slots=field[f"cache_slots_{i}"],
            page_table=table,
            kv_lens=_from(first, field["kv_lens"]),
            tiles=field["tiles"] if first is None else _tiles_from(first, field["tiles"]),
            lookahead=field.get("lookahead"),
        )
        for i, (table, first) in enumerate(_tables(field))
    )


def _tables(field: Fields) -> Iterator[tuple[Array, Array | None]]:
    """Each group's table, and the number of each row's first page where the group has a window."""
    for i in count():
        if (table := field.get(f"page_table_{i}")) is None:
            return
        yield table, field.get(f"first_page_{i}")


def _from(first: Array | None, positions: Array) -> Array:
    return positions if first is None else positions - first * PAGE_SIZE


def _tiles_from(first: Array, tiles: Array) -> Array:
    return tiles.at[:, 3].add(-PAGE_SIZE * first[tiles[:, 0]] * (tiles[:, 2] > 0))


def _cache_slots(page_table: Array, positions: Array) -> Array:
    index = (positions // PAGE_SIZE)[:, None]
    pages = jnp.take_along_axis(page_table, index, axis=1, mode="fill", fill_value=DUMP_PAGE)[:, 0]
    return pages * PAGE_SIZE + positions % PAGE_SIZE
