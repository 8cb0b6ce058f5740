"""Quantised skinny products in Pallas (Triton backend): tiles of the weight stream by."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.launch import launch
from lmdeploy_jax.pallas_kernels.quant_gemm.blocks import EightBits, FourBits, Refs
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from lmdeploy_jax.pallas_kernels.skinny_gemm.pallas import WeightTile, gated, launch_of
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import Tiling

Activation = Callable[[jax.Array], jax.Array]


def quant_gemm(
    x: Float[Array, "T K"] | Quantised,
    weight: Quantised,
    tiling: Tiling,
    out_dtype: DTypeLike,
    activation: Activation | None = None,
    *,
    interpret: bool,
) -> Float[Array, "{tiling.splits} T N"]:
    """See `lmdeploy_jax.pallas_kernels.quant_gemm`; weight [halves, N, K], gated by an `activation`."""
    rows, row_scales = (x.values, x.scales) if isinstance(x, Quantised) else (x, None)
    outputs = weight.values.shape[1]
    name = "quant_gemm" if activation is None else "gated_quant_gemm"
    out = jax.ShapeDtypeStruct((tiling.splits, rows.shape[0], outputs), out_dtype)
    kernel = functools.partial(_kernel, tiling=tiling, activation=activation, interpret=interpret)
    inputs = (rows, row_scales, weight.values, weight.scales, weight.zeros)
    return launch(kernel, launch_of(name, outputs, tiling), out, *inputs, interpret=interpret)


def _kernel(
    x_ref: jax.Ref,
    x_scales_ref: jax.Ref | None,
    values_ref: jax.Ref,
    scales_ref: jax.Ref,
    zeros_ref: jax.Ref | None,
    out_ref: jax.Ref,
    *,
    tiling: Tiling,
    activation: Activation | None,
    interpret: bool,
) -> None:
    split, tile = pl.program_id(1), WeightTile(x_ref.shape[0], out_ref.shape[2], tiling)
    refs = Refs(x_ref, x_scales_ref, values_ref, scales_ref, zeros_ref)
    words = values_ref.dtype == jnp.uint16
    blocks = FourBits(tile, refs, interpret) if words else EightBits(tile, refs, tiling, interpret)
    steps = x_ref.shape[1] // tiling.splits // tiling.block_in

    def step(index: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        return blocks.add(totals, split * steps + index)

    totals = blocks.scaled(lax.fori_loop(0, steps, step, blocks.zeros()))
    out = totals[0] if activation is None else gated(totals[0], totals[1], activation, out_ref.dtype)
    plt.store(out_ref.at[split, *tile.place], out.astype(out_ref.dtype), mask=tile.mask)
