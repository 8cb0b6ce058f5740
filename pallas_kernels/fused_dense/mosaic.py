"""Products of many rows with an epilogue, in Mosaic GPU (Hopper).

Programs are as many as pairs of cores: a cluster of two has a tile of outputs for two runs of rows, and both
read each half of its weights, which TMA hands to both. In a core one warpgroup copies blocks of columns ahead
of two that multiply and take tiles by turns: while one adds the bias, applies the activation and stores, the
other has the tensor cores to itself. That it skips the other's stages is seen by no barrier: each is used an
even number of times a tile. A row's sum and sum of squares, which a norm needs, are taken of the same blocks
while the tensor cores read them, so that a norm costs no pass over the rows.
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

from lmdeploy_jax.pallas_kernels.fused_dense.xla import Activation, RowNorm, row_scales

COMPUTE = 2  # warpgroups
ROWS = 64  # of a warpgroup's tile
CLUSTER = 2
BLOCK_IN = 64  # elements: one swizzled line of 128 bytes
SWIZZLED = (plgpu.TilingTransform((8, BLOCK_IN)), plgpu.SwizzleTransform(2 * BLOCK_IN))
BY_ROW, BY_OUTPUT = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
OUTPUTS = (256, 224, 192, 160, 128)  # of tiles that can be chosen
TILE_COST = 48  # what a tile costs besides its products, in outputs of 1,024 columns
Scratch = Any  # shared memory with a layout of its own, or barriers: Pallas has no public name for such refs


@dataclass(frozen=True)
class Tuning:
    """Outputs of a tile; blocks in flight; clusters."""

    outputs: int = 256
    num_stages: int = 4
    clusters: int = 66

    @property
    def stored(self) -> int:
        """Outputs that are stored at a time."""
        return 64 if self.outputs % 64 == 0 else 32

    def rounds(self, rows: int, outputs: int) -> int:
        """The most tiles that a cluster has."""
        return pl.cdiv(pl.cdiv(rows, CLUSTER * ROWS) * pl.cdiv(outputs, self.outputs), self.clusters)


def fitted(rows: int, outputs: int) -> Tuning:
    """With tiles that fill the cores best: of 1,025 rows, 256 outputs would leave a third of them idle."""
    tunings = [Tuning(width) for width in OUTPUTS]
    return min(tunings, key=lambda tuning: tuning.rounds(rows, outputs) * (tuning.outputs + TILE_COST))


@dataclass(frozen=True)
class _Epilogue:
    """What is done to a tile's products before they are stored."""

    activation: Activation | None
    eps: float | None  # of the norm of the rows, if there is one
    centres: bool  # that norm
    adds: bool  # a residual

    def __call__(self, value: jax.Array, statistics: Any, bias: jax.Array, sums: jax.Array | None) -> Any:
        """value f32 [ROWS, outputs], bias and the weights' sums [outputs]."""
        by_row = lambda row: lax.broadcast_in_dim(row, value.shape, [0])  # noqa: E731
        by_output = lambda each: lax.broadcast_in_dim(each, value.shape, [1])  # noqa: E731
        if statistics is not None:
            mean, scale = statistics
            value = value if sums is None else value - by_row(mean) * by_output(sums)
            value = value * by_row(scale)
        value = value + by_output(bias.astype(jnp.float32))
        return value if self.activation is None else self.activation(value)


