"""GPTQ (Frantar et al., 2022): columns are rounded one after another, and each one's error is made good by
those that follow, as far as the inputs of calibration go together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32, Int32

from lmdeploy_jax.lite.layouts import GptqLayout
from lmdeploy_jax.lite.rounding import Grid, Rounded, nearest, round_groups
from lmdeploy_jax.lite.weights import LayerWeights, Matrix

BLOCK = 128  # columns whose errors go to those behind the block in one product


@dataclass(frozen=True)
class Gptq:
    """`group`: columns that share a scale, which is that of the original weights. `damping`: what is added to
    the diagonal of the Hessian, as a share of its mean. `act_order`: columns go by falling diagonal.
    """

    group: int = 128
    damping: float = 0.01
    act_order: bool = False

    name = "auto_gptq"
    calibrates = True
    feeds_back = True

    @property
    def layout(self) -> GptqLayout:
        return GptqLayout(self.group)

    @property
    def _grid(self) -> Grid:
        return Grid(self.group, symmetric=True)

    def prepare(self, weights: LayerWeights) -> None:
        pass

    def round(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        if matrix.inputs is None:
            return self.nearest(matrix, plain)
        gram = matrix.inputs.gram
        columns = matrix.weight.shape[1]
        order = jnp.argsort(-jnp.diag(gram)) if self.act_order else jnp.arange(columns)
        return round_columns(matrix.weight, gram, order, self._grid, self.damping)

    def nearest(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        return round_groups(matrix.weight, self._grid)


@partial(jax.jit, static_argnums=(3, 4))
def round_columns(
    weight: Float32[Array, "N K"],
    gram: Float32[Array, "K K"],
    order: Int32[Array, "K"],
    grid: Grid,
    damping: float,
) -> Rounded:
    """The columns of a weight, in `order`, to 4 bits."""
    columns = weight.shape[1]
    unused = jnp.diag(gram) == 0  # nothing tells how such a column goes with others: it is rounded as it is
    scales, zeros = grid.fit(grid.grouped(weight))
    by_column = jnp.arange(columns)[order] // grid.group
    upper = _inverse_factor(gram[order][:, order], unused[order], damping)
    block = next(size for size in range(min(BLOCK, columns), 0, -1) if columns % size == 0)

    def step(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, codes = state
        first = i * block
        part = lax.dynamic_slice_in_dim(left, first, block, 1)
        groups = lax.dynamic_slice_in_dim(by_column, first, block)
        square = lax.dynamic_slice(upper, (first, first), (block, block))
        made, errors = _round_block(part, square, scales[:, groups], zeros[:, groups])
        behind = jnp.arange(columns) >= first + block
        rows = lax.dynamic_slice_in_dim(upper, first, block, 0)
        left = left - jnp.dot(errors, jnp.where(behind, rows, 0), precision=lax.Precision.HIGHEST)
        return left, lax.dynamic_update_slice_in_dim(codes, made, first, 1)

    start = weight[:, order], jnp.zeros(weight.shape, jnp.uint8)
    _, codes = lax.fori_loop(0, columns // block, step, start)
    return Rounded(jnp.zeros_like(codes).at[:, order].set(codes), scales, zeros)


def _round_block(part: Array, upper: Array, scales: Array, zeros: Array) -> tuple[Array, Array]:
    """Codes [N, B] of a block of columns, and the errors [N, B] that are left to those behind it."""

    def step(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        left, codes, errors = state
        column, scale, zero = (lax.dynamic_index_in_dim(each, j, 1, False) for each in (left, scales, zeros))
        code = nearest(column, scale, zero)
        row = lax.dynamic_index_in_dim(upper, j, 0, False)
        error = (column - (code - zero) * scale) / row[j]
        left = left - error[:, None] * jnp.where(jnp.arange(len(row)) > j, row, 0)
        return left, codes.at[:, j].set(code.astype(jnp.uint8)), errors.at[:, j].set(error)

    start = part, jnp.zeros(part.shape, jnp.uint8), jnp.zeros_like(part)
    _, codes, errors = lax.fori_loop(0, part.shape[1], step, start)
    return codes, errors


def _inverse_factor(gram: Array, unused: Array, damping: float) -> Float32[Array, "K K"]:
    """The upper triangle U with Uᵀ U the inverse of the damped Hessian.

    Of the Hessian with its order reversed, the Cholesky factor reversed again is an upper R with R Rᵀ = H,
    and U is the inverse of R: the inverse of H itself, which float32 holds badly, is never made.
    """
    mean = jnp.diag(gram).mean()
    diagonal = jnp.where(unused, jnp.where(mean > 0, mean, 1), damping * mean)  # 0: nothing is used
    hessian = gram + jnp.diag(diagonal)
    factor = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(gram)), lower=False)
