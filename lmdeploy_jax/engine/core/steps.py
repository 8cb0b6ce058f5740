"""The programs of the engine, as pure functions over arrays.

A *backbone* runs the decoder and is compiled per number of tokens; a *head* turns hidden rows into tokens and
is compiled per number of rows. Cut there, the sizes add instead of multiplying. Between them stands `rows`
[max_batch_size, E], the hidden state of each of the step's sequences. `pending` [slots + 1] holds each slot's
last token, so that the next step can start before the host has seen it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.engine.core.batch import Layout, decode_batch, ragged_batch, sampling_batch
from lmdeploy_jax.models.sharded import AnyDecoder
from lmdeploy_jax.sampling.logprobs import TopLogprobs, no_logprobs, top_logprobs
from lmdeploy_jax.sampling.mask import apply_mask
from lmdeploy_jax.sampling.penalties import add_tokens, apply_penalties
from lmdeploy_jax.sampling.sampler import greedy, sample

Leaves = tuple[Array, ...]
Merge = Callable[[Leaves], AnyDecoder]


class History(NamedTuple):
    """What each slot's sequence has said so far, for penalties and biases; see `lmdeploy_jax.sampling`."""

    counts: Array  # i32 [slots + 1, V]
    bias: Array  # f32 [slots + 1, V]


def decode(
    merge: Merge, layout: Layout, max_rows: int, leaves: Leaves, caches: KVCache, pending: Array, flat: Array
) -> tuple[Array, KVCache]:
    """One token for each sequence: -> rows [max_rows, E], caches."""
    field = layout.views(flat)
    hidden, caches = merge(leaves)(caches, decode_batch(field, pending[field["slots"]]))
    return jnp.pad(hidden, ((0, max_rows - hidden.shape[0]), (0, 0))), caches


def decode_any(
    merge: Merge,
    layout: Layout,
    max_rows: int,
    most: int,
    leaves: Leaves,
    caches: KVCache,
    pending: Array,
    flat: Array,
) -> tuple[Array, Array, Array, KVCache]:
    """One program for every decode step: -> rows of the last, tokens i32 [R, most], pending, caches.

    `flat` says how many steps there are, at most `most`, and how they draw: greedily, by sampling, or not at
    all (and then there is one). Both are read on the device: for CPUs, since it would take a GPU out of its
    CUDA graph. Tokens past the last step are 0.
    """
    field = layout.views(flat)
    model, slots = merge(leaves), field["slots"]

    def step(
        i: Array | int, state: tuple[Array, Array, Array, KVCache]
    ) -> tuple[Array, Array, Array, KVCache]:
        _, last, drawn, caches = state
        hidden, caches = model(caches, decode_batch(field, last, i))
        last = jax.lax.switch(
            field["draw"][0],
            (
                lambda: last,
                lambda: greedy(model.logits(hidden)),
                lambda: sample(model.logits(hidden), sampling_batch(field, i)),
            ),
        )
        return hidden, _next_input(last), drawn.at[:, i].set(last), caches

    hidden = jnp.zeros((len(slots), model.config.hidden_size), model.dtype)
    state = (hidden, pending[slots], jnp.zeros((len(slots), most), jnp.int32), caches)
    looped = partial(jax.lax.fori_loop, 0, field["count"][0], step) if most > 1 else partial(step, 0)
    hidden, last, drawn, caches = looped(state)
    rows = jnp.pad(hidden, ((0, max_rows - hidden.shape[0]), (0, 0)))
    return rows, drawn, pending.at[slots].set(last), caches


def decode_drawing(
    merge: Merge,
    layout: Layout,
    count: int,
    sampled: bool,
    leaves: Leaves,
    caches: KVCache,
    pending: Array,
    flat: Array,
) -> tuple[Array, Array, KVCache]:
    """`count` tokens for each sequence, one after another: -> tokens i32 [R, count], pending, caches."""
    field = layout.views(flat)
    model, slots = merge(leaves), field["slots"]

    def step(i: Array | int, state: tuple[Array, Array, KVCache]) -> tuple[Array, Array, KVCache]:
        last, drawn, caches = state
        hidden, caches = model(caches, decode_batch(field, last, i))
        logits = model.logits(hidden)
        last = sample(logits, sampling_batch(field, i)) if sampled else greedy(logits)
        return _next_input(last), drawn.at[:, i].set(last), caches

    state = (pending[slots], jnp.zeros((len(slots), count), jnp.int32), caches)
    last, drawn, caches = jax.lax.fori_loop(0, count, step, state) if count > 1 else step(0, state)
    return drawn, pending.at[slots].set(last), caches


def ragged(
    merge: Merge, layout: Layout, leaves: Leaves, caches: KVCache, pending: Array, flat: Array
) -> tuple[Array, Array, KVCache]:
    """Prompt chunks and single tokens, packed: -> rows [max_rows, E], hidden [T, E], caches."""
    field = layout.views(flat)
    hidden, caches = merge(leaves)(caches, ragged_batch(field, pending))
    return hidden[field["last"]], hidden, caches


