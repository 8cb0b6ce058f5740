"""The work list of prefill attention."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles, tile_rows


def test_a_chunk_is_cut_into_tiles_the_longest_work_first_and_short_ones_last() -> None:
    chunks = {"rows": [5, 2], "starts": [0, 21], "counts": [21, 1], "positions": [100, 300]}
    tiles = build_tiles(**chunks, tile_rows=8, width=6)
    assert tiles.dtype == np.int32
    np.testing.assert_array_equal(
        tiles, [[5, 16, 5, 116], [5, 8, 8, 108], [5, 0, 8, 100], [2, 21, 1, 300], [0, 0, 0, 0], [0, 0, 0, 0]]
    )


def test_every_query_lies_in_one_tile_and_the_bound_holds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(1, 40, size=rng.integers(1, 12))
        starts, tokens = np.cumsum(counts) - counts, int(counts.sum())
        width = max_tiles(tokens, len(counts), 16)
        tiles = build_tiles(np.arange(len(counts)), starts, counts, starts * 3, 16, width)
        covered = np.concatenate([np.arange(start, start + count) for _, start, count, _ in tiles])
        np.testing.assert_array_equal(np.sort(covered), np.arange(tokens))


def test_no_chunks_give_only_padding() -> None:
    assert not build_tiles([], [], [], [], tile_rows=8, width=3).any()


def test_too_narrow_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tiles of 8 query rows do not fit a work list of width 2"):
        build_tiles([0], [0], [17], [0], tile_rows=8, width=2)


def test_the_interpreted_kernel_takes_the_kernels_tiles() -> None:
    assert tile_rows("pallas_interpret") == tile_rows("pallas")
