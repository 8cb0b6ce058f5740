"""Quantised products of many rows in Mosaic GPU (Hopper): weights are the tensor cores' left operand.

There are as many programs as cores; program p has every tile of outputs, tokens and, in parts, columns whose
number is p modulo their count. One warpgroup copies blocks of 128 columns ahead of two that multiply, each
with half of the tile's outputs. A block's product is made from nothing, exactly, and added in f32 times its
scales: E4M3 would lose bits in a longer sum of the tensor cores. 4-bit integers, less their zeros, are
bfloat16 in registers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.quant_gemm.streaming import BLOCK_IN, BLOCK_OUT, tile_of, vector_space
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import StreamTiling

COMPUTE = 2  # warpgroups
ROWS = BLOCK_OUT // COMPUTE  # outputs of each
LAYOUT = plgpu.Layout.WGMMA
BY_OUTPUT, BY_TOKEN = LAYOUT.reduce(1), LAYOUT.reduce(0)
MIDDLE = 136  # a nibble at the end of bfloat16's 128, less this, is a 4-bit integer whose zero is 8


def quant_gemm(
    x: Float[Array, "T K"] | Quantised, weight: Quantised, tiling: StreamTiling, out_dtype: DTypeLike
) -> Float[Array, "{tiling.splits} T N"]:
    """x [T, K] @ weight [N, K]^T; see `lmdeploy_jax.pallas_kernels.quant_gemm`."""
    rows = x.values if isinstance(x, Quantised) else x
    tokens, outputs = rows.shape[0], weight.values.shape[0]
    tile, stages = tile_of(tokens), tiling.num_stages
    words = weight.values.dtype == jnp.uint16
    vectors = [weight.scales]  # beside each block of columns
    if isinstance(x, Quantised):
        vectors.append(x.scales)
    elif weight.zeros is not None:
        vectors.append((weight.zeros + jnp.uint8(128)).astype(jnp.bfloat16))
    widths = [BLOCK_OUT, tile if isinstance(x, Quantised) else BLOCK_OUT]
    body = functools.partial(
        _kernel, work=_Work(tokens, outputs, tile, tiling.programs, tiling.splits), stages=stages
    )
    body.__name__ = "quant_gemm"  # type: ignore[attr-defined]  # what profiles call it
    columns = BLOCK_IN // PER_WORD if words else BLOCK_IN
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
            [plgpu.SMEM((stages, vector_space(w)), v.dtype) for w, v in zip(widths, vectors, strict=False)],
            _staged(tile, out_dtype),
            plgpu.Barrier(num_arrivals=2 + len(vectors), num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return kernel(rows, weight.values, vectors)


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
    x_smem: jax.Ref,
    weight_smem: jax.Ref,
    vector_smems: list[jax.Ref],
    out_smem: jax.Ref,
    full: jax.Ref,
    empty: jax.Ref,
    *,
    work: _Work,
    stages: int,
) -> None:
    group, all_blocks = lax.axis_index("group"), x_ref.shape[1] // BLOCK_IN
    blocks = all_blocks // work.splits  # of a tile
    pairs = list(zip(vector_refs, vector_smems, strict=True))

    @pl.when(group == COMPUTE)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def step(count: jax.Array, _: None) -> None:
            stage = lax.rem(count, stages)
            pl.when(count >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
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

        lax.fori_loop(0, work.mine() * blocks, step, None)

    @pl.when(group < COMPUTE)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(group * ROWS, ROWS)

        def block(count: jax.Array, total: jax.Array) -> jax.Array:
            stage = lax.rem(count, stages)
            plgpu.barrier_wait(full.at[stage])
            vectors = [smem.at[stage] for smem in vector_smems]
            left = _left(weight_smem.at[stage, mine], vectors[1:], mine)

            def product(part: Any) -> jax.Array:
                plgpu.wgmma(part, left, x_smem.at[stage].T)
                plgpu.wgmma_wait(0)
                return part[...]

            part = pl.run_scoped(product, plgpu.ACC((ROWS, work.tile), jnp.float32))
            scale = _load(vectors[0].at[mine], BY_OUTPUT).astype(jnp.float32)
            part = part * lax.broadcast_in_dim(scale, part.shape, [0])
            if weight_smem.dtype != jnp.uint16:
                scale = _load(vectors[1].at[pl.ds(0, work.tile)], BY_TOKEN)
                part = part * lax.broadcast_in_dim(scale, part.shape, [1])
            plgpu.barrier_arrive(empty.at[stage])
            return total + part

        def tile(index: jax.Array, _: None) -> None:
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, work.tile), jnp.float32), LAYOUT)
            total = lax.fori_loop(index * blocks, (index + 1) * blocks, block, zeros)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            narrow = plgpu.layout_cast(total.astype(out_ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            out_smem.at[group].T[...] = narrow
            plgpu.commit_smem()
            output, token, split = work.place(index)
            place = split, pl.ds(token, work.tile), pl.ds(output + group * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[place])

        lax.fori_loop(0, work.mine(), tile, None)
        plgpu.wait_smem_to_gmem(0)


def _left(weight: jax.Ref, zeros: list[jax.Ref], mine: Any) -> jax.Ref | jax.Array:
    """The block as it is or, of 4 bits, in registers."""
    if weight.dtype != jnp.uint16:
        return weight
    numbers = _unpack()(_load(weight, LAYOUT))
    if not zeros:
        return numbers - jnp.bfloat16(MIDDLE)
    zero = _load(zeros[0].at[mine], BY_OUTPUT)
    return numbers - lax.broadcast_in_dim(zero, numbers.shape, [0])


def _load(ref: Any, layout: plgpu.Layout | Any) -> jax.Array:
    return plgpu.load(ref, layout=layout)  # type: ignore[call-arg]  # JAX 0.10 asked for an index too


def _unpack() -> Any:
    """uint16 words [ROWS, 32] -> bfloat16 [ROWS, 128], each 128 + a nibble.

    A register has two words side by side, and the same nibble of both is the pair of columns that the tensor
    cores want in a register of the tile 4 q further on: a shift and a mask, nothing moves between threads.
    """

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct((ROWS, BLOCK_IN), jnp.bfloat16, layout=LAYOUT),
    )
    def unpack(_: Any, words: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        shape = fragmented_array.WGMMA_LAYOUT.registers_shape((ROWS, BLOCK_IN))
        registers = np.empty(shape, dtype=object)
        for (row, column, *rest), register in np.ndenumerate(words.registers):
            bits = mgpu.utils.bitcast(register, word)
            for nibble in range(PER_WORD):
                found: Any = llvm.inline_asm(word, [bits], _nibble(nibble), "=r,r")
                registers[(row, column + PER_WORD * nibble, *rest)] = mgpu.utils.bitcast(found, pair)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None
        )

    return unpack


def _nibble(number: int) -> str:
    shift = f"shr.u32 t, $1, {4 * number};" if number else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t; {shift} lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }}"
