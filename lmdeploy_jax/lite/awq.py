"""AWQ (Lin et al., 2023): channels are scaled by how large their inputs are, and groups clipped, before
weights are rounded to 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32

from lmdeploy_jax.lite.layouts import AwqLayout
from lmdeploy_jax.lite.rounding import Grid, Rounded, nearest, round_groups
from lmdeploy_jax.lite.scaling import importance, scales_at, scalings
from lmdeploy_jax.lite.weights import LayerWeights, Matrix

RATIOS = 20  # of the grid that is searched
SHARES = 10  # to which the largest weight of a group may be clipped, down to about half
# A clipped query or key moves every score, which AWQ's error of a product does not see.
NOT_CLIPPED = ("attention.qkv", "attention.q", "attention.q_b")
FIXED_RATIO = 0.5


@dataclass(frozen=True)
class Awq:
    """`group`: columns that share a scale. Without `search_scale` the ratio is a half."""

    group: int = 128
    symmetric: bool = False
    search_scale: bool = True
    clip: bool = True

    name = "auto_awq"
    calibrates = True
    feeds_back = False

    @property
    def layout(self) -> AwqLayout:
        return AwqLayout(self.group)

    @property
    def _grid(self) -> Grid:
        return Grid(self.group, self.symmetric)

    def prepare(self, weights: LayerWeights) -> None:
        if weights.found:
            fold_all(weights, self._scales)

    def _scales(self, matrices: Sequence[Matrix]) -> Float32[Array, "K"]:
        channels = importance(matrices, self.group)
        if not self.search_scale:
            return scales_at(jnp.float32(FIXED_RATIO), absmax(matrices), channels)
        return search(matrices, channels, self._grid)

    def round(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        if not self.clip or matrix.inputs is None or matrix.module in NOT_CLIPPED:
            return self.nearest(matrix, plain)
        return round_groups(clipped(matrix.weight, matrix.inputs.gram, self._grid), self._grid)

    def nearest(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        return round_groups(matrix.weight, self._grid)


def fold_all(weights: LayerWeights, choose: Callable[[Sequence[Matrix]], Float32[Array, "K"]]) -> None:
    """Scales all that can be scaled in a layer as `choose` says of the matrices that share their inputs."""
    for scaling in scalings(weights.model.model, weights.model.config):
        matrices = [matrix for reader in scaling.readers for matrix in weights.matrices(reader)]
        if scaling.by_expert:
            scales = jnp.stack([_chosen([matrix], choose) for matrix in matrices])
        else:
            scales = _chosen(matrices, choose)
        scaling.fold(weights, scales)


def _chosen(
    matrices: Sequence[Matrix], choose: Callable[[Sequence[Matrix]], Float32[Array, "K"]]
) -> Float32[Array, "K"]:
    """1 where no token came by."""
    seen = any(matrix.inputs is not None for matrix in matrices)
    return choose(matrices) if seen else jnp.ones(matrices[0].weight.shape[1])


def absmax(matrices: Sequence[Matrix]) -> Float32[Array, "K"]:
    """Of the inputs that matrices share."""
    return jnp.stack([matrix.inputs.absmax for matrix in matrices if matrix.inputs is not None]).max(0)


def absmean(matrices: Sequence[Matrix]) -> Float32[Array, "K"]:
    """Of the inputs that matrices share."""
    seen = [matrix.inputs for matrix in matrices if matrix.inputs is not None]
    totals = jnp.stack([inputs.absolute for inputs in seen]).sum(0)
    return totals / jnp.stack([inputs.count for inputs in seen]).sum()


def search(matrices: Sequence[Matrix], channels: Float32[Array, "K"], grid: Grid) -> Float32[Array, "K"]:
    """The scales of the ratio, or none at all, by which the products' squared error is the least."""
    candidates = _candidates(absmean(matrices), channels)
    losses = sum(
        _losses(matrix.weight, matrix.inputs.gram, candidates, grid)
        for matrix in matrices
        if matrix.inputs is not None
    )
    return candidates[jnp.argmin(jnp.asarray(losses))]


@jax.jit
def _candidates(inputs: Float32[Array, "K"], channels: Float32[Array, "K"]) -> Float32[Array, "C K"]:
    ratios = jnp.arange(RATIOS, dtype=jnp.float32) / RATIOS
    found = jax.vmap(scales_at, (0, None, None))(ratios, inputs, channels)
    return jnp.concatenate([jnp.ones_like(inputs)[None], found])


@partial(jax.jit, static_argnums=3)
def _losses(
    weight: Float32[Array, "N K"], gram: Float32[Array, "K K"], candidates: Float32[Array, "C K"], grid: Grid
) -> Float32[Array, "C"]:
    def loss(scales: Array) -> Array:
        difference = round_groups(weight * scales, grid).dense() / scales - weight
        return jnp.vdot(difference @ gram, difference)

    return lax.map(loss, candidates)


@partial(jax.jit, static_argnums=2)
def clipped(weight: Float32[Array, "N K"], gram: Float32[Array, "K K"], grid: Grid) -> Float32[Array, "N K"]:
    """Each group of a row within the share of its largest by which its part of the product errs least."""
    grouped = grid.grouped(weight)
    count, size = grouped.shape[1:]
    blocks = gram.reshape(count, size, count, size)[jnp.arange(count), :, jnp.arange(count)]
    most = jnp.abs(grouped).max(-1, keepdims=True)

    def error(share: Array) -> Array:
        within = jnp.clip(grouped, -most * share, most * share)
        scales, zeros = (each[..., None] for each in grid.fit(within))
        difference = (nearest(within, scales, zeros) - zeros) * scales - grouped
        return jnp.einsum("nga,gab,ngb->ng", difference, blocks, difference)

    shares = 1 - jnp.arange(SHARES, dtype=jnp.float32) / (2 * SHARES)
    best = shares[jnp.argmin(lax.map(error, shares), axis=0)][..., None]
    return jnp.clip(grouped, -most * best, most * best).reshape(weight.shape)
