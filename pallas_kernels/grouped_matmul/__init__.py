"""Products of rows with the weight of the group that each belongs to, as a mixture's experts need them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from lmdeploy_jax.pallas_kernels.grouped_matmul import groups as xla_groups
from lmdeploy_jax.pallas_kernels.grouped_matmul import xla
from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups, tile_rows
from lmdeploy_jax.pallas_kernels.grouped_matmul.xla import Gating, WeightOf
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD, tile_of
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.shapes import Quantised

__all__ = [
    "Gating",
    "RowGroups",
    "WeightOf",
    "fused_experts",
    "gated_grouped_matmul",
    "group_rows",
    "grouped_matmul",
    "grouped_matmul_of",
    "tile_rows",
    "weighted_grouped_matmul",
    "why_not_fused",
    "why_not_widened",
]

STREAMED_ROWS = 64  # of a group on average, from which on tiles of a Mosaic kernel are worth filling
LINE = 64  # elements of a swizzled line of shared memory, of which a block has two
LEAST_COLUMNS = 16  # of a tensor-core product
CHUNKED_ROWS = 32768  # from which on chunks are sorted by programs of their own


def group_rows(
    groups: Int32[Array, "M"], count: int, *, different: bool = False, backend: str = "xla"
) -> RowGroups:
    """The rows of `groups`, numbers from 0 to `count` - 1, laid together for products of that backend.

    Rows of number `count` are in no group: no tile has them, and products give anything in their places.
    different: whether no group has two rows, as those of one token: nothing is sorted for kernels then.
    """
    check_backend(backend)
    height = tile_rows(groups.shape[0], count, backend)
    if backend == "xla":
        return xla_groups.group_rows(groups, count, height)
    if different:
        row = jnp.arange(groups.shape[0], dtype=jnp.int32)
        return RowGroups(row, row, groups, groups)
    from lmdeploy_jax.pallas_kernels.grouped_matmul import chunks, sorting  # CPUs never need it

    if groups.shape[0] >= CHUNKED_ROWS:
        return chunks.group_rows(groups, count, height, interpret=backend == "pallas_interpret").groups
    return sorting.group_rows(groups, count, height, interpret=backend == "pallas_interpret")


def gated_grouped_matmul(
    x: Float[Array, "T K"],
    weight: Float[Array, "X H N K"] | Quantised,
    groups: RowGroups,
    *,
    gating: Gating,
    bias: Float[Array, "X H N"] | None = None,
    backend: str,
) -> Float[Array, "M N"]:
    """`gating(gate, up)` of each sorted row: its products with the halves of its group's weight. With H = 1
    there is one product, and `gating` takes that.

    A weight of few bits is multiplied with x as x is; see `why_not_widened`.

    M is a multiple of T, and row m of those that were grouped is x's row `m // (M // T)`: a token's choices
    lie together. Rounded to x's dtype before and behind `gating`. Raises ValueError for shapes that do not
    fit.
    """
    check_backend(backend)
    rows, shape = groups.source.shape[0], _shape(weight)
    fits = len(shape) == 4 and shape[1] in (1, 2) and shape[3] == x.shape[1]
    if not fits or rows % x.shape[0]:
        raise ValueError(
            f"x {x.shape}, weights {shape} and {rows} grouped rows do not fit: they must be [T, K], "
            "[X, 1 or 2, N, K], and a multiple of T"
        )
    _check_format(weight)
    if backend == "xla":
        return xla.gated_grouped_matmul(x, weight, bias, groups, gating, _height(groups, weight, backend))
    from lmdeploy_jax.pallas_kernels.grouped_matmul import pallas  # CPUs never need it

    height, interpret = _height(groups, weight, backend), backend == "pallas_interpret"
    return pallas.gated_grouped_matmul(x, weight, bias, groups, gating, height, interpret=interpret)


def weighted_grouped_matmul(
    rows: Float[Array, "M K"],
    weight: Float[Array, "X N K"] | Quantised,
    groups: RowGroups,
    scales: Float32[Array, "T k"],
    *,
    bias: Float[Array, "X N"] | None = None,
    beside: Float[Array, "T N"] | None = None,
    out_dtype: DTypeLike,
    backend: str,
) -> Float[Array, "k T N"]:
    """The products of sorted rows, each times its scale, where its token has them: parts that sum to a
    mixture's output, with what `beside` has for each token in the first.

    rows are in the order of `groups.source`; row m of those that were grouped is choice `m % k` of token
    `m // k`, M = T k. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    _check(rows, _shape(weight), groups)
    _check_format(weight)
    if scales.size != rows.shape[0]:
        raise ValueError(f"{rows.shape[0]} rows need a scale each; scales are {scales.shape}")
    height = _height(groups, weight, backend)
    if backend == "xla":
        return xla.weighted_grouped_matmul(rows, weight, bias, groups, scales, beside, height, out_dtype)
    from lmdeploy_jax.pallas_kernels.grouped_matmul import pallas  # CPUs never need it

    arrays = (rows, weight, bias, groups, scales, beside, height, out_dtype)
    return pallas.weighted_grouped_matmul(*arrays, interpret=backend == "pallas_interpret")


