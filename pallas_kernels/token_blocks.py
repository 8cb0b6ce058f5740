"""Recurrences over packed chunks, block by block: what those of all kinds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Shaped

from lmdeploy_jax.pallas_kernels.spans import Spans

BLOCK = 64  # tokens whose updates of a state are done at once


@dataclass(frozen=True)
class Block:
    """Tokens `start .. start + count` of a step, all of one sequence."""

    start: Int32[Array, ""]
    count: Int32[Array, ""]
    slot: Int32[Array, ""]
    fresh: Bool[Array, ""]  # there is no state before it

    @property
    def valid(self) -> Bool[Array, "B"]:
        return jnp.arange(BLOCK) < self.count

    def put(self, out: Shaped[Array, "T *rest"], rows: Shaped[Array, "B *rest"]) -> Shaped[Array, "T *rest"]:
        """The block's rows into `out`, which ends at least a block behind the last token."""
        old = lax.dynamic_slice_in_dim(out, self.start, BLOCK)
        valid = self.valid.reshape(-1, *(1,) * (rows.ndim - 1))
        return lax.dynamic_update_slice_in_dim(out, jnp.where(valid, rows, old), self.start, 0)


def take_block(padded: Any, at: Block) -> Any:
    """The block's rows of each array, which ends a block behind the last token; zeros behind its count."""

    def taken(x: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(x, at.start, BLOCK)
        return jnp.where(at.valid.reshape(-1, *(1,) * (x.ndim - 1)), rows, jnp.zeros((), x.dtype))

    return tuple(taken(x) for x in padded)


def take_rows(arrays: Any, spans: Spans) -> Any:
    """The first row of each sequence."""
    assert spans.starts is not None
    starts = spans.starts
    return tuple(x[jnp.clip(starts, 0, len(x) - 1)] for x in arrays)


def put_rows(
    out: Shaped[Array, "T *rest"], rows: Shaped[Array, "S *rest"], spans: Spans
) -> Shaped[Array, "T *rest"]:
    """The rows of the sequences with one token to their places."""
    assert spans.starts is not None
    return out.at[jnp.where(spans.counts == 1, spans.starts, len(out))].set(rows, mode="drop")


def for_blocks(spans: Spans, block: Callable[[Block, Any], Any], carry: Any) -> Any:
    """`block` for the blocks of each sequence with more than one token, in order, as many as there are."""
    assert spans.starts is not None
    blocks = jnp.where(spans.counts > 1, -(-spans.counts // BLOCK), 0)
    ends, starts, counts = jnp.cumsum(blocks), spans.starts, spans.counts

    def body(i: Array, carry: Any) -> Any:
        row = jnp.searchsorted(ends, i, side="right")
        done = (i - (ends[row] - blocks[row])) * BLOCK
        count = jnp.minimum(counts[row] - done, BLOCK)
        return block(
            Block(starts[row] + done, count, spans.slots[row], spans.fresh[row] & (done == 0)), carry
        )

    return lax.fori_loop(0, ends[-1], body, carry)
