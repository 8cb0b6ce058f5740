"""Grouped products of many rows in Mosaic GPU (Hopper): rows and weights stream through shared memory by TMA.

TMA reads and writes runs of rows, so a tile's rows begin at the tile's number times `TILE`: no tile stores
what is another's, and what stands behind a tile's last row is garbage that nobody reads. There are as many
programs as cores; program p has every pair of a tile and a block of outputs whose number is p modulo their
count, blocks of one tile being neighbours, which find its rows in L2. One warpgroup copies ahead of two that
multiply, each half of the tile's rows with two runs of outputs: gate and up, or neighbours.
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
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.grouped_matmul.xla import Gating

TILE = 128  # rows
COMPUTE = 2  # warpgroups
ROWS = TILE // COMPUTE  # of each
RUN = 128  # outputs of a product; a block has two
BLOCK_IN = 64  # elements: one swizzled line of 128 bytes
STAGES = 4  # what shared memory holds beside the outputs
PROGRAMS = 132  # an H200's cores
Scratch = Any  # shared memory with a layout of its own, or barriers: Pallas has no public name for such refs
SWIZZLED = (plgpu.TilingTransform((8, BLOCK_IN)), plgpu.SwizzleTransform(2 * BLOCK_IN))


def grouped_matmul(
    rows: Float[Array, "R K"],
    weight: Float[Array, "X H N K"],
    tiles: Int32[Array, "W 3"],
    gating: Gating | None,
) -> Float[Array, "R N"]:
    """Each tile's rows, R = W `TILE`, times its group's weight; `gating` of both halves (H = 2) or the one.

    Tiles in use come first: `tiles` has the group in its first and the number of rows in its last column.
    """
    work = _Work(tiles.shape[0], weight.shape[2], gated=weight.shape[1] == 2)
    body = functools.partial(_kernel, work=work, gating=gating)
    body.__name__ = "grouped_matmul" if gating is None else "gated_grouped_matmul"  # type: ignore[attr-defined]
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows.shape[0], weight.shape[2]), rows.dtype),
        grid=(PROGRAMS,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((STAGES, TILE, BLOCK_IN), rows.dtype, transforms=SWIZZLED),
            plgpu.SMEM((STAGES, 2, RUN, BLOCK_IN), rows.dtype, transforms=SWIZZLED),
            plgpu.SMEM((COMPUTE, ROWS, RUN), rows.dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return kernel(rows, weight, tiles)


@dataclass(frozen=True)
class _Work:
    """The pairs of a tile and a block of outputs."""

    tiles: int
    outputs: int
    gated: bool

    @property
    def width(self) -> int:
        """Outputs of a block."""
        return RUN if self.gated else 2 * RUN

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.outputs, self.width)

    def place(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile and the first output of this program's pair number `index`."""
        pair = lax.axis_index("program") + index * PROGRAMS
        return lax.div(pair, self.blocks), lax.rem(pair, self.blocks) * self.width

    def mine(self) -> jax.Array:
        """How many pairs this program has, those of tiles without rows included."""
        pairs = self.tiles * self.blocks
        return lax.div(pairs - lax.axis_index("program") + PROGRAMS - 1, PROGRAMS)

    def runs(self, output: jax.Array) -> tuple[tuple[int, jax.Array], ...]:
        """Half and first output of what a block's two products take of the weight."""
        return ((0, output), (1, output)) if self.gated else ((0, output), (0, output + RUN))


