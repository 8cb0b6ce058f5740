"""Skinny products in Mosaic GPU (Hopper): every core streams an equal share of the weight through TMA.

Stream-K (Osama et al., 2023): the weight's blocks, [block_out, BLOCK_IN], in order of their outputs, are
dealt out evenly to as many programs as there are cores, so that a program may end in the middle of an
output's inner axis; each of those who share an output writes a part of it. One warpgroup copies, two multiply,
each with half of the outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.skinny_gemm.tiling import StreamTiling

BLOCK_IN = 64  # elements: one swizzled line of 128 bytes
COMPUTE = 2  # warpgroups
STAGED = 8192  # elements of an accumulator that are written at a time


def part_count(outputs: int, inner: int, tiling: StreamTiling) -> int:
    """Most programs that share an output."""
    blocks, tiles = inner // BLOCK_IN, outputs // tiling.block_out
    owners = [
        [_owner(tile * blocks + edge, tiles * blocks, tiling.programs) for edge in (0, blocks - 1)]
        for tile in range(tiles)
    ]
    return max(last - first + 1 for first, last in owners)


def _owner(unit: int, units: int, programs: int) -> int:
    """The program to which a block falls; program p has the blocks from p * units // programs on."""
    return ((unit + 1) * programs - 1) // units


def stream_gemm(x: jax.Array, weight: jax.Array, tiling: StreamTiling) -> jax.Array:
    """x [T, K] @ weight [N, K]^T -> f32 [parts, T, N]. T is a multiple of 8."""
    (tokens, inner), outputs = x.shape, weight.shape[0]
    parts = part_count(outputs, inner, tiling)
    kernel = _build(
        functools.partial(_kernel, tiling=tiling),
        jax.ShapeDtypeStruct((parts, tokens, outputs), jnp.float32),
        x,
        tiling,
        halves=1,
    )
    return kernel(x, weight[None])


def gated_stream_gemm(
    x: jax.Array, weight: jax.Array, tiling: StreamTiling, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """activation(x @ weight[0]^T) * (x @ weight[1]^T): x [T, K], weight [2, N, K] -> [T, N] in x's dtype."""
    kernel = _build(
        functools.partial(_gated_kernel, tiling=tiling, activation=activation),
        jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype),
        x,
        tiling,
        halves=2,
    )
    return kernel(x, weight)


