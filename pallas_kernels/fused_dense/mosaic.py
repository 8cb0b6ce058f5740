"""Products of many rows with an epilogue, in Mosaic GPU (Hopper).

Programs are as many as pairs of cores: a cluster of two has a tile of outputs for two runs of rows, and both
read each half of its weights, which TMA hands to both. In a core one warpgroup copies blocks of columns ahead
of two that multiply and take tiles by turns: while one adds the bias, applies the activation and stores, the
other has the tensor cores to itself. That it skips the other's stages is seen by no barrier: each is used an
even number of times a tile.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.fused_dense.xla import Activation

COMPUTE = 2  # warpgroups
ROWS = 64  # of a warpgroup's tile
CLUSTER = 2
BLOCK_IN = 64  # elements: one swizzled line of 128 bytes
SWIZZLED = (plgpu.TilingTransform((8, BLOCK_IN)), plgpu.SwizzleTransform(2 * BLOCK_IN))
BY_OUTPUT = plgpu.Layout.WGMMA.reduce(0)
Scratch = Any  # shared memory with a layout of its own, or barriers: Pallas has no public name for such refs


@dataclass(frozen=True)
class Tuning:
    """Outputs of a tile and of what is stored at a time; blocks in flight; clusters."""

    outputs: int = 256
    stored: int = 64
    num_stages: int = 4
    clusters: int = 66


def fused_dense(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, "N"],
    activation: Activation,
    tuning: Tuning = Tuning(),
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.fused_dense`."""
    work = _Work(x.shape[0], weight.shape[0], x.shape[1] // BLOCK_IN, tuning)
    stages, wide = tuning.num_stages, tuning.outputs
    body = functools.partial(_kernel, work=work, activation=activation)
    body.__name__ = "fused_dense"  # type: ignore[attr-defined]  # what profiles call it
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype),
        grid=(tuning.clusters,),
        grid_names=("program",),
        cluster=(CLUSTER,),
        cluster_names=("half",),
        num_threads=COMPUTE + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, ROWS, BLOCK_IN), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, wide, BLOCK_IN), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((COMPUTE, ROWS, tuning.stored), x.dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("half",), num_barriers=stages),
            plgpu.Barrier(num_barriers=COMPUTE),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return kernel(x, weight, bias)


def _load(ref: Any) -> jax.Array:
    """A vector by outputs, each thread its own; JAX 0.10 asks for an index beside the reference's own."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    needed = [()] if index is not None and index.default is index.empty else []
    return plgpu.load(ref, *needed, layout=BY_OUTPUT, optimized=False)


@dataclass(frozen=True)
class _Work:
    """The tiles of all clusters: outputs first, so that clusters side by side read the same rows."""

    rows: int
    outputs: int
    steps: int  # blocks of columns of a tile
    tuning: Tuning

    @property
    def across(self) -> int:
        return self.outputs // self.tuning.outputs

    def place(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first row and output of this core's tile number `index`."""
        tile = lax.axis_index("program") + index * self.tuning.clusters
        pair = lax.div(tile, self.across) * CLUSTER + lax.axis_index("half")
        return pair * ROWS, lax.rem(tile, self.across) * self.tuning.outputs

    def mine(self) -> jax.Array:
        """How many tiles this cluster has."""
        tiles, clusters = pl.cdiv(self.rows, CLUSTER * ROWS) * self.across, self.tuning.clusters
        return lax.div(tiles - lax.axis_index("program") + clusters - 1, clusters)


def _kernel(
    x_ref: jax.Ref,
    weight_ref: jax.Ref,
    bias_ref: jax.Ref,
    out_ref: jax.Ref,
    x_smem: Scratch,
    weight_smem: Scratch,
    out_smem: Scratch,
    full: Scratch,
    empty: Scratch,
    turn: Scratch,
    *,
    work: _Work,
    activation: Activation,
) -> None:
    group, tuning, steps = lax.axis_index("group"), work.tuning, work.steps
    stages = tuning.num_stages

    @pl.when(group == COMPUTE)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def tile(index: jax.Array, _: None) -> None:
            row, output = work.place(index)

            def step(number: jax.Array, _: None) -> None:
                stage = lax.rem(number, stages)
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                columns = pl.ds((number - index * steps) * BLOCK_IN, BLOCK_IN)
                rows = pl.ds(row, x_smem.shape[1])
                plgpu.copy_gmem_to_smem(x_ref.at[rows, columns], x_smem.at[stage], full.at[stage])
                plgpu.copy_gmem_to_smem(
                    weight_ref.at[pl.ds(output, tuning.outputs), columns],
                    weight_smem.at[stage],
                    full.at[stage],
                    collective_axes="half",
                )

            lax.fori_loop(index * steps, (index + 1) * steps, step, None)

        lax.fori_loop(0, work.mine(), tile, None)
        released = lambda number, _: plgpu.barrier_wait(empty.at[lax.rem(number, stages)])  # noqa: E731
        total = work.mine() * steps  # the other core still tells this one that it has read them
        lax.fori_loop(lax.max(total - stages, jnp.int32(0)), total, released, None)

    @pl.when(group < COMPUTE)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")

        def multiply(index: jax.Array) -> jax.Array:
            def scope(acc: Scratch) -> jax.Array:
                def step(number: jax.Array, _: None) -> None:
                    stage = lax.rem(number, stages)
                    plgpu.barrier_wait(full.at[stage])
                    plgpu.wgmma(acc, x_smem.at[stage], weight_smem.at[stage].T)
                    plgpu.wgmma_wait(1)  # the step before has been read, this one is under way
                    before = lax.rem(number + stages - 1, stages)
                    pl.when(number > index * steps)(lambda: plgpu.barrier_arrive(empty.at[before]))

                lax.fori_loop(index * steps, (index + 1) * steps, step, None)
                plgpu.barrier_arrive(turn.at[1 - group])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem((index + 1) * steps - 1, stages)])
                return acc[...]

            return pl.run_scoped(scope, plgpu.ACC((ROWS, tuning.outputs), jnp.float32))

        def tile(number: jax.Array, _: None) -> None:
            index = COMPUTE * number + group
            pl.when(index > 0)(lambda: plgpu.barrier_wait(turn.at[group]))
            total, (row, output) = multiply(index), work.place(index)
            for first in range(0, tuning.outputs, tuning.stored):
                place = pl.ds(row, ROWS), pl.ds(output + first, tuning.stored)
                value, bias = total[:, first : first + tuning.stored], _load(bias_ref.at[place[1]])
                value += lax.broadcast_in_dim(bias.astype(jnp.float32), value.shape, [1])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem.at[group][...] = activation(value).astype(out_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[place])

        lax.fori_loop(0, lax.div(work.mine() + COMPUTE - 1 - group, COMPUTE), tile, None)
        plgpu.wait_smem_to_gmem(0)
