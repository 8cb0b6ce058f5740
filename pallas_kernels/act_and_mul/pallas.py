"""Gate and up in parts, in Pallas (Triton backend): a program has some columns of a row."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.skinny_gemm.pallas import gated

BLOCK = 512  # columns of a program
WARPS = 4


def act_and_mul(
    parts: Float32[Array, "S T 2 N"],
    activation: Callable[[jax.Array], jax.Array],
    out_dtype: DTypeLike,
    *,
    interpret: bool,
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.act_and_mul`."""
    _, rows, _, columns = parts.shape
    how = Launch("act_and_mul", (rows, pl.cdiv(columns, BLOCK)), WARPS, num_stages=1)
    out = jax.ShapeDtypeStruct((rows, columns), out_dtype)
    return launch(functools.partial(_kernel, activation=activation), how, out, parts, interpret=interpret)


def _kernel(parts_ref: jax.Ref, out_ref: jax.Ref, *, activation: Callable[[jax.Array], jax.Array]) -> None:
    row, column = pl.program_id(0), pl.program_id(1) * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    mask = column < out_ref.shape[1]

    def total(half: int) -> jax.Array:
        parts = [
            plt.load(parts_ref.at[part, row, half, column], mask=mask, other=0)
            for part in range(parts_ref.shape[0])
        ]
        return functools.reduce(jnp.add, parts)

    out = gated(total(0), total(1), activation, out_ref.dtype)
    plt.store(out_ref.at[row, column], out, mask=mask)