def head_greedy(
    merge: Merge, layout: Layout, leaves: Leaves, rows: Array, pending: Array, flat: Array, mask: Array
) -> tuple[Array, Array]:
    """-> tokens i32 [R], pending."""
    field = layout.views(flat)
    tokens = greedy(apply_mask(merge(leaves).logits(rows[field["rows"]]), mask))
    return tokens, pending.at[field["slots"]].set(_next_input(tokens))


def head_sample(
    merge: Merge, layout: Layout, leaves: Leaves, rows: Array, pending: Array, flat: Array, mask: Array
) -> tuple[Array, Array]:
    """-> tokens i32 [R], pending."""
    field = layout.views(flat)
    logits = apply_mask(merge(leaves).logits(rows[field["rows"]]), mask)
    tokens = sample(logits, sampling_batch(field))
    return tokens, pending.at[field["slots"]].set(_next_input(tokens))


def head_logits(merge: Merge, layout: Layout, leaves: Leaves, rows: Array, flat: Array) -> Array:
    """-> logits f32 [R, V], for `head_full`."""
    return merge(leaves).logits(rows[layout.views(flat)["rows"]])


def head_full(
    layout: Layout, raw: Array, logits: Array, pending: Array, history: History, flat: Array, mask: Array
) -> tuple[Array, Array, History]:
    """Penalties, biases, masks, sampling, log-probabilities: -> packed i32 [R, 2 + 2k], pending, history.

    Draws from `logits` [R, V]; the log-probabilities are those of `raw` [R, V], which is the same array
    unless Python has changed the logits in between.
    """
    field = layout.views(flat)
    logits = _reshaped(field, logits, history)
    return _drawn(field, raw, logits, pending, history, mask)


def head_any(
    merge: Merge,
    layout: Layout,
    leaves: Leaves,
    rows: Array,
    changed: Array,
    pending: Array,
    history: History,
    flat: Array,
    mask: Array,
) -> tuple[Array, Array, History]:
    """`head_full` of the rows, which does only what `flat` asks for. One program for every way of drawing.

    `changed` f32 [R, V]: the logits where Python has changed them.
    """
    field = layout.views(flat)
    raw = merge(leaves).logits(rows[field["rows"]])
    logits = jax.lax.cond(field["changed"][0] != 0, lambda: changed, lambda: raw)
    logits = jax.lax.cond(
        field["reshapes"][0] != 0, lambda: _reshaped(field, logits, history), lambda: logits
    )
    return _drawn(field, raw, logits, pending, history, mask)


def _reshaped(field: dict[str, Array], logits: Array, history: History) -> Array:
    slots = field["slots"]
    return apply_penalties(logits, history.counts[slots], sampling_batch(field)) + history.bias[slots]


def _drawn(
    field: dict[str, Array], raw: Array, logits: Array, pending: Array, history: History, mask: Array
) -> tuple[Array, Array, History]:
    slots = field["slots"]
    tokens = sample(apply_mask(logits, mask), sampling_batch(field))
    found = jax.lax.cond(
        (field["logprobs"] != 0).any(), lambda: top_logprobs(raw, tokens), lambda: no_logprobs(raw)
    )
    packed = pack_logprobs(tokens, found)
    history = History(add_tokens(history.counts, slots, tokens), history.bias)
    return packed, pending.at[slots].set(_next_input(tokens)), history


def _next_input(tokens: Array) -> Array:
    """Drawn tokens i32 [R] as the next step reads them: a sequence that got none is in that step already."""
    return jnp.maximum(tokens, 0)


def pack_logprobs(tokens: Array, found: TopLogprobs) -> Array:
    """-> i32 [N, 2 + 2k]: token, its log-probability's bits, k ids, k log-probabilities' bits."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in (found.token_logprob, found.logprobs)]
    return jnp.concatenate([tokens[:, None], bits[0][:, None], found.ids, bits[1]], axis=1)


def take_rows(hidden: Array, index: Array) -> Array:
    """hidden [T, E], index i32 [N] -> [N, E]."""
    return hidden[index]


def row_logits(merge: Merge, leaves: Leaves, rows: Array) -> Array:
    """rows [N, E] -> f32 [N, V]."""
    return merge(leaves).logits(rows)


def row_logprobs(merge: Merge, leaves: Leaves, rows: Array, targets: Array) -> Array:
    """rows [N, E] and the tokens that follow them, i32 [N] -> packed i32 [N, 2 + 2k]."""
    return pack_logprobs(targets, top_logprobs(merge(leaves).logits(rows), targets))


def copy_pages(caches: KVCache, source: Array, target: Array) -> KVCache:
    """Duplicate pages in every layer; unused entries copy the dump page onto itself."""
    return jax.tree.map(lambda pages: pages.at[target].set(pages[source]), caches)


def clear_pages(caches: KVCache, pages: Array) -> KVCache:
    """Fill these pages of every layer with zeros."""
    return jax.tree.map(lambda array: array.at[pages].set(0), caches)


def set_history(history: History, slot: Array, counts: Array, bias: Array) -> History:
    """Start a slot's history: counts i32 [V], bias f32 [V]."""
    return History(history.counts.at[slot].set(counts), history.bias.at[slot].set(bias))


def set_bias(history: History, slot: Array, bias: Array) -> History:
    """Replace a slot's biases."""
    return History(history.counts, history.bias.at[slot].set(bias))
