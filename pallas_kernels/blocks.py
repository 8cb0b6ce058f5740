"""Pieces that the Pallas attention kernels share: loads of a page, and one step of the online softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.options import MASKED, AttentionOptions
from lmdeploy_jax.pallas_kernels.shapes import Output, Row, Softmax

Index = Int32[Array, ""]
AddValues = Callable[[Float32[Array, "N P"], Output], Output]
"""Weights of keys, and the output without their values -> the output with them."""
LONG_HEAD = 256  # elements up to which whole pages of keys and values fit into a program's memory
PART_BYTES = 32 << 10  # of keys, and of values, that it has at once of longer ones
LOG2E = math.log2(math.e)  # logits are kept in base 2: the hardware's exponential is exp2


def page_parts(ref: jax.Ref) -> tuple[range, ...]:
    """Tokens of a page [pages, KH, S, D] that a program has at once: all, or, of long heads, some."""
    page_size, head_dim = ref.shape[2:]
    if head_dim <= LONG_HEAD:
        return (range(page_size),)
    count = min(PART_BYTES // (pl.next_power_of_2(head_dim) * ref.dtype.itemsize), page_size)
    return tuple(range(first, first + count) for first in range(0, page_size, count))


def tokens_of(part: range) -> Int32[Array, "P"]:
    """Their numbers within the page."""
    token = jnp.arange(len(part), dtype=jnp.int32)
    return token + part.start if part.start else token


def load_page(
    ref: jax.Ref, page: Index, head: Index, part: range, valid: Index | None = None
) -> Float[Array, "P D"]:
    """Tokens of one head's page of a cache [pages, KH, S, D] -> [P, D padded to a power of two].

    Padding columns, and rows from `valid` on, come out as zeros: what an unused slot holds never counts.
    """
    page_size, head_dim = ref.shape[2:]
    padded = pl.next_power_of_2(head_dim)  # Triton's blocks have no other sizes
    if valid is None and padded == head_dim and len(part) == page_size:
        return ref[page, head]
    row = tokens_of(part)[:, None]
    column = jnp.arange(padded, dtype=jnp.int32)[None, :]
    mask = jnp.broadcast_to(column < head_dim, (len(part), padded))
    if valid is not None:
        mask &= row < valid
    return plt.load(ref.at[page, head, row, column], mask=mask, other=0)


def initial_state(rows: int, head_dim: int) -> Softmax:
    """The state of a softmax over no keys."""
    return (
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, head_dim), jnp.float32),
    )


def attend_page(
    state: Softmax,
    q: Float[Array, "N D"],
    keys: Float[Array, "P D"],
    values: Float[Array, "P D"],
    visible: Bool[Array, "#N P"] | None,
    options: AttentionOptions,
) -> Softmax:
    """Adds a page of keys and values to the softmax of q; `visible`: which keys a row sees, None: all.

    A row must see a key sooner or later: the weights it gathers until then decay to 0 at the first one.
    """
    return attend_logits(state, dot(q, keys.T), values, visible, options)


def attend_logits(
    state: Softmax,
    logits: Float[Array, "N P"],
    values: Float[Array, "P D"] | AddValues,
    visible: Bool[Array, "#N P"] | None,
    options: AttentionOptions,
    key_scales: Float32[Array, "P"] | None = None,
) -> Softmax:
    """The same, of products of queries and keys, which `key_scales` multiply; `values` may say how it adds
    what is gathered of them.
    """
    maximum, denominator, out = state
    factor = options.scale * LOG2E if options.soft_cap is None else options.scale / options.soft_cap
    logits = logits * (factor if key_scales is None else (key_scales * factor)[None, :])
    if options.soft_cap is not None:
        logits = jnp.tanh(logits) * (options.soft_cap * LOG2E)
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=1))
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(logits - new_maximum[:, None])
    decayed = scale_output(out, decay[:, None])
    if callable(values):
        new_out = values(weights, decayed)
    else:
        new_out = decayed + dot(weights.astype(values.dtype), values)
    return new_maximum, denominator * decay + jnp.sum(weights, axis=1), new_out


def add_sink(state: Softmax, sink: Row) -> Softmax:
    """Adds a key with logit `sink` and a value of zero."""
    maximum, denominator, out = state
    sink = sink * LOG2E
    new_maximum = jnp.maximum(maximum, sink)
    decay = jnp.exp2(maximum - new_maximum)
    return new_maximum, denominator * decay + jnp.exp2(sink - new_maximum), scale_output(out, decay[:, None])


def normalised(state: Softmax) -> Output:
    """The softmax's output; zeros for a row that saw nothing."""
    _, denominator, out = state
    divisor = jnp.maximum(denominator, 1e-30)[:, None]
    return jax.tree.map(lambda block: block / divisor, out)


def scale_output(out: Output, factor: Float32[Array, "#N 1"] | Float32[Array, ""]) -> Output:
    """Every block of it."""
    return jax.tree.map(lambda block: block * factor, out)


def dot(a: Shaped[Array, "M K"], b: Shaped[Array, "K N"]) -> Shaped[Array, "M N"]:
    """a @ b, accumulated in f32, int8 in int32; float32 inputs are not rounded to TF32."""
    return plt.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)
