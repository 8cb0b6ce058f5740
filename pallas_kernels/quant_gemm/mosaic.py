"""Quantised products of many rows in Mosaic GPU (Hopper): weights are the tensor cores' left operand.

There are as many programs as cores; program p has every tile of outputs, tokens and, in parts, columns whose
number is p modulo their count. One warpgroup copies blocks of 128 columns ahead of two that multiply, each
with half of the tile's outputs. Where groups have scales, a block's product is made from nothing, exactly,
and added in f32 times its scales; with a scale a row, tensor cores add a few blocks up, and the sum is
scaled. 4-bit integers, less their zeros, are bfloat16 in registers. `sums.py` has what multiplies.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.quant_gemm.nibbles import OFFSET
from lmdeploy_jax.pallas_kernels.quant_gemm.streaming import (
    BLOCK_IN,
    BLOCK_OUT,
    scales_whole_sums,
    tile_of,
    vector_space,
)
from lmdeploy_jax.pallas_kernels.quant_gemm.sums import (
    BY_OUTPUT,
    BY_TOKEN,
    COMPUTE,
    ROWS,
    InTurn,
    Scaled,
    Shared,
    Stages,
    Unpacked,
    Whole,
)
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import StreamTiling

RUN = 4  # blocks of whole columns that tensor cores add up: they keep 14 bits of a sum of E4M3


def quant_gemm(
    x: Float[Array, "T K"] | Quantised,
    weight: Quantised,
    tiling: StreamTiling,
    out_dtype: DTypeLike,
    *,
    interpret: bool,
) -> Float[Array, "{tiling.splits} T N"]:
    """x [T, K] @ weight [N, K]^T; see `lmdeploy_jax.pallas_kernels.quant_gemm`."""
    rows = x.values if isinstance(x, Quantised) else x
    tokens, outputs = rows.shape[0], weight.values.shape[0]
    tile, stages = tile_of(tokens), tiling.num_stages
    words, whole = weight.values.dtype == jnp.uint16, scales_whole_sums(weight)
    vectors = _vectors(x, weight, tiling.overlaps)
    widths = [BLOCK_OUT, BLOCK_OUT if words else tile]
    body = functools.partial(
        _kernel,
        work=_Work(tokens, outputs, tile, tiling.programs, tiling.splits),
        sums=_sums(weight, tiling.overlaps),
        interpret=interpret,
    )
    body.__name__ = "quant_gemm"  # type: ignore[attr-defined]  # what profiles call it
    columns = BLOCK_IN // PER_WORD if words else BLOCK_IN
    spaces = [] if whole else list(zip(widths, vectors, strict=False))
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tiling.splits, tokens, outputs), out_dtype),
        grid=(tiling.programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="group",
        scratch_types=[
            _ring(stages, tile, BLOCK_IN, rows.dtype),
            _ring(stages, BLOCK_OUT, columns, weight.values.dtype),
            [plgpu.SMEM((stages, vector_space(w, v.dtype)), v.dtype) for w, v in spaces],
            _staged(tile, out_dtype),
            plgpu.Barrier(num_arrivals=2 + len(spaces), num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,  # type: ignore[attr-defined]  # JAX 0.11
    )
    return kernel(rows, weight.values, vectors)


def _sums(weight: Quantised, overlaps: bool) -> tuple[type[InTurn], int]:
    """How a tile's sums are made, and of how many blocks at once."""
    if scales_whole_sums(weight):
        return Whole, RUN
    if not overlaps:
        return InTurn, 1
    return (Unpacked if weight.values.dtype == jnp.uint16 else Scaled), 2


def _vectors(x: Float[Array, "T K"] | Quantised, weight: Quantised, overlaps: bool) -> list[jax.Array]:
    """What stands beside a block: scales of outputs, and of tokens; or zeros."""
    if isinstance(x, Quantised):
        return [weight.scales, x.scales]
    if weight.zeros is None:
        return [weight.scales]
    zeros = weight.zeros if overlaps else (weight.zeros + jnp.uint8(OFFSET)).astype(jnp.bfloat16)
    return [weight.scales, zeros]


