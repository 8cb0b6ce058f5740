"""Gated skinny products in Mosaic GPU (Hopper): the weight streams through shared memory by TMA.

There are as many programs as cores, or fewer that share the work evenly; program p has every tile of outputs
whose number is p modulo their count. One warpgroup copies blocks of gate, up and x ahead of two that
multiply, each with half of the tile's outputs, without a pause from one tile to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import StreamTiling

BLOCK_IN = 64  # elements: one swizzled line of 128 bytes
COMPUTE = 2  # warpgroups
MIN_ROWS = 64  # of a tensor-core product; those beyond x are garbage and never stored


def gated_skinny_gemm(
    x: Float[Array, "T K"],
    weight: Float[Array, "2 N K"],
    tiling: StreamTiling,
    activation: Callable[[jax.Array], jax.Array],
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`; T is a multiple of 8."""
    rows = -(-x.shape[0] // MIN_ROWS) * MIN_ROWS
    stages, width = tiling.num_stages, tiling.block_out // COMPUTE
    swizzle, out_swizzle = _swizzled(BLOCK_IN), _swizzled(width)
    body = functools.partial(_kernel, tiling=tiling, activation=activation)
    body.__name__ = "gated_skinny_gemm"  # type: ignore[attr-defined]  # what profiles call it
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype),
        grid=(tiling.programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, rows, BLOCK_IN), x.dtype, transforms=swizzle),
            plgpu.SMEM((stages, 2, tiling.block_out, BLOCK_IN), x.dtype, transforms=swizzle),
            plgpu.SMEM((COMPUTE, rows, width), x.dtype, transforms=out_swizzle),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(x, weight)


def _swizzled(line: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The layout that tensor cores and TMA share, for rows of `line` 16-bit elements or a multiple."""
    line = min(line, BLOCK_IN)
    return plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(2 * line)


@dataclass(frozen=True)
class _Ring:
    """Stages of shared memory that one warpgroup fills and the others empty, in the same order."""

    x_ref: jax.Ref
    weight_ref: jax.Ref
    x_smem: jax.Ref
    weight_smem: jax.Ref
    full: jax.Ref
    empty: jax.Ref
    tiling: StreamTiling

    @property
    def blocks(self) -> int:
        """Blocks of a tile."""
        return self.x_ref.shape[1] // BLOCK_IN

    def fetch(self, count: jax.Array, tile: jax.Array) -> None:
        """Starts the copies of this program's block number `count`, which belongs to output tile `tile`."""
        stage = lax.rem(count, self.tiling.num_stages)
        pl.when(count >= self.tiling.num_stages)(lambda: plgpu.barrier_wait(self.empty.at[stage]))
        column = pl.ds(lax.rem(count, self.blocks) * BLOCK_IN, BLOCK_IN)
        out = pl.ds(tile * self.tiling.block_out, self.tiling.block_out)
        full = self.full.at[stage]
        for half in range(2):
            rows = self.weight_ref.at[half, out, column]
            plgpu.copy_gmem_to_smem(rows, self.weight_smem.at[stage, half], full)
        tokens = pl.ds(0, self.x_ref.shape[0])
        plgpu.copy_gmem_to_smem(self.x_ref.at[:, column], self.x_smem.at[stage, tokens], full)

    def products(self, first: jax.Array, begin: jax.Array, width: int) -> list[jax.Array]:
        """x times `width` outputs of gate and of up, from `begin` on, of the tile with block `first`."""
        shape, outputs = (self.x_smem.shape[1], width), pl.ds(begin, width)

        def scope(*totals: Any) -> list[jax.Array]:
            def step(count: jax.Array, _: None) -> None:
                stage = lax.rem(count, self.tiling.num_stages)
                plgpu.barrier_wait(self.full.at[stage])
                for half, total in enumerate(totals):
                    plgpu.wgmma(total, self.x_smem.at[stage], self.weight_smem.at[stage, half, outputs].T)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(self.empty.at[stage])

            lax.fori_loop(first, first + self.blocks, step, None)
            return [total[...] for total in totals]

        return pl.run_scoped(scope, *[plgpu.ACC(shape, jnp.float32)] * 2)


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
    tiling: StreamTiling,
    activation: Callable[[jax.Array], jax.Array],
) -> None:
    ring = _Ring(x_ref, weight_ref, x_smem, weight_smem, full, empty, tiling)
    program, group = lax.axis_index("program"), lax.axis_index("group")
    tiles = weight_ref.shape[1] // tiling.block_out
    mine = lax.div(tiles - program + tiling.programs - 1, tiling.programs)

    @pl.when(group == COMPUTE)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def step(count: jax.Array, _: None) -> None:
            ring.fetch(count, program + lax.div(count, ring.blocks) * tiling.programs)

        lax.fori_loop(0, mine * ring.blocks, step, None)

    @pl.when(group < COMPUTE)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        tokens, width = x_ref.shape[0], tiling.block_out // COMPUTE
        staged = out_smem.at[group]

        def step(index: jax.Array, _: None) -> None:
            gate, up = ring.products(index * ring.blocks, group * width, width)
            # Rounded where the separate operations round.
            gate, up = (half.astype(out_ref.dtype).astype(jnp.float32) for half in (gate, up))
            inner = activation(gate).astype(out_ref.dtype).astype(jnp.float32) * up
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = inner.astype(out_ref.dtype)
            plgpu.commit_smem()
            first = (program + index * tiling.programs) * tiling.block_out + group * width
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, tokens)], out_ref.at[:, pl.ds(first, width)])

        lax.fori_loop(0, mine, step, None)
        plgpu.wait_smem_to_gmem(0)