def fused_dense(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, "N"],
    activation: Activation | None = None,
    norm: RowNorm | None = None,
    residual: Float[Array, "T N"] | None = None,
    tuning: Tuning | None = None,
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.fused_dense`."""
    if tuning is None:
        tuning = Tuning() if norm is residual is None else fitted(x.shape[0], weight.shape[0])
    work = _Work(x.shape[0], weight.shape[0], x.shape[1] // BLOCK_IN, tuning)
    stages, wide, stored = tuning.num_stages, tuning.outputs, tuning.stored
    eps, sums = (None, None) if norm is None else (norm.eps, norm.column_sums)
    epilogue = _Epilogue(activation, eps, sums is not None, residual is not None)
    body = functools.partial(_kernel, work=work, epilogue=epilogue)
    body.__name__ = "fused_dense"  # type: ignore[attr-defined]  # what profiles call it
    held = wide // stored if epilogue.adds else 1
    out_transforms = (plgpu.TilingTransform((8, stored)), plgpu.SwizzleTransform(2 * stored))
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
            plgpu.SMEM((COMPUTE, held, ROWS, stored), x.dtype, transforms=out_transforms),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("half",), num_barriers=stages),
            plgpu.Barrier(num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=held, num_barriers=COMPUTE),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return kernel(x, weight, bias, *[extra for extra in (sums, residual) if extra is not None])


def _load(ref: Any, layout: Any = BY_OUTPUT, **how: Any) -> jax.Array:
    """Each thread loads its own, in float32; JAX 0.10 asks for an index beside the reference's own."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    needed = [()] if index is not None and index.default is index.empty else []
    return plgpu.load(ref, *needed, layout=layout, **how).astype(jnp.float32)


@dataclass(frozen=True)
class _Work:
    """The tiles of all clusters: outputs first, so that clusters side by side read the same rows."""

    rows: int
    outputs: int
    steps: int  # blocks of columns of a tile
    tuning: Tuning

    @property
    def across(self) -> int:
        return pl.cdiv(self.outputs, self.tuning.outputs)

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
    x_ref: jax.Ref, weight_ref: jax.Ref, bias_ref: jax.Ref, *refs: Any, work: _Work, epilogue: _Epilogue
) -> None:
    rest = list(refs)
    sums_ref = rest.pop(0) if epilogue.centres else None
    residual_ref = rest.pop(0) if epilogue.adds else None
    out_ref, x_smem, weight_smem, out_smem, full, empty, turn, added = rest
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

        def multiply(index: jax.Array) -> tuple[jax.Array, Any]:
            def scope(acc: Scratch) -> tuple[jax.Array, Any]:
                def step(number: jax.Array, statistics: Any) -> Any:
                    stage = lax.rem(number, stages)
                    plgpu.barrier_wait(full.at[stage])
                    plgpu.wgmma(acc, x_smem.at[stage], weight_smem.at[stage].T)
                    statistics = measured(x_smem.at[stage], statistics)
                    plgpu.wgmma_wait(1)  # the step before has been read, this one is under way
                    before = lax.rem(number + stages - 1, stages)
                    pl.when(number > index * steps)(lambda: plgpu.barrier_arrive(empty.at[before]))
                    return statistics

                statistics = lax.fori_loop(index * steps, (index + 1) * steps, step, unmeasured())
                plgpu.barrier_arrive(turn.at[1 - group])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem((index + 1) * steps - 1, stages)])
                return acc[...], statistics

            return pl.run_scoped(scope, plgpu.ACC((ROWS, tuning.outputs), jnp.float32))

        def unmeasured() -> Any:
            if epilogue.eps is None:
                return None
            zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
            return zeros, zeros

        def measured(block: Any, statistics: Any) -> Any:
            """With a block's sums and sums of squares."""
            if statistics is None:
                return None
            wide, (total, squares) = _load(block, plgpu.Layout.WGMMA), statistics
            return total + wide.sum(axis=1), squares + (wide * wide).sum(axis=1)

        def tile(number: jax.Array, _: None) -> None:
            index = COMPUTE * number + group
            row, output = work.place(index)
            if residual_ref is not None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for part in range(tuning.outputs // tuning.stored):
                    at = pl.ds(row, ROWS), pl.ds(output + part * tuning.stored, tuning.stored)
                    plgpu.copy_gmem_to_smem(residual_ref.at[at], out_smem.at[group, part], added.at[group])
            pl.when(index > 0)(lambda: plgpu.barrier_wait(turn.at[group]))
            products, statistics = multiply(index)
            if epilogue.eps is not None:
                columns, (total, squares) = steps * BLOCK_IN, statistics
                statistics = row_scales(total, squares, columns, epilogue.eps, epilogue.centres)
            if residual_ref is not None:
                plgpu.barrier_wait(added.at[group])
            for first in range(0, tuning.outputs, tuning.stored):
                value = products[:, first : first + tuning.stored]
                stored = functools.partial(store, value, statistics, row, output, first)
                if work.outputs % tuning.outputs:  # the last tile reaches beyond the last output
                    pl.when(output + first < work.outputs)(stored)
                else:
                    stored()

        def store(value: jax.Array, statistics: Any, row: jax.Array, output: jax.Array, first: int) -> None:
            at = pl.ds(output + first, tuning.stored)
            sums = None if sums_ref is None else _load(sums_ref.at[at], optimized=False)
            value = epilogue(value, statistics, _load(bias_ref.at[at], optimized=False), sums)
            if residual_ref is None:
                staged = out_smem.at[group, 0]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            else:
                staged = out_smem.at[group, first // tuning.stored]
                value += _load(staged, plgpu.Layout.WGMMA)
            staged[...] = value.astype(out_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, out_ref.at[pl.ds(row, ROWS), at])

        lax.fori_loop(0, lax.div(work.mine() + COMPUTE - 1 - group, COMPUTE), tile, None)
        plgpu.wait_smem_to_gmem(0)
