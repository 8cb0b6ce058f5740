"""Grouped products in Pallas (Triton backend): one launch over the work list.

A program multiplies one tile's rows with a block of outputs of their group's weight, which is the tensor
cores' left operand as in `skinny_gemm`. Programs of slots without rows leave at once, so that the grid is the
same whatever the tokens choose. Nothing is split along the inner axis: a group's outputs alone make more
blocks than an H200 has cores (one token of Qwen3-30B-A3B: 8 x 24 and 8 x 64).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.grouped_matmul import widened
from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups
from lmdeploy_jax.pallas_kernels.grouped_matmul.tile import FEW_ROWS, Tile, Tuning
from lmdeploy_jax.pallas_kernels.grouped_matmul.widened import WeightRefs
from lmdeploy_jax.pallas_kernels.grouped_matmul.xla import Gating
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.shapes import Quantised


def gated_grouped_matmul(
    x: Float[Array, "T K"],
    weight: Float[Array, "X H N K"] | Quantised,
    bias: Float[Array, "X H N"] | None,
    groups: RowGroups,
    gating: Gating,
    height: int,
    *,
    tuning: Tuning | None = None,
    interpret: bool,
) -> Float[Array, "M N"]:
    """See `lmdeploy_jax.pallas_kernels.grouped_matmul`."""
    weights = _arrays(weight)
    rows, (_, halves, outputs, _) = groups.source.shape[0], weights[0].shape
    tuning = tuning or _tuning(height, groups, x, weight, gated=True)
    how: dict[str, Any] = {"height": height, "tuning": tuning, "interpret": interpret}
    kernel = functools.partial(_gated_kernel, choices=rows // x.shape[0], halves=halves, gating=gating, **how)
    inputs = (x, *weights, bias, _source(groups), groups.tiles)
    out = jax.ShapeDtypeStruct((rows, outputs), x.dtype)
    grid = _launch("gated_grouped_matmul", outputs, groups, tuning)
    return launch(kernel, grid, out, *inputs, interpret=interpret)


def weighted_grouped_matmul(
    rows: Float[Array, "M K"],
    weight: Float[Array, "X N K"] | Quantised,
    bias: Float[Array, "X N"] | None,
    groups: RowGroups,
    scales: Float32[Array, "T k"],
    beside: Float[Array, "T N"] | None,
    height: int,
    out_dtype: DTypeLike,
    *,
    tuning: Tuning | None = None,
    interpret: bool,
) -> Float[Array, "k T N"]:
    """See `lmdeploy_jax.pallas_kernels.grouped_matmul`."""
    weights = _arrays(weight)
    (tokens, choices), outputs = scales.shape, weights[0].shape[1]
    tuning = tuning or _tuning(height, groups, rows, weight, gated=False)
    kernel = functools.partial(_weighted_kernel, height=height, tuning=tuning, interpret=interpret)
    how = _launch("weighted_grouped_matmul", outputs, groups, tuning)
    out = jax.ShapeDtypeStruct((choices, tokens, outputs), out_dtype)
    inputs = (rows, *weights, bias, _source(groups), groups.tiles, scales.reshape(-1), beside)
    return launch(kernel, how, out, *inputs, interpret=interpret)


def _source(groups: RowGroups) -> jax.Array | None:
    """None: rows lie as before, and XLA need not make a kernel that counts them."""
    return None if groups.tiles.ndim == 1 else groups.source


def _arrays(weight: jax.Array | Quantised) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The weight, or its values with their scales and zeros."""
    return weight if isinstance(weight, Quantised) else (weight, None, None)


def _tuning(
    height: int, groups: RowGroups, x: jax.Array, weight: jax.Array | Quantised, *, gated: bool
) -> Tuning:
    """As measured on an H200 for few rows; of many, blocks whose sums fit the registers."""
    if x.dtype.itemsize > 2:
        return Tuning(32, 32, 4, 2)
    if isinstance(weight, Quantised):
        return widened.tuning(height, groups.tiles.shape[0], weight)
    if height <= FEW_ROWS:
        return Tuning(64, 128, 4, 3)
    if height <= 64:
        return Tuning(64, 64, 4, 4)
    return Tuning(64 if gated else 128, 64, 8, 4)


