"""What the devices of a mesh owe each other inside the decoder's `shard_map`; a single one owes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lmdeploy_jax.parallel.mesh import model_axes, model_devices

ONE_SHOT_BYTES = 256 << 10  # up to which XLA sums over GPUs in one exchange, whose time is that of the launch


class Collectives(Protocol):
    """What a decoder needs of the other devices."""

    def all_reduce(self, partial: Array, dtype: DTypeLike) -> Array:
        """The sum over devices of [T, E] in `dtype`, or of parts, f32 [S, T, E], that are summed over S."""

    def take_rows(self, table: Array, index: Array) -> Array:
        """Rows [T, E] of a table [V, E] that is cut by rows, by their numbers i32 [T] in the whole table."""

    def own_rows(self, table: Array, index: Array) -> Array:
        """The same, zeros for rows that other devices have: their sum over devices is `take_rows`."""

    def own_experts(self, experts: Array, count: int) -> Array:
        """Experts' numbers among the `count` of this device, which are its experts; others become `count`."""


@dataclass(frozen=True)
class SingleDevice:
    """The `Collectives` of one device."""

    def all_reduce(self, partial: Array, dtype: DTypeLike) -> Array:
        return partial

    def take_rows(self, table: Array, index: Array) -> Array:
        return table.at[index].get(mode="clip")

    own_rows = take_rows

    def own_experts(self, experts: Array, count: int) -> Array:
        return experts


@dataclass(frozen=True)
class TensorParallel:
    """The `Collectives` of the devices along such mesh axes; experts are dealt out over the second, if any.

    Tokens go nowhere: every device has all of them, does its own experts' share, and the sum adds it up.
    """

    axis: str | tuple[str, ...] = "tp"

    def all_reduce(self, partial: Array, dtype: DTypeLike) -> Array:
        """Small parts travel as they are, in f32: fewer launches. Larger ones are added and rounded first, as
        a product of XLA's rounds its own.
        """
        if partial.ndim == 3 and partial.nbytes > ONE_SHOT_BYTES:
            partial = jnp.sum(partial, axis=0).astype(dtype)
        return lax.psum(partial, self.axis)

    def take_rows(self, table: Array, index: Array) -> Array:
        return lax.psum(self.own_rows(table, index), self.axis)

    def own_rows(self, table: Array, index: Array) -> Array:
        local = index - lax.axis_index(self.axis) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        return jnp.where(mine[:, None], table.at[local].get(mode="clip"), 0)

    def own_experts(self, experts: Array, count: int) -> Array:
        if isinstance(self.axis, str):
            return experts
        local = experts - lax.axis_index(self.axis[1]) * count
        return jnp.where((local >= 0) & (local < count), local, count)


def collectives(mesh: Mesh | None) -> Collectives:
    """Those of a mesh; without one, of a single device."""
    return TensorParallel(model_axes(mesh)) if model_devices(mesh) > 1 else SingleDevice()
