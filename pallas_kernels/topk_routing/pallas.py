"""The choice of experts in Pallas (Triton backend): one program a token, one launch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float32, Int32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.topk_routing.options import LEAST_SUM, TopK

Number = Float32[Array, ""]


def topk_routing(
    logits: Float32[Array, "S T X"],
    bias: Float32[Array, "X"] | None,
    correction: Float32[Array, "X"] | None,
    options: TopK,
    *,
    interpret: bool,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """See `lmdeploy_jax.pallas_kernels.topk_routing`."""
    shape = (logits.shape[1], options.count)
    out = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32)]
    how = Launch("topk_routing", shape[:1], num_warps=1, num_stages=1)
    kernel = functools.partial(choose, options=options)
    experts, weights = launch(kernel, how, out, logits, bias, correction, interpret=interpret)
    return experts, weights


def choose(
    logits_ref: jax.Ref,
    bias_ref: jax.Ref | None,
    correction_ref: jax.Ref | None,
    experts_ref: jax.Ref,
    weights_ref: jax.Ref,
    *,
    options: TopK,
) -> None:
    """The kernel: the experts of this program's token."""
    token, (parts, _, count) = pl.program_id(0), logits_ref.shape
    expert = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
    present = expert < count
    logits = jnp.where(present, 0.0, -jnp.inf)
    for part in range(parts):
        logits += plt.load(logits_ref.at[part, token, expert], mask=present, other=0.0)
    if bias_ref is not None:
        logits += plt.load(bias_ref.at[expert], mask=present, other=0.0)
    scores = _scores(logits, options)
    ranked = scores
    if correction_ref is not None:
        ranked += plt.load(correction_ref.at[expert], mask=present, other=0.0)
    if options.groups > 1:
        inside = _in_best_groups(ranked, expert, count // options.groups, options)
        ranked = jnp.where(inside, ranked, -jnp.inf)
    slot = jnp.arange(pl.next_power_of_2(options.count), dtype=jnp.int32)
    experts, weights = jnp.zeros_like(slot), jnp.zeros(slot.shape, jnp.float32)
    for place in range(options.count):
        best = jnp.minimum(_best(ranked, expert, present), count - 1)  # nothing is best of what is no number
        experts = jnp.where(slot == place, best, experts)
        weights = jnp.where(slot == place, jnp.sum(jnp.where(expert == best, scores, 0.0)), weights)
        present &= expert != best
    inside = slot < options.count
    plt.store(experts_ref.at[token, slot], experts, mask=inside)
    plt.store(weights_ref.at[token, slot], _finished(weights, inside, options), mask=inside)


def _scores(logits: Float32[Array, "X"], options: TopK) -> Float32[Array, "X"]:
    """0 for lanes beyond the experts, where that is told from their logits of minus infinity."""
    if options.scores == "sigmoid":
        return jax.nn.sigmoid(logits)
    return logits if options.scores == "chosen" else _softmax(logits)


def _softmax(logits: Float32[Array, "N"]) -> Float32[Array, "N"]:
    raised = jnp.exp(logits - jnp.max(logits))
    return raised / jnp.sum(raised)


def _best(ranked: Float32[Array, "X"], number: Int32[Array, "X"], present: Bool[Array, "X"]) -> Array:
    """The lowest number with the best rank among those present."""
    best = jnp.max(jnp.where(present, ranked, -jnp.inf))
    return jnp.min(jnp.where(present & (ranked == best), number, number.size))


def _in_best_groups(
    ranked: Float32[Array, "X"], expert: Int32[Array, "X"], size: int, options: TopK
) -> Bool[Array, "X"]:
    """Which experts are in a group that counts."""
    group = jnp.arange(pl.next_power_of_2(options.groups), dtype=jnp.int32)
    values = jnp.zeros(group.shape, jnp.float32)
    of = expert // size
    for number in range(options.groups):
        values = jnp.where(group == number, _group_score(ranked, expert, of == number, options), values)
    present, kept = group < options.groups, jnp.zeros(expert.shape, jnp.bool_)
    for _ in range(options.top_groups):
        best = _best(values, group, present)
        kept |= of == best
        present &= group != best
    return kept


def _group_score(
    ranked: Float32[Array, "X"], expert: Int32[Array, "X"], inside: Bool[Array, "X"], options: TopK
) -> Number:
    best = jnp.max(jnp.where(inside, ranked, -jnp.inf))
    if options.group_score == "max":
        return best
    second = inside & (expert != _best(ranked, expert, inside))
    return best + jnp.max(jnp.where(second, ranked, -jnp.inf))


def _finished(weights: Float32[Array, "k"], inside: Bool[Array, "k"], options: TopK) -> Float32[Array, "k"]:
    if options.scores == "chosen":
        weights = _softmax(jnp.where(inside, weights, -jnp.inf))
    if options.normalise:
        weights = weights / (jnp.sum(jnp.where(inside, weights, 0.0)) + LEAST_SUM)
    return weights * options.scale
