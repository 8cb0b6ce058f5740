"""The work list of prefill attention: which packed query rows belong to which sequence, and where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE
from lmdeploy_jax.pallas_kernels.registry import check_backend

TILE_ROWS = {"xla": 8, "pallas": 128, "pallas_interpret": 128, "mosaic": 128}
SHORT = 4  # most queries of a short tile; kernels have a smaller block for those


def tile_rows(backend: str) -> int:
    """Most query rows that one tile of `backend` may hold. Raises ValueError for an unknown backend."""
    check_backend(backend, "mosaic")
    return TILE_ROWS[backend]


def max_tiles(tokens: int, sequences: int, tile_rows: int) -> int:
    """An upper bound of the tiles that `tokens` packed query rows of at most `sequences` chunks need."""
    return tokens // tile_rows + min(sequences, tokens)


def scratch_pages(tokens: int, table_width: int) -> int:
    """Pages of 16 bits beside a quantised cache, where a step of so many tokens attends through Mosaic: the
    longest sequence fits, and four times the tokens of the step.
    """
    return max(4 * tokens // PAGE_SIZE, table_width)


def build_tiles(
    rows: Sequence[int] | np.ndarray,
    starts: Sequence[int] | np.ndarray,
    counts: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    tile_rows: int,
    width: int,
) -> np.ndarray:
    """Cuts chunks of queries into tiles of at most `tile_rows` rows.

    Chunk i is sequence `rows[i]` of the page table; its `counts[i]` queries lie in the packed queries from
    row `starts[i]` on, and the first one has position `positions[i]`. Returns int32 [width, 4] of (page table
    row, first query row, query rows, position of the first query), padded with zeros. Those that see most
    keys come first, and those of at most SHORT rows last.
    Raises ValueError when the tiles are more than `width`.
    """
    chunks = np.asarray([rows, starts, counts, positions], np.int32).reshape(4, -1).T
    pieces = -(-chunks[:, 2] // tile_rows)
    total = int(pieces.sum())
    if total > width:
        raise ValueError(f"{total} tiles of {tile_rows} query rows do not fit a work list of width {width}")
    offsets = (np.arange(total) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * tile_rows
    tiles = np.zeros((width, 4), np.int32)
    tiles[:total] = np.repeat(chunks, pieces, axis=0)
    tiles[:total, 1] += offsets
    tiles[:total, 2] = np.minimum(tiles[:total, 2] - offsets, tile_rows)
    tiles[:total, 3] += offsets
    used = tiles[:total]
    tiles[:total] = used[np.lexsort((-used[:, 2] - used[:, 3], used[:, 2] <= SHORT))]
    return tiles
