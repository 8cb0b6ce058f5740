"""Ragged prefill attention as plain XLA operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.shapes import Pages, Sinks, Tiles
from lmdeploy_jax.pallas_kernels.streaming import attend_paged

GROUP = 8  # tiles a loop


def prefill_attention(
    q: Float[Array, "T H D"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int32[Array, "S M"],
    tiles: Tiles,
    sinks: Sinks | None,
    options: AttentionOptions,
    rows: int,
    lookahead: Int32[Array, "T"] | None = None,
) -> Float[Array, "T H D"]:
    """See `lmdeploy_jax.pallas_kernels.prefill_attention`; `rows` is the most that one tile holds."""
    tokens, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    groups = heads // kv_heads
    width = tiles.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    positions = jnp.where(row < tiles[:, 2:3], tiles[:, 3:4] + row, -1)  # [W, R]
    packed = tiles[:, 1:2] + row
    queries = q.at[packed].get(mode="clip")  # [W, R, H, D]
    ahead = None if lookahead is None else lookahead.at[packed].get(mode="clip") * (positions >= 0)
    queries = queries.reshape(width, rows, kv_heads, groups, head_dim).swapaxes(1, 2)
    out = attend_paged(
        queries.reshape(width, kv_heads, rows * groups, head_dim),
        k_pages,
        v_pages,
        page_table[tiles[:, 0]],
        jnp.repeat(positions, groups, axis=1),
        None if sinks is None else jnp.tile(sinks.reshape(kv_heads, groups), (1, rows)),
        options,
        group=GROUP,
        lookahead=None if ahead is None else jnp.repeat(ahead, groups, axis=1),
    )
    out = (
        out.reshape(width, kv_heads, rows, groups, head_dim)
        .swapaxes(1, 2)
        .reshape(width * rows, heads, head_dim)
    )
    return out.at[_tile_row_of(tokens, tiles, rows)].get(mode="fill", fill_value=0.0).astype(q.dtype)


def _tile_row_of(tokens: int, tiles: jax.Array, rows: int) -> jax.Array:
    """For each packed query row, the row of the tiles' outputs that holds it; past the end if none does."""
    offset = jnp.arange(tokens, dtype=jnp.int32)[:, None] - tiles[:, 1]  # [T, W]
    inside = (offset >= 0) & (offset < tiles[:, 2])
    index = jnp.arange(tiles.shape[0], dtype=jnp.int32) * rows + offset
    covered = jnp.max(jnp.where(inside, index, -1), axis=1)
    return jnp.where(covered >= 0, covered, tiles.shape[0] * rows)
