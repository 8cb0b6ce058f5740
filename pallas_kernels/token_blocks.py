"""Recurrences over packed chunks, block by block: what those of all kinds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.spans import Spans

BLOCK = 64  # tokens whose updates of a state are done at once
Step = Callable[..., tuple[Array, Array]]
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


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


def run_packed(
    inputs: tuple[Shaped[Array, "T ..."], ...],
    states: Float32[Array, "slots N D V"],
    spans: Spans,
    step: Step,
    block: Callable[[Any, Array], tuple[Array, Array]],
) -> tuple[Float32[Array, "T H R V"], Float32[Array, "slots N D V"]]:
    """Chunks, one behind the other: those of one token at once, the others block by block.

    step: of one token a sequence, called with inputs, states, spans and which sequences are wanted.
    block: of a block of one sequence's inputs and the state before it; rows of zeros must change nothing.
    """
    single, states = step(*take_rows(inputs, spans), states, spans, spans.counts == 1)
    tokens = len(inputs[0])
    out = put_rows(jnp.zeros((tokens + BLOCK, *single.shape[1:]), single.dtype), single, spans)
    padded = tuple(jnp.pad(x, ((0, BLOCK), *((0, 0),) * (x.ndim - 1))) for x in inputs)

    def body(at: Block, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, states = carry
        before = jnp.where(at.fresh, 0.0, states[at.slot])
        values, after = block(take_block(padded, at), before)
        return at.put(out, values), states.at[at.slot].set(after)

    out, states = for_blocks(spans, body, (out, states))
    return out[:tokens], states


def through_block(
    q: Float32[Array, "B H D"],
    k: Float32[Array, "B H D"],
    added: Float32[Array, "H R B V"],
    total: Float32[Array, "H R B"],
    before: Float32[Array, "H R D V"],
) -> tuple[Float32[Array, "B H R V"], Float32[Array, "H R D V"]]:
    """The outputs of a block, and the state behind it, where each token adds `k added'` to a state that
    decays: `total` is the logarithm of how much, from the block's begin to behind each token.
    """
    grown = jnp.exp(total)[..., None]
    out = grown * einsum("ihd,hrdv->hriv", q, before)
    weights = decay_between(total) * einsum("ihd,jhd->hij", q, k)[:, None]
    out += einsum("hrij,hrjv->hriv", weights, added)
    left = jnp.exp(total[..., -1:] - total)[..., None]
    after = grown[..., -1:, :] * before + einsum("ihd,hriv->hrdv", k, left * added)
    return out.transpose(2, 0, 1, 3), after


def decay_between(total: Float32[Array, "H R B"]) -> Float32[Array, "H R B B"]:
    """What is left at token i of what token j has added; 0 for later ones, whose exponents might overflow."""
    differences = total[..., :, None] - total[..., None, :]
    return jnp.exp(jnp.where(jnp.tri(total.shape[-1], dtype=bool), differences, -jnp.inf))
