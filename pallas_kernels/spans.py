"""Which tokens of a step are whose, for ops over state that is kept for a whole sequence.

Such ops read and write rows of arrays `[slots, ...]`, of which the last belongs to nobody: what has no token
in the step is sent there.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped

from lmdeploy_jax.pallas_kernels.shapes import Tiles

NOWHERE = -1  # a slot's number for those of whom nothing is kept


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spans:
    """A step's sequences: the tokens `starts .. starts + counts` of each, and where its state lies."""

    slots: Int32[Array, "S"]
    counts: Int32[Array, "S"]  # 0: the sequence has no token in this step
    fresh: Bool[Array, "S"]  # these tokens are the sequence's first: whatever its slot holds is another's
    starts: Int32[Array, "S"] | None = None  # None: each sequence has one row, in order (`T == S`)

    def before(self, states: Shaped[Array, "slots *rest"]) -> Shaped[Array, "S *rest"]:
        """The state of each sequence before its tokens; nobody's may hold NaN, so that it is not multiplied
        by anything.
        """
        fresh = (self.fresh | (self.counts == 0)).reshape(-1, *(1,) * (states.ndim - 1))
        return jnp.where(fresh, jnp.zeros((), states.dtype), states[self.slots])

    def put(
        self,
        states: Shaped[Array, "slots *rest"],
        after: Shaped[Array, "S *rest"],
        wanted: Bool[Array, "S"] | None = None,
    ) -> Shaped[Array, "slots *rest"]:
        """With the state of each sequence behind its tokens, or of those that are `wanted`."""
        kept = self.counts > 0 if wanted is None else wanted
        return states.at[jnp.where(kept, self.slots, len(states) - 1)].set(after.astype(states.dtype))

    def rows(self, wanted: Bool[Array, "S"] | None = None) -> Int32[Array, "S"]:
        """The slots of sequences with tokens, or of those that are `wanted`; NOWHERE of the others."""
        return jnp.where(self.counts > 0 if wanted is None else wanted, self.slots, NOWHERE)

    def owners(self, tokens: int) -> Int32[Array, "T"]:
        """The sequence of each token; of tokens that only pad the step, any."""
        if self.starts is None:
            return jnp.arange(tokens, dtype=jnp.int32)
        first = jnp.zeros(tokens + 1, jnp.int32)
        order = jnp.argsort(self.starts)  # sequences without tokens start nowhere, and come last
        marks = first.at[jnp.minimum(self.starts, tokens)].add(1)[:tokens]
        return order[jnp.maximum(jnp.cumsum(marks) - 1, 0)]


def decode_spans(slots: Int32[Array, "S"], kv_lens: Int32[Array, "S"]) -> Spans:
    """Of a step with one token a sequence; `kv_lens` are 0 in rows that pad it."""
    return Spans(slots, (kv_lens > 0).astype(jnp.int32), kv_lens <= 1)


def ragged_spans(slots: Int32[Array, "S"], tiles: Tiles) -> Spans:
    """Of a step of packed chunks, which `tiles` (see `build_tiles`) tell apart."""
    rows, first, count, position = tiles.T
    nowhere = jnp.iinfo(jnp.int32).max
    first, position = (jnp.where(count > 0, each, nowhere) for each in (first, position))
    least = jnp.full(len(slots), nowhere, jnp.int32)
    return Spans(
        slots,
        counts=jnp.zeros(len(slots), jnp.int32).at[rows].add(count),
        fresh=least.at[rows].min(position) == 0,
        starts=least.at[rows].min(first),
    )
