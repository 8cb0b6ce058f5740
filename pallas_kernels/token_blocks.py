"""Recurrences over packed chunks, block by block: what those of all kinds share.

What of a block does not depend on the state before it is made for several blocks at once; what does is a few
small products, one block after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.spans import Spans

BLOCK = 64  # tokens whose updates of a state are done at once
AT_ONCE = 8  # blocks that are prepared at once; in short steps, half of those that would fill the step
Step = Callable[..., tuple[Array, Array]]
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """Tokens `start .. start + count` of a step, all of one sequence."""

    start: Int32[Array, "*blocks"]
    count: Int32[Array, "*blocks"]
    slot: Int32[Array, "*blocks"]
    fresh: Bool[Array, "*blocks"]  # there is no state before it

    @property
    def valid(self) -> Bool[Array, "B"]:
        return jnp.arange(BLOCK) < self.count

    def put(self, out: Shaped[Array, "T *rest"], rows: Shaped[Array, "B *rest"]) -> Shaped[Array, "T *rest"]:
        """The block's rows into `out`, which ends at least a block behind the last token."""
        old = lax.dynamic_slice_in_dim(out, self.start, BLOCK)
        valid = self.valid.reshape(-1, *(1,) * (rows.ndim - 1))
        return lax.dynamic_update_slice_in_dim(out, jnp.where(valid, rows, old), self.start, 0)


class Prepared(NamedTuple):
    """A block in which each token adds `k added'` to a state that decays, but for the state before it."""

    q: Float32[Array, "H R B D"]  # times what is left of that state at each token
    k: Float32[Array, "H R B D"]  # times what is left of each token's addition behind the block
    added: Float32[Array, "H R B V"]
    removed: Float32[Array, "H R B D"] | None  # times that state, what is not added
    weights: Float32[Array, "H R B B"]  # of additions in outputs
    kept: Float32[Array, "H R"]  # of that state, behind the block

    def advance(
        self, before: Float32[Array, "N D V"]
    ) -> tuple[Float32[Array, "B H R V"], Float32[Array, "N D V"]]:
        """The block's outputs, and the state behind it."""
        state = before.reshape(*self.kept.shape, *before.shape[1:])
        added = self.added
        if self.removed is not None:
            added = added - einsum("hrid,hrdv->hriv", self.removed, state)
        out = einsum("hrid,hrdv->hriv", self.q, state) + einsum("hrij,hrjv->hriv", self.weights, added)
        after = self.kept[..., None, None] * state + einsum("hrid,hriv->hrdv", self.k, added)
        return out.transpose(2, 0, 1, 3), after.reshape(before.shape)


Carry = tuple[Array, Array]  # outputs [T + a block, H, R, V], and states [slots, N, D, V]
Advance = Callable[[Block, Prepared, Carry], Carry]


def prepared(
    q: Float32[Array, "B H D"],
    k: Float32[Array, "B H D"],
    added: Float32[Array, "H R B V"],
    total: Float32[Array, "H R B"],
    removed: Float32[Array, "H R B D"] | None = None,
) -> Prepared:
    """`total` is the logarithm of what is left, behind each token, of the state before the block."""
    weights = decay_between(total) * einsum("ihd,jhd->hij", q, k)[:, None]
    q, k = (each.transpose(1, 0, 2)[:, None] for each in (q, k))
    left = jnp.exp(total[..., -1:] - total)[..., None]
    return Prepared(jnp.exp(total)[..., None] * q, left * k, added, removed, weights, jnp.exp(total[..., -1]))


def decay_between(total: Float32[Array, "H R B"]) -> Float32[Array, "H R B B"]:
    """What is left at token i of what token j has added; 0 for later ones, whose exponents might overflow."""
    differences = total[..., :, None] - total[..., None, :]
    return jnp.exp(jnp.where(jnp.tri(total.shape[-1], dtype=bool), differences, -jnp.inf))


def run_packed(
    inputs: tuple[Shaped[Array, "T ..."], ...],
    states: Float32[Array, "slots N D V"],
    spans: Spans,
    step: Step,
    prepare: Callable[[Any], Prepared],
    advance: Advance,
) -> tuple[Float32[Array, "T H R V"], Float32[Array, "slots N D V"]]:
    """Chunks, one behind the other: those of one token at once, the others block by block.

    step: of one token a sequence, called with inputs, states, spans and which sequences are wanted.
    prepare: of a block of one sequence's inputs; rows of zeros must change nothing.
    advance: `in_turn`, or what does the same.
    """
    single, states = step(*take_rows(inputs, spans), states, spans, spans.counts == 1)
    tokens = len(inputs[0])
    out = put_rows(jnp.zeros((tokens + BLOCK, *single.shape[1:]), single.dtype), single, spans)
    padded = tuple(jnp.pad(x, ((0, BLOCK), *((0, 0),) * (x.ndim - 1))) for x in inputs)

    def several(blocks: Block, carry: Carry) -> Carry:
        return advance(blocks, jax.vmap(lambda at: prepare(_taken(padded, at)))(blocks), carry)

    at_once = min(max(tokens // (2 * BLOCK), 1), AT_ONCE)
    out, states = _for_blocks(spans, len(states) - 1, at_once, several, (out, states))
    return out[:tokens], states


def in_turn(blocks: Block, ready: Prepared, carry: Carry) -> Carry:
    """The carry behind several prepared blocks, one after another."""

    def advance(carry: Carry, each: tuple[Block, Prepared]) -> tuple[Carry, None]:
        (out, states), (at, block) = carry, each
        values, after = block.advance(jnp.where(at.fresh, 0.0, states[at.slot]))
        return (at.put(out, values), states.at[at.slot].set(after)), None

    return lax.scan(advance, carry, (blocks, ready))[0]


def _for_blocks(
    spans: Spans, nobodys: int, at_once: int, several: Callable[[Block, Any], Any], carry: Any
) -> Any:
    """`several` for the blocks of each sequence with more than one token, in order, as many as there are.
    Those that fill up the last call have no tokens, and `nobodys` slot.
    """
    assert spans.starts is not None
    blocks = jnp.where(spans.counts > 1, -(-spans.counts // BLOCK), 0)
    ends, starts, counts = jnp.cumsum(blocks), spans.starts, spans.counts

    def body(i: Array, carry: Any) -> Any:
        number = i * at_once + jnp.arange(at_once)
        exists = number < ends[-1]
        row = jnp.minimum(jnp.searchsorted(ends, number, side="right"), len(ends) - 1)
        done = (number - (ends[row] - blocks[row])) * BLOCK
        at = Block(
            start=jnp.where(exists, starts[row] + done, 0),
            count=jnp.where(exists, jnp.minimum(counts[row] - done, BLOCK), 0),
            slot=jnp.where(exists, spans.slots[row], nobodys),
            fresh=spans.fresh[row] & (done == 0),
        )
        return several(at, carry)

    return lax.fori_loop(0, -(-ends[-1] // at_once), body, carry)


def _taken(padded: tuple[Shaped[Array, "T ..."], ...], at: Block) -> tuple[Shaped[Array, "B ..."], ...]:
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