def why_not_fused(
    tokens: int, choices: int, gate_up: tuple[int, ...], dtype: DTypeLike, *, biased: bool
) -> str | None:
    """Why `fused_experts` cannot or should not do weights of that shape [X, H, I, E], or None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies 16-bit numbers, not {jnp.dtype(dtype)}"
    if biased:
        return "it knows no biases"
    if any(size % LINE or size < 2 * LINE for size in gate_up[2:]):
        return f"sizes {gate_up[2:]} are no multiples of {LINE}, or less than two of these"
    if tokens * choices < STREAMED_ROWS * gate_up[0]:
        return f"{tokens * choices} rows of {gate_up[0]} experts leave tiles mostly empty"
    return None


def fused_experts(
    x: Float[Array, "T E"],
    gate_up: Float[Array, "X H I E"],
    down: Float[Array, "X E I"],
    experts: Int32[Array, "T k"],
    scales: Float32[Array, "T k"],
    *,
    gating: Gating,
) -> Float[Array, "T E"]:
    """A whole mixture of many tokens on Hopper: `down(gating(gate, up))` of each token's experts, times its
    scales, added up.

    As `gated_grouped_matmul` and `weighted_grouped_matmul` would have it, but for outputs of `down` rounded
    to x's dtype before they are scaled. Raises ValueError for what `why_not_fused` names.
    """
    reason = why_not_fused(x.shape[0], experts.shape[1], gate_up.shape, x.dtype, biased=False)
    if reason:
        raise ValueError(f"a fused mixture cannot be done: {reason}; take backend 'pallas'")
    from lmdeploy_jax.pallas_kernels.grouped_matmul import aligned, chunks, mosaic  # CPUs never need it

    count = gate_up.shape[0]
    groups, place = chunks.group_rows(experts.reshape(-1), count, mosaic.TILE, interpret=False)
    rows = aligned.spread(x, place, groups.tiles.shape[0] * mosaic.TILE, interpret=False)
    inner = mosaic.grouped_matmul(rows, gate_up, groups.tiles, gating)
    out = mosaic.grouped_matmul(inner, down[:, None], groups.tiles, None)
    return aligned.combine(out, place, scales, interpret=False)


def grouped_matmul(
    rows: Float[Array, "M K"], weight: Float[Array, "X N K"], groups: RowGroups, *, out_dtype: DTypeLike
) -> Float[Array, "M N"]:
    """The product of each sorted row with its group's weight: `rows[i] @ weight[group of i].T`, through XLA.

    rows are in the order of `groups.source`. Only weights of groups that have rows are read. Raises
    ValueError for shapes that do not fit.
    """
    _check(rows, weight.shape, groups)
    weight_of = partial(lax.dynamic_index_in_dim, weight, keepdims=False)
    shape = (weight.shape[0], weight.shape[1])
    return grouped_matmul_of(rows, weight_of, groups, shape=shape, out_dtype=out_dtype)


def grouped_matmul_of(
    rows: Float[Array, "M K"],
    weight_of: WeightOf,
    groups: RowGroups,
    *,
    shape: tuple[int, int],
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """The same with weights that `weight_of` makes as they are needed, one a group, of `shape` (X, N)."""
    height = tile_rows(rows.shape[0], shape[0], "xla")
    return xla.grouped_matmul(rows, weight_of, groups.tiles, out=shape[1], height=height, out_dtype=out_dtype)


def why_not_widened(weight: Quantised) -> str | None:
    """Why the kernels cannot multiply with weights [X, *out, K] of few bits, or None if they can."""
    columns, groups, words = _shape(weight)[-1], weight.scales.shape[0], weight.values.dtype == jnp.uint16
    if columns % groups:
        return f"{columns} columns are not {groups} groups of one size"
    width, tile = columns // groups, tile_of(columns)
    if not words and weight.zeros is not None:
        return "weights of 8 bits have no zero points here"
    if not words and groups > 1 and width % LEAST_COLUMNS:
        return f"groups of {width} columns are no multiples of {LEAST_COLUMNS}"
    quarter = tile // PER_WORD
    if words and (
        quarter % LEAST_COLUMNS or width % quarter or (groups > 1 and width % tile and tile % width)
    ):
        return f"words of {tile} columns, in groups of {width}, are not cut into products of {LEAST_COLUMNS}"
    return None


def _shape(weight: jax.Array | Quantised) -> tuple[int, ...]:
    """[X, *out, K]."""
    if not isinstance(weight, Quantised):
        return weight.shape
    *out, columns = weight.values.shape
    return (*out, columns * (PER_WORD if weight.values.dtype == jnp.uint16 else 1))


def _height(groups: RowGroups, weight: jax.Array | Quantised, backend: str) -> int:
    return tile_rows(groups.source.shape[0], _shape(weight)[0], backend)


def _check(rows: jax.Array, weight: tuple[int, ...], groups: RowGroups) -> None:
    if rows.shape[1] != weight[2] or rows.shape[0] != groups.source.shape[0]:
        raise ValueError(
            f"rows {rows.shape} fit neither the weights {weight}, [X, N, K], nor the "
            f"{groups.source.shape[0]} rows that were grouped"
        )


def _check_format(weight: jax.Array | Quantised) -> None:
    reason = why_not_widened(weight) if isinstance(weight, Quantised) else None
    if reason:
        raise ValueError(f"{reason}; give such weights to `grouped_matmul_of`")