def _build(
    body: Callable[..., None], out: jax.ShapeDtypeStruct, x: jax.Array, tiling: StreamTiling, *, halves: int
) -> Callable[..., jax.Array]:
    rows = -(-x.shape[0] // 64) * 64  # of a tensor-core product; those beyond x are garbage and not stored
    stages, width = tiling.num_stages, tiling.block_out // COMPUTE
    columns = min(width, 64, STAGED // rows)
    line = min(columns, 128 // out.dtype.itemsize)  # elements of a swizzled line
    swizzle = _swizzled(BLOCK_IN, x.dtype)
    return plgpu.kernel(
        functools.partial(body, rows=rows),
        out_type=out,
        grid=(tiling.programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, rows, BLOCK_IN), x.dtype, transforms=swizzle),
            plgpu.SMEM((stages, halves, tiling.block_out, BLOCK_IN), x.dtype, transforms=swizzle),
            plgpu.SMEM((COMPUTE, rows, columns), out.dtype, transforms=_swizzled(line, out.dtype)),
            plgpu.Barrier(num_arrivals=1 + halves, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _kernel(
    x_ref: jax.Ref,
    weight_ref: jax.Ref,
    out_ref: jax.Ref,
    x_smem: jax.Ref,
    weight_smem: jax.Ref,
    out_smem: jax.Ref,
    full: jax.Ref,
    empty: jax.Ref,
    *,
    rows: int,
    tiling: StreamTiling,
) -> None:
    ring = _Ring(x_ref, weight_ref, x_smem, weight_smem, full, empty, tiling)
    program, blocks = lax.axis_index("program"), ring.blocks
    units = blocks * ring.tiles
    begin, end = (lax.div((program + i) * units, tiling.programs) for i in range(2))

    @ring.copies
    def _copy() -> None:
        def step(unit: jax.Array, _: None) -> None:
            ring.fetch(unit - begin, lax.div(unit, blocks), lax.rem(unit, blocks))

        lax.fori_loop(begin, end, step, None)

    @ring.multiplies
    def _multiply() -> None:
        write = functools.partial(_write, ring, out_smem)

        def segment(first: jax.Array) -> jax.Array:
            tile = lax.div(first, blocks)
            last = lax.min(end, (tile + 1) * blocks)
            (total,) = ring.products(first - begin, last - begin, rows)
            part = program - _owner_of(tile * blocks, units, tiling.programs)
            write(total, out_ref.at[part], tile)

            # The last program of a tile fills the parts that nobody has.
            @pl.when(last == (tile + 1) * blocks)
            def _fill() -> None:
                zeros = jnp.zeros_like(total)
                lax.fori_loop(
                    part + 1, out_ref.shape[0], lambda p, _: write(zeros, out_ref.at[p], tile), None
                )

            return last

        lax.while_loop(lambda unit: unit < end, segment, begin)
        plgpu.wait_smem_to_gmem(0)


def _gated_kernel(
    x_ref: jax.Ref,
    weight_ref: jax.Ref,
    out_ref: jax.Ref,
    x_smem: jax.Ref,
    weight_smem: jax.Ref,
    out_smem: jax.Ref,
    full: jax.Ref,
    empty: jax.Ref,
    *,
    rows: int,
    tiling: StreamTiling,
    activation: Callable[[jax.Array], jax.Array],
) -> None:
    ring = _Ring(x_ref, weight_ref, x_smem, weight_smem, full, empty, tiling)
    program, blocks = lax.axis_index("program"), ring.blocks
    mine = lax.div(ring.tiles - program + tiling.programs - 1, tiling.programs)  # tiles, one in `programs`

    @ring.copies
    def _copy() -> None:
        def step(count: jax.Array, _: None) -> None:
            tile = program + lax.div(count, blocks) * tiling.programs
            ring.fetch(count, tile, lax.rem(count, blocks))

        lax.fori_loop(0, mine * blocks, step, None)

    @ring.multiplies
    def _multiply() -> None:
        def step(index: jax.Array, _: None) -> None:
            gate, up = ring.products(index * blocks, (index + 1) * blocks, rows)
            # Rounded where the separate operations round.
            gate, up = (half.astype(out_ref.dtype).astype(jnp.float32) for half in (gate, up))
            inner = activation(gate).astype(out_ref.dtype).astype(jnp.float32) * up
            _write(ring, out_smem, inner.astype(out_ref.dtype), out_ref, program + index * tiling.programs)

        lax.fori_loop(0, mine, step, None)
        plgpu.wait_smem_to_gmem(0)


def _swizzled(line: int, dtype: jnp.dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    return plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line * jnp.dtype(dtype).itemsize)


class _Ring:
    """Stages of shared memory that one warpgroup fills and the others multiply from, in the same order."""

    def __init__(
        self,
        x_ref: jax.Ref,
        weight_ref: jax.Ref,
        x_smem: jax.Ref,
        weight_smem: jax.Ref,
        full: jax.Ref,
        empty: jax.Ref,
        tiling: StreamTiling,
    ) -> None:
        self.x_ref, self.weight_ref, self.x_smem, self.weight_smem = x_ref, weight_ref, x_smem, weight_smem
        self.full, self.empty, self.tiling = full, empty, tiling
        self.group = lax.axis_index("group")
        self.blocks = x_ref.shape[1] // BLOCK_IN
        self.halves, outputs = weight_ref.shape[:2]
        self.tiles = outputs // tiling.block_out
        self.width = tiling.block_out // COMPUTE  # outputs of a warpgroup

    def copies(self, body: Callable[[], None]) -> None:
        """Runs `body` in the warpgroup that copies."""

        @pl.when(self.group == COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            body()

    def multiplies(self, body: Callable[[], None]) -> None:
        """Runs `body` in the warpgroups that multiply."""

        @pl.when(self.group < COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            body()

    def fetch(self, count: jax.Array, tile: jax.Array, block: jax.Array) -> None:
        """Starts the copies of the program's block number `count`, which is `block` of output tile `tile`."""
        stage = lax.rem(count, self.tiling.num_stages)
        pl.when(count >= self.tiling.num_stages)(lambda: plgpu.barrier_wait(self.empty.at[stage]))
        column = pl.ds(block * BLOCK_IN, BLOCK_IN)
        out = pl.ds(tile * self.tiling.block_out, self.tiling.block_out)
        full = self.full.at[stage]
        for half in range(self.halves):
            plgpu.copy_gmem_to_smem(
                self.weight_ref.at[half, out, column], self.weight_smem.at[stage, half], full
            )
        plgpu.copy_gmem_to_smem(
            self.x_ref.at[:, column], self.x_smem.at[stage, pl.ds(0, self.x_ref.shape[0])], full
        )

    def products(self, first: jax.Array, last: jax.Array, rows: int) -> list[jax.Array]:
        """x times the weight's blocks `first` to `last` - 1 of the program: [rows, width] for each half."""
        mine = pl.ds(self.group * self.width, self.width)

        def scope(*totals: Any) -> list[jax.Array]:
            def step(count: jax.Array, _: None) -> None:
                stage = lax.rem(count, self.tiling.num_stages)
                plgpu.barrier_wait(self.full.at[stage])
                for half, total in enumerate(totals):
                    plgpu.wgmma(total, self.x_smem.at[stage], self.weight_smem.at[stage, half, mine].T)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(self.empty.at[stage])

            lax.fori_loop(first, last, step, None)
            return [total[...] for total in totals]

        return pl.run_scoped(scope, *[plgpu.ACC((rows, self.width), jnp.float32)] * self.halves)


def _write(ring: _Ring, out_smem: jax.Ref, values: jax.Array, out_ref: jax.Ref, tile: jax.Array) -> None:
    """Stores this warpgroup's [rows, width] values of an output tile, rows of x only."""
    tokens, step = ring.x_ref.shape[0], out_smem.shape[2]
    for column in range(0, ring.width, step):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem.at[ring.group][...] = values[:, column : column + step]
        plgpu.commit_smem()
        out = pl.ds(tile * ring.tiling.block_out + ring.group * ring.width + column, step)
        plgpu.copy_smem_to_gmem(out_smem.at[ring.group, pl.ds(0, tokens)], out_ref.at[:, out])


def _owner_of(unit: jax.Array, units: int, programs: int) -> jax.Array:
    return lax.div((unit + 1) * programs - 1, units)
