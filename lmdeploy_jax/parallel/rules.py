"""Logical axis names of weights -> axes of the device mesh."""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.parallel.mesh import axis_size

Axes = tuple[str | None, ...]

RULES: Mapping[str, str | None] = {
    "vocab": "tp",
    "embed": None,
    "kv_heads": "tp",
    "heads": "tp",
    "mlp": "tp",
    "experts": None,
}
"""Every logical axis that a weight may name; None: replicated."""


def partition_spec(name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh) -> PartitionSpec:
    """The spec of the weight `name` whose axes are called `axes`.

    Raises ConfigError where a mesh axis would cut an axis unevenly, ValueError where a mesh axis is used
    twice or a logical axis has no rule.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(axes)} axis names {axes} for shape {shape}")
    used = [_mesh_axis(name, axis) for axis in axes]
    cut = [axis for axis in used if axis is not None]
    if len(set(cut)) != len(cut):
        raise ValueError(f"{name}: logical axes {axes} use a mesh axis twice: {used}")
    for size, axis, label in zip(shape, used, axes, strict=True):
        count = axis_size(mesh, axis) if axis is not None else 1
        if size % count:
            raise ConfigError(
                f"{name}: its {label} axis of {size} cannot be cut in {count} equal parts; "
                f"choose a {axis} that divides it"
            )
    return PartitionSpec(*used)


def sharding(name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh) -> NamedSharding:
    """As `partition_spec`, on the mesh."""
    return NamedSharding(mesh, partition_spec(name, shape, axes, mesh))


def _mesh_axis(name: str, axis: str | None) -> str | None:
    if axis is not None and axis not in RULES:
        raise ValueError(f"{name}: logical axis {axis!r} has no rule; known: {', '.join(RULES)}")
    return None if axis is None else RULES[axis]