def _ring(stages: int, rows: int, columns: int, dtype: DTypeLike) -> Any:
    """Blocks in the layout that tensor cores and TMA share, for lines of up to 128 bytes."""
    size = jnp.dtype(dtype).itemsize
    line = min(columns * size, 128)
    layout = (plgpu.TilingTransform((8, line // size)), plgpu.SwizzleTransform(line))
    return plgpu.SMEM((stages, rows, columns), dtype, transforms=layout)


def _staged(tile: int, dtype: DTypeLike) -> Any:
    """What leaves, of lines of 128 bytes: those of f32 are two."""
    if jnp.dtype(dtype).itemsize == 4:
        return _ring(COMPUTE, tile, ROWS, dtype)
    return plgpu.SMEM((COMPUTE, tile, ROWS), dtype, transforms=(plgpu.SwizzleTransform(128),))


@dataclass(frozen=True)
class _Work:
    """The tiles of all programs: tokens first, so that programs side by side read the same weights.

    splits: of the columns.
    """

    tokens: int
    outputs: int
    tile: int
    programs: int
    splits: int

    @property
    def across(self) -> int:
        return self.tokens // self.tile

    @property
    def tiles(self) -> int:
        return self.across * self.splits * (self.outputs // BLOCK_OUT)

    def place(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The first output and token of this program's tile number `index`, and its part."""
        tile = lax.axis_index("program") + index * self.programs
        rest = lax.div(tile, self.across)
        output, split = lax.div(rest, self.splits), lax.rem(rest, self.splits)
        return output * BLOCK_OUT, lax.rem(tile, self.across) * self.tile, split

    def mine(self) -> jax.Array:
        """How many tiles this program has."""
        return lax.div(self.tiles - lax.axis_index("program") + self.programs - 1, self.programs)


def _kernel(
    x_ref: jax.Ref,
    weight_ref: jax.Ref,
    vector_refs: list[jax.Ref],
    out_ref: jax.Ref,
    x_smem: Shared,
    weight_smem: Shared,
    vector_smems: list[Shared],
    out_smem: Shared,
    full: jax.Ref,
    empty: jax.Ref,
    *,
    work: _Work,
    sums: tuple[type[InTurn], int],
    interpret: bool,
) -> None:
    group, all_blocks = lax.axis_index("group"), x_ref.shape[1] // BLOCK_IN
    blocks, stages = all_blocks // work.splits, x_smem.shape[0]  # of a tile
    pairs = list(zip(vector_refs, vector_smems, strict=False))

    @pl.when(group == COMPUTE)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def free(count: jax.Array, _: None) -> None:
            pl.when(count >= stages)(lambda: plgpu.barrier_wait(empty.at[lax.rem(count, stages)]))

        def step(count: jax.Array, _: None) -> None:
            stage = lax.rem(count, stages)
            free(count, None)
            output, token, split = work.place(lax.div(count, blocks))
            block = split * blocks + lax.rem(count, blocks)
            outputs, tokens = pl.ds(output, BLOCK_OUT), pl.ds(token, work.tile)
            second = outputs if weight_ref.dtype == jnp.uint16 else tokens
            width = weight_smem.shape[2]
            columns = pl.ds(block * width, width)
            plgpu.copy_gmem_to_smem(weight_ref.at[outputs, columns], weight_smem.at[stage], full.at[stage])
            columns = pl.ds(block * BLOCK_IN, BLOCK_IN)
            plgpu.copy_gmem_to_smem(x_ref.at[tokens, columns], x_smem.at[stage], full.at[stage])
            for (vector, smem), where in zip(pairs, (outputs, second), strict=False):
                run = lax.div(block, all_blocks // vector.shape[0])
                width = BLOCK_OUT if where is outputs else work.tile
                to = smem.at[stage, pl.ds(0, width)]
                plgpu.copy_gmem_to_smem(vector.at[run, where], to, full.at[stage])

        in_all = work.mine() * blocks
        lax.fori_loop(0, in_all, step, None)
        if interpret:  # there, who has waited for some of a barrier's phases must have seen all of them
            lax.fori_loop(jnp.maximum(in_all, stages), in_all + stages, free, None)

    @pl.when(group < COMPUTE)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        in_all = work.mine() * blocks
        kind, at_once = sums
        read = Stages(x_smem, weight_smem, vector_smems, full, empty, group, blocks, in_all)
        way = kind(read, at_once)

        def tile(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            output, token, split = work.place(index)
            outputs, tokens = pl.ds(output + group * ROWS, ROWS), pl.ds(token, work.tile)
            total, state = way.tile(index * blocks, state)
            if not vector_smems:
                total = _scaled(total, (vector_refs[0], outputs), (vector_refs[1], tokens))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            narrow = plgpu.layout_cast(total.astype(out_ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            out_smem.at[group].T[...] = narrow
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[split, tokens, outputs])
            return state

        lax.fori_loop(0, work.mine(), tile, way.first())
        plgpu.wait_smem_to_gmem(0)


def _scaled(total: jax.Array, outputs: tuple[jax.Ref, Any], tokens: tuple[jax.Ref, Any]) -> jax.Array:
    """A tile's sums times the scales of its outputs and of its tokens, each one for all columns."""
    total = total.astype(jnp.float32)
    for axis, layout, (ref, where) in ((0, BY_OUTPUT, outputs), (1, BY_TOKEN, tokens)):
        found: Any = plgpu.load(ref.at[0, where], layout=layout, optimized=False)  # type: ignore[call-arg]
        total = total * lax.broadcast_in_dim(found.astype(jnp.float32), total.shape, [axis])
    return total
