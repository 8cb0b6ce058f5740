"""What calibration keeps of the inputs of a linear layer, whichever algorithm reads it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32

from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups, tile_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputStatistics:
    """Sums over the tokens that a linear layer was given, of each of its K input channels, in float32. Those
    of a mixture's experts have an axis of experts in front.
    """

    count: Float32[Array, "*X"]
    """Tokens."""
    low: Float32[Array, "*X K"]
    high: Float32[Array, "*X K"]
    total: Float32[Array, "*X K"]
    absolute: Float32[Array, "*X K"]
    """Of |x|."""
    gram: Float32[Array, "*X K K"]
    """Of x xᵀ: from it comes the squared error of a product with any change of the weight."""

    def joined(self, other: InputStatistics) -> InputStatistics:
        """Of the tokens of both."""
        return InputStatistics(
            self.count + other.count,
            jnp.minimum(self.low, other.low),
            jnp.maximum(self.high, other.high),
            self.total + other.total,
            self.absolute + other.absolute,
            self.gram + other.gram,
        )

    def of_expert(self, expert: int | None) -> InputStatistics:
        """One expert's; None: these, of a layer without experts."""
        return self if expert is None else jax.tree.map(lambda array: array[expert], self)

    @jax.jit
    def scaled(self, scales: Float32[Array, K]) -> InputStatistics:
        """Of the same inputs, divided by `scales`, which are positive."""
        by = 1 / scales
        sums = (self.low * by, self.high * by, self.total * by, self.absolute * by)
        return InputStatistics(self.count, *sums, self.gram * by[:, None] * by)

    @property
    def absmax(self) -> Float32[Array, "*X K"]:
        """0 where there was no token."""
        return jnp.maximum(jnp.maximum(self.high, -self.low), 0)

    @property
    def absmean(self) -> Float32[Array, "*X K"]:
        """0 where there was no token."""
        return self.absolute / jnp.maximum(self.count, 1)[..., None]


def observe(x: Float[Array, "T K"]) -> InputStatistics:
    """Of some tokens' inputs."""
    wide = x.astype(jnp.float32)
    gram = jnp.einsum("tj,tk->jk", x, x, preferred_element_type=jnp.float32)
    extremes = wide.min(0), wide.max(0)
    return InputStatistics(jnp.float32(len(x)), *extremes, wide.sum(0), jnp.abs(wide).sum(0), gram)


def observe_experts(rows: Float[Array, "M K"], groups: RowGroups, experts: int) -> InputStatistics:
    """Of rows sorted by expert, each one's own."""
    (count, columns), inner = rows.shape, (experts, rows.shape[1])
    height = tile_rows(count, experts, "xla")
    padded = jnp.pad(rows, ((0, height), (0, 0)))

    def add(i: Array, found: InputStatistics) -> InputStatistics:
        expert, first, used = groups.tiles[i]
        tile = lax.dynamic_slice(padded, (first, 0), (height, columns))
        inside = (jnp.arange(height) < used)[:, None]
        wide = jnp.where(inside, tile, 0).astype(jnp.float32)
        far = jnp.where(inside, wide, jnp.inf)
        return InputStatistics(
            found.count.at[expert].add(used),
            found.low.at[expert].min(far.min(0)),
            found.high.at[expert].max(jnp.where(inside, wide, -jnp.inf).max(0)),
            found.total.at[expert].add(wide.sum(0)),
            found.absolute.at[expert].add(jnp.abs(wide).sum(0)),
            found.gram.at[expert].add(wide.T @ wide),
        )

    zeros, far = jnp.zeros(inner, jnp.float32), jnp.full(inner, jnp.inf, jnp.float32)
    none = jnp.zeros(experts, jnp.float32)
    start = InputStatistics(none, far, -far, zeros, zeros, jnp.zeros((*inner, columns), jnp.float32))
    return lax.fori_loop(0, len(groups.tiles), add, start)