def _launch(name: str, outputs: int, groups: RowGroups, tuning: Tuning) -> Launch:
    """Tiles of one group are neighbours in time: what the first of them reads, the others find in L2."""
    grid = (pl.cdiv(outputs, tuning.block_out), groups.tiles.shape[0])
    return Launch(name, grid, tuning.num_warps, tuning.num_stages)


def _sums(
    tile: Tile,
    x_ref: jax.Ref,
    rows: jax.Array,
    weight: tuple[jax.Ref, jax.Ref | None, jax.Ref | None],
    *halves: tuple[int, ...],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The products of such rows of x with parts of their group's weight, f32 [outputs, rows] each.

    weight: values, and scales and zeros of those of few bits.
    """
    values, scales, zeros = weight
    if scales is None:
        return tile.sums(x_ref, rows, values, *halves)
    return widened.sums(tile, x_ref, rows, WeightRefs(values, scales, zeros), *halves, interpret=interpret)


def _gated_kernel(
    x_ref: jax.Ref,
    values_ref: jax.Ref,
    weight_scales_ref: jax.Ref | None,
    zeros_ref: jax.Ref | None,
    bias_ref: jax.Ref | None,
    source_ref: jax.Ref | None,
    tiles_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    choices: int,
    halves: int,
    gating: Gating,
    height: int,
    tuning: Tuning,
    interpret: bool,
) -> None:
    tile = Tile(tiles_ref, height, values_ref.shape[0], out_ref.shape[1], tuning)
    weight = values_ref, weight_scales_ref, zeros_ref

    @pl.when(tile.count > 0)
    def _multiply() -> None:
        token = lax.div(tile.source(source_ref), choices)
        totals = _sums(tile, x_ref, token, weight, *((half,) for half in range(halves)), interpret=interpret)
        biased = (tile.biased(total, bias_ref, half) for half, total in enumerate(totals))
        rounded = (half.astype(out_ref.dtype).astype(jnp.float32) for half in biased)
        plt.store(out_ref.at[tile.place], gating(*rounded).astype(out_ref.dtype), mask=tile.mask)


def _weighted_kernel(
    rows_ref: jax.Ref,
    values_ref: jax.Ref,
    weight_scales_ref: jax.Ref | None,
    zeros_ref: jax.Ref | None,
    bias_ref: jax.Ref | None,
    source_ref: jax.Ref | None,
    tiles_ref: jax.Ref,
    scales_ref: jax.Ref,
    beside_ref: jax.Ref | None,
    out_ref: jax.Ref,
    *,
    height: int,
    tuning: Tuning,
    interpret: bool,
) -> None:
    choices, tokens, outputs = out_ref.shape
    tile = Tile(tiles_ref, height, values_ref.shape[0], outputs, tuning)
    weight = values_ref, weight_scales_ref, zeros_ref

    @pl.when(tile.count > 0)
    def _multiply() -> None:
        (total,) = _sums(tile, rows_ref, tile.row, weight, (), interpret=interpret)
        source = tile.source(source_ref)
        scale = plt.load(scales_ref.at[source], mask=tile.valid, other=0.0)
        total = tile.biased(total, bias_ref) * scale[None, :]
        # Nothing is masked at another row's place: the interpreter stores what was there before.
        token, choice = jnp.where(tile.valid, lax.div(source, choices), tokens), lax.rem(source, choices)
        if beside_ref is not None:
            first = tile.mask & (choice == 0)[None, :]
            total += plt.load(beside_ref.at[token[None, :], tile.out[:, None]], mask=first, other=0)
        at = out_ref.at[choice[None, :], token[None, :], tile.out[:, None]]
        plt.store(at, total.astype(out_ref.dtype), mask=tile.mask)
