"""LayerNorm (Ba et al., 2016) in Pallas (Triton backend): a program some rows, each read once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.launch import Launch, launch


def layer_norm(
    x: Float[Array, "T E"],
    weight: Float[Array, "E"],
    bias: Float[Array, "E"],
    *,
    eps: float,
    rows: int = 4,
    num_warps: int = 4,
    interpret: bool = False,
) -> Float[Array, "T E"]:
    """In f32, rounded once, to x's dtype."""
    how = Launch("layer_norm", (pl.cdiv(x.shape[0], rows),), num_warps, 2)
    kernel = functools.partial(_kernel, eps=eps, rows=rows)
    return launch(kernel, how, jax.ShapeDtypeStruct(x.shape, x.dtype), x, weight, bias, interpret=interpret)


def _kernel(
    x_ref: jax.Ref, weight_ref: jax.Ref, bias_ref: jax.Ref, o_ref: jax.Ref, *, eps: float, rows: int
) -> None:
    width = x_ref.shape[1]
    row = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)[:, None]
    column = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    there, mask = column < width, (row < x_ref.shape[0]) & (column < width)[None, :]
    at = row, column[None, :]
    x = plt.load(x_ref.at[at], mask=mask, other=0).astype(jnp.float32)
    mean = jnp.sum(x, axis=1, keepdims=True) / width
    centred = jnp.where(there[None, :], x - mean, 0.0)
    scale = lax.rsqrt(jnp.sum(centred * centred, axis=1, keepdims=True) / width + eps)
    weight = plt.load(weight_ref.at[column], mask=there, other=0).astype(jnp.float32)
    bias = plt.load(bias_ref.at[column], mask=there, other=0).astype(jnp.float32)
    out = centred * scale * weight[None, :] + bias[None, :]
    plt.store(o_ref.at[at], out.astype(o_ref.dtype), mask=mask)
