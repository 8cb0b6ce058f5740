"""Logical axis names of weights -> axes of the device mesh."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.parallel.mesh import axis_size, model_axes

Axes = tuple[str | None, ...]
MeshAxes = str | tuple[str, ...] | None

ALL = "all"
RULES: Mapping[str, str | None] = {
    "vocab": ALL,
    "embed": None,
    "kv_heads": ALL,
    "heads": ALL,
    "mlp": ALL,
    "experts": "ep",
    "expert_mlp": "tp",
}
"""Every logical axis that a weight may name; ALL: over all devices that share the model; None: replicated."""


def partition_spec(name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh) -> PartitionSpec:
    """The spec of the weight `name` whose axes are called `axes`.

    Raises ConfigError where a mesh axis would cut an axis unevenly, ValueError where a mesh axis is used
    twice or a logical axis has no rule.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(axes)} axis names {axes} for shape {shape}")
    used = [_mesh_axes(name, axis, mesh) for axis in axes]
    cut = [axis for each in used for axis in _as_tuple(each)]
    if len(set(cut)) != len(cut):
        raise ValueError(f"{name}: logical axes {axes} use a mesh axis twice: {used}")
    for size, each, label in zip(shape, used, axes, strict=True):
        count = prod(axis_size(mesh, axis) for axis in _as_tuple(each))
        if size % count:
            raise ConfigError(
                f"{name}: its {label} axis of {size} cannot be cut in {count} equal parts; "
                f"choose a {_as_tuple(each)[0]} that divides it"
            )
    return PartitionSpec(*used)


def sharding(name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh) -> NamedSharding:
    """As `partition_spec`, on the mesh."""
    return NamedSharding(mesh, partition_spec(name, shape, axes, mesh))


def _mesh_axes(name: str, axis: str | None, mesh: Mesh) -> MeshAxes:
    if axis is not None and axis not in RULES:
        raise ValueError(f"{name}: logical axis {axis!r} has no rule; known: {', '.join(RULES)}")
    rule = None if axis is None else RULES[axis]
    if rule == ALL:
        return model_axes(mesh)
    return None if rule == "ep" and axis_size(mesh, "ep") == 1 else rule


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
