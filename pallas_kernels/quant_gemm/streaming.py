"""How products of many rows are cut, and which ones the kernel for them (`mosaic.py`) can do."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD, TILE
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import SHARED_BYTES, StreamTiling

BLOCK_OUT = 128  # outputs of a tile: two warpgroups with 64 each
BLOCK_IN = TILE
MAX_TILE = 128  # tokens, beside which two sums fit registers
MAX_ROWS = 8192
MAX_STAGES = 8


def tile_of(tokens: int) -> int:
    """Tokens of a tile, all tiles alike."""
    return tokens // -(-tokens // MAX_TILE)


def why_not_streamed(tokens: int, weight: Quantised, splits: int = 1) -> str | None:
    """Why a product of so many rows with a weight [N, K] cannot be streamed so, or None if it can."""
    words, (outputs, columns) = weight.values.dtype == jnp.uint16, weight.values.shape
    columns *= PER_WORD if words else 1
    if not words and not _has_tensor_cores(weight):
        return f"weights of {weight.values.dtype} with {weight.scales.shape[0]} groups are XLA's"
    sizes = {"outputs": (outputs, BLOCK_OUT), "columns": (columns, BLOCK_IN * splits)}
    if columns // weight.scales.shape[0] % BLOCK_IN:
        return f"groups of {columns // weight.scales.shape[0]} columns are no blocks of {BLOCK_IN}"
    for name, (size, unit) in sizes.items():
        if size % unit:
            return f"{size} {name} are no whole blocks of {unit}"
    tile = tile_of(tokens)
    if tokens > MAX_ROWS or tile % 8 or tokens % tile:
        return f"{tokens} rows cannot be cut into tiles of up to {MAX_TILE}, of a size that 8 divides"
    if weight.values.dtype == jnp.int8 and tile > 32 and tile % 16:
        return f"{tokens} rows of int8 make tiles of {tile}, which above 32 have to be multiples of 16"
    return None


def _has_tensor_cores(weight: Quantised) -> bool:
    """Whether elements of 8 bits are multiplied as they are; sums of groups are scaled in f32 alone."""
    exact = weight.values.dtype == jnp.int8 and weight.scales.shape[0] == 1
    return weight.zeros is None and (exact or weight.values.dtype == jnp.float8_e4m3fn)


def scales_whole_sums(weight: Quantised) -> bool:
    """Whether the scales of elements of 8 bits are those of all columns."""
    return weight.values.dtype != jnp.uint16 and weight.scales.shape[0] == 1


def vector_space(width: int, dtype: DTypeLike) -> int:
    """Elements from a vector of scales to the next one: TMA writes to multiples of 128 bytes."""
    line = 128 // jnp.dtype(dtype).itemsize
    return -(-width // line) * line


def deepest(
    tokens: int, weight: Quantised, programs: int, splits: int = 1, *, overlaps: bool = False
) -> StreamTiling:
    """With as many stages as shared memory holds, up to MAX_STAGES."""
    tile, words = tile_of(tokens), weight.values.dtype == jnp.uint16
    block = tile * BLOCK_IN * (2 if words else 1) + BLOCK_OUT * BLOCK_IN // (2 if words else 1)
    vectors = 3 * 4 * max(tile, BLOCK_OUT)
    out = (2 if splits == 1 else 4) * tile * BLOCK_OUT  # parts are f32
    stages = min((SHARED_BYTES - out) // (block + vectors), MAX_STAGES)
    return StreamTiling(BLOCK_OUT, programs, stages, splits, overlaps)