def _kernel(
    rows_ref: jax.Ref,
    weight_ref: jax.Ref,
    tiles_ref: jax.Ref,
    out_ref: jax.Ref,
    rows_smem: Scratch,
    weight_smem: Scratch,
    out_smem: Scratch,
    full: Scratch,
    empty: Scratch,
    *,
    work: _Work,
    gating: Gating | None,
) -> None:
    warpgroup, steps = lax.axis_index("group"), pl.cdiv(rows_ref.shape[1], BLOCK_IN)

    @pl.when(warpgroup == COMPUTE)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def pair(index: jax.Array, _: None) -> None:
            tile, output = work.place(index)
            group = tiles_ref[tile, 0]

            def step(number: jax.Array, _: None) -> None:
                stage = lax.rem(number, STAGES)
                pl.when(number >= STAGES)(lambda: plgpu.barrier_wait(empty.at[stage]))
                column = pl.ds((number - index * steps) * BLOCK_IN, BLOCK_IN)
                at = rows_ref.at[pl.ds(tile * TILE, TILE), column]
                plgpu.copy_gmem_to_smem(at, rows_smem.at[stage], full.at[stage])
                for part, (half, first) in enumerate(work.runs(output)):
                    at = weight_ref.at[group, half, pl.ds(first, RUN), column]
                    plgpu.copy_gmem_to_smem(at, weight_smem.at[stage, part], full.at[stage])

            @pl.when(tiles_ref[tile, 2] > 0)
            def _fetch() -> None:
                lax.fori_loop(index * steps, (index + 1) * steps, step, None)

        lax.fori_loop(0, work.mine(), pair, None)

    @pl.when(warpgroup < COMPUTE)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        ring = _Ring(rows_smem, weight_smem, full, empty, pl.ds(warpgroup * ROWS, ROWS))
        staged = out_smem.at[warpgroup]

        def store(value: jax.Array, tile: jax.Array, output: jax.Array) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = value.astype(out_ref.dtype)
            plgpu.commit_smem()
            place = pl.ds(tile * TILE + warpgroup * ROWS, ROWS), pl.ds(output, RUN)
            plgpu.copy_smem_to_gmem(staged, out_ref.at[place])

        def pair(index: jax.Array, _: None) -> None:
            tile, output = work.place(index)
            count, span = tiles_ref[tile, 2], (index * steps, (index + 1) * steps)

            @pl.when(count > warpgroup * ROWS)
            def _whole() -> None:
                totals = [total.astype(out_ref.dtype).astype(jnp.float32) for total in ring.products(*span)]
                if work.gated:
                    assert gating is not None
                    store(gating(*totals), tile, output)
                    return
                for run, total in enumerate(totals):
                    store(total if gating is None else gating(total), tile, output + run * RUN)

            @pl.when((count > 0) & (count <= warpgroup * ROWS))
            def _none() -> None:
                ring.skip(*span)

        lax.fori_loop(0, work.mine(), pair, None)
        plgpu.wait_smem_to_gmem(0)


@dataclass(frozen=True)
class _Ring:
    """Stages of shared memory that one warpgroup fills and the others empty, in the same order."""

    rows: Scratch
    weight: Scratch
    full: Scratch
    empty: Scratch
    mine: Any  # rows of the warpgroup

    def products(self, first: jax.Array, end: jax.Array) -> list[jax.Array]:
        """This warpgroup's rows times both runs of outputs."""

        def scope(*totals: Any) -> list[jax.Array]:
            def step(number: jax.Array, _: None) -> None:
                stage = lax.rem(number, STAGES)
                plgpu.barrier_wait(self.full.at[stage])
                for part, total in enumerate(totals):
                    plgpu.wgmma(total, self.rows.at[stage, self.mine], self.weight.at[stage, part].T)
                plgpu.wgmma_wait(len(totals))  # the step before has been read, this one is under way
                before = lax.rem(number + STAGES - 1, STAGES)
                pl.when(number > first)(lambda: plgpu.barrier_arrive(self.empty.at[before]))

            lax.fori_loop(first, end, step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.empty.at[lax.rem(end + STAGES - 1, STAGES)])
            return [total[...] for total in totals]

        return pl.run_scoped(scope, *[plgpu.ACC((ROWS, RUN), jnp.float32)] * 2)

    def skip(self, first: jax.Array, end: jax.Array) -> None:
        """Nothing to multiply, and the stages are the other warpgroups' as much."""

        def step(number: jax.Array, _: None) -> None:
            stage = lax.rem(number, STAGES)
            plgpu.barrier_wait(self.full.at[stage])
            plgpu.barrier_arrive(self.empty.at[stage])

        lax.fori_loop(first, end, step, None)
