"""Attention over paged K and V as plain XLA operations: the path of any device, the oracle of the kernels.

Pages are streamed one at a time through an online softmax (Milakov and Gimelshein, 2018). The number of
steps is read from the positions at run time: the cost follows the real context, and one program serves every
length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from lmdeploy_jax.pallas_kernels.options import MASKED, AttentionOptions
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages, dequantised
from lmdeploy_jax.pallas_kernels.shapes import Pages

HIGHEST = lax.Precision.HIGHEST
FEW_ROWS = range(2, 17)  # query rows for which keys are turned into columns first

State = tuple[jax.Array, jax.Array, jax.Array]  # running maximum, denominator [B, K, N], output [B, K, N, D]


def attend_paged(
    q: Float[Array, "B KH N D"],
    k_pages: Pages,
    v_pages: Pages,
    tables: Int32[Array, "B M"],
    positions: Int32[Array, "B N"],
    sinks: Float32[Array, "KH N"] | None,
    options: AttentionOptions,
    *,
    group: int,
    lookahead: Int32[Array, "B N"] | None = None,
) -> Float32[Array, "B KH N D"]:
    """Attention of B independent blocks of N query rows for each KV head.

    `tables` has each block's pages; a row at position -1 sees nothing and comes out as zeros. `lookahead`:
    how many positions beyond its own each row sees, 0 for those.
    Blocks run `group` at a time, each group for as many steps as its longest block needs; groups after the
    last live block cost nothing.
    """
    blocks = q.shape[0]
    if blocks <= group:
        return _attend_group(q, k_pages, v_pages, tables, positions, lookahead, sinks, options)
    padding = -blocks % group
    lookahead = None if lookahead is None else _pad_rows(lookahead, padding, 0)
    q, tables = _pad_rows(q, padding, 0), _pad_rows(tables, padding, 0)
    positions = _pad_rows(positions, padding, -1)
    live = jnp.max(positions, axis=1) >= 0
    last = jnp.max(jnp.where(live, jnp.arange(blocks + padding, dtype=jnp.int32), -1))

    def step(index: jax.Array, out: jax.Array) -> jax.Array:
        start = index * group
        q_, tables_, positions_ = (lax.dynamic_slice_in_dim(x, start, group) for x in (q, tables, positions))
        ahead = None if lookahead is None else lax.dynamic_slice_in_dim(lookahead, start, group)
        part = _attend_group(q_, k_pages, v_pages, tables_, positions_, ahead, sinks, options)
        return lax.dynamic_update_slice_in_dim(out, part, start, 0)

    return lax.fori_loop(0, last // group + 1, step, jnp.zeros(q.shape, jnp.float32))[:blocks]


def _pad_rows(x: jax.Array, count: int, value: int) -> jax.Array:
    return jnp.pad(x, [(0, count)] + [(0, 0)] * (x.ndim - 1), constant_values=value)


def _attend_group(
    q: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    tables: jax.Array,
    positions: jax.Array,
    lookahead: jax.Array | None,
    sinks: jax.Array | None,
    options: AttentionOptions,
) -> jax.Array:
    page_size = k_pages.shape[2]
    newest = jnp.max(positions if lookahead is None else positions + lookahead, axis=1)
    first, steps = _page_range(positions, newest, page_size, options)
    q = q.astype(jnp.float32) * options.scale

    def step(index: jax.Array, state: State) -> State:
        column = first + index
        pages = jnp.take_along_axis(tables, column[:, None], axis=1, mode="clip")[:, 0]
        key_positions = column[:, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)  # [B, P]
        keys, values = _read_pages(k_pages, pages), _read_pages(v_pages, pages)
        # Whatever unused slots hold, NaN too, must not count: a weight of zero alone would keep a NaN.
        values = jnp.where((key_positions <= newest[:, None])[:, None, :, None], values, 0.0)
        visible = _visible(positions, lookahead, key_positions, options)
        return _online_softmax(state, q, keys, values, visible, options.soft_cap)

    _, denominator, out = lax.fori_loop(0, steps, step, _initial_state(q, sinks))
    return out / jnp.maximum(denominator, 1e-30)[..., None]


def _page_range(
    positions: jax.Array, newest: jax.Array, page_size: int, options: AttentionOptions
) -> tuple[jax.Array, jax.Array]:
    """First page [B] that any row of a block sees, and the number of pages that covers every block, up to its
    `newest` key [B].
    """
    first = jnp.zeros_like(newest)
    if options.window is not None or options.chunk is not None:
        oldest = jnp.min(jnp.where(positions < 0, newest[:, None], positions), axis=1)
        first = jnp.maximum(_oldest_key(oldest, options), 0) // page_size
    return first, jnp.max(newest // page_size - first + 1)


def _read_pages(pages: Pages, indices: jax.Array) -> jax.Array:
    """[pages, KH, P, D] at int32 [B] -> f32 [B, KH, P, D]."""
    if isinstance(pages, QuantPages):
        read = jax.tree.map(lambda array: array.at[indices].get(mode="promise_in_bounds"), pages)
        return dequantised(read)
    if pages.dtype == jnp.float32:
        return pages.at[indices].get(mode="promise_in_bounds")
    # As bits: XLA for CPUs would widen the whole cache to f32 in order to gather 16-bit floats from it. The
    # barrier keeps the view of the bits inside the loop, where it costs nothing.
    words, indices = lax.optimization_barrier((pages, indices))
    bits = lax.bitcast_convert_type(words, jnp.uint16).at[indices].get(mode="promise_in_bounds")
    return lax.bitcast_convert_type(bits, pages.dtype).astype(jnp.float32)


def _visible(
    positions: jax.Array, lookahead: jax.Array | None, key_positions: jax.Array, options: AttentionOptions
) -> jax.Array:
    """Which keys [B, P] the rows [B, N] see -> bool [B, 1, N, P]."""
    age = positions[:, :, None] - key_positions[:, None, :]
    visible = age >= 0 if lookahead is None else age + lookahead[:, :, None] >= 0
    if options.window is not None:
        visible &= age < options.window
    if options.chunk is not None:
        visible &= key_positions[:, None, :] >= _oldest_key(positions, options)[:, :, None]
    return visible[:, None]


def _oldest_key(positions: jax.Array, options: AttentionOptions) -> jax.Array:
    """The first position that queries at `positions` see; it may be below 0."""
    if options.chunk is not None:
        return positions // options.chunk * options.chunk
    return positions if options.window is None else positions - options.window + 1


def _initial_state(q: jax.Array, sinks: jax.Array | None) -> State:
    """A sink is a key with that logit and a value of zero: the softmax starts from it."""
    rows = q.shape[:-1]
    out = jnp.zeros(q.shape, jnp.float32)
    if sinks is None:
        return jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), out
    return jnp.broadcast_to(sinks.astype(jnp.float32), rows), jnp.ones(rows, jnp.float32), out


def _products(q: jax.Array, keys: jax.Array) -> jax.Array:
    """q [B, K, N, D], keys [B, K, P, D] -> [B, K, N, P].

    For few rows XLA's CPU products want columns, four times as fast as rows. The barrier keeps it from
    folding the transposition, which is part of the gather's loop, back into the product.
    """
    if q.shape[2] not in FEW_ROWS:
        return jnp.einsum("bknd,bkpd->bknp", q, keys, precision=HIGHEST)
    columns = lax.optimization_barrier(keys.swapaxes(2, 3))
    return jnp.einsum("bknd,bkdp->bknp", q, columns, precision=HIGHEST)


def _online_softmax(
    state: State, q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, soft_cap: float | None
) -> State:
    maximum, denominator, out = state
    logits = _products(q, keys)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(visible, logits, MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=-1))
    weights = jnp.where(visible, jnp.exp(logits - new_maximum[..., None]), 0.0)
    decay = jnp.exp(maximum - new_maximum)
    new_out = out * decay[..., None] + jnp.einsum("bknp,bkpd->bknd", weights, values, precision=HIGHEST)
    return new_maximum, denominator * decay + jnp.sum(weights, axis=-1), new_out
