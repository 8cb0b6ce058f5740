"""A router whole, in Pallas (Triton backend): the residual addition, the norm, the product and the choice.

One program a token reads all of the router's weight, a block of experts ahead of the one that it multiplies:
for few tokens that takes less than the launches between those steps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.norm.pallas import add, inverse_rms, weigh
from lmdeploy_jax.pallas_kernels.topk_routing.options import TopK
from lmdeploy_jax.pallas_kernels.topk_routing.pallas import choose

WARPS, BLOCK = 16, 16384  # elements of the router's weight at once


def norm_topk_routing(
    x: Float[Array, "T E"],
    parts: Float[Array, "S T E"],
    norm: Float[Array, "E"],
    router: Float[Array, "X E"],
    bias: Float32[Array, "X"] | None,
    correction: Float32[Array, "X"] | None,
    options: TopK,
    *,
    eps: float,
    offset: float,
    interpret: bool,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"], Int32[Array, "T k"], Float32[Array, "T k"]]:
    """See `lmdeploy_jax.pallas_kernels.topk_routing`."""
    shape = (x.shape[0], options.count)
    out = [
        *[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        *(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32)),
        jax.ShapeDtypeStruct((1, x.shape[0], router.shape[0]), jnp.float32),
    ]
    how = Launch("norm_topk_routing", shape[:1], WARPS, num_stages=1, aliases={0: 0})
    kernel = functools.partial(_kernel, options=options, eps=eps, offset=offset, interpret=interpret)
    arrays = (x, parts, norm, router, bias, correction)
    added, normed, experts, weights, _ = launch(kernel, how, out, *arrays, interpret=interpret)
    return added, normed, experts, weights


def _kernel(
    x_ref: jax.Ref,
    parts_ref: jax.Ref,
    norm_ref: jax.Ref,
    router_ref: jax.Ref,
    bias_ref: jax.Ref | None,
    correction_ref: jax.Ref | None,
    added_ref: jax.Ref,
    normed_ref: jax.Ref,
    experts_ref: jax.Ref,
    weights_ref: jax.Ref,
    logits_ref: jax.Ref,
    *,
    options: TopK,
    eps: float,
    offset: float,
    interpret: bool,
) -> None:
    """Logits go by way of memory, where each block's lie in a layout of their own."""
    token, (count, size) = pl.program_id(0), router_ref.shape
    column = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    ahead = _weights(router_ref, jnp.int32(0), column)
    weight = plt.load(norm_ref.at[column], mask=column < size, other=0)
    wide = add(x_ref, parts_ref, added_ref).astype(jnp.float32)
    normed = weigh(wide * inverse_rms(wide, size, eps), weight, offset, x_ref.dtype)
    plt.store(normed_ref.at[token, column], normed, mask=column < size)
    row, block = normed.astype(jnp.float32)[None, :], ahead.shape[0]

    def step(index: Array, weights: Shaped[Array, "block columns"]) -> Shaped[Array, "block columns"]:
        ahead = _weights(router_ref, index + 1, column)
        expert = index * block + jnp.arange(block, dtype=jnp.int32)
        logits = jnp.sum(weights.astype(jnp.float32) * row, axis=1)
        plt.store(logits_ref.at[0, token, expert], logits, mask=expert < count)
        return ahead

    lax.fori_loop(0, pl.cdiv(count, block), step, ahead)
    if not interpret:
        plt.debug_barrier()
    choose(logits_ref, bias_ref, correction_ref, experts_ref, weights_ref, options=options)


def _weights(
    ref: jax.Ref, index: Int32[Array, ""], column: Int32[Array, "columns"]
) -> Shaped[Array, "block columns"]:
    """Those of a block of experts, zeros beyond the last."""
    count, size = ref.shape
    block = min(max(BLOCK // column.size, 1), pl.next_power_of_2(count))
    expert = index * block + jnp.arange(block, dtype=jnp.int32)
    mask = (expert < count)[:, None] & (column < size)[None, :]
    return plt.load(ref.at[expert[:, None], column[None, :]], mask=mask, other=0)
