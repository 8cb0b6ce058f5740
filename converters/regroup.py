"""Converted weights for more tensor parallelism than they were saved for.

A converted checkpoint holds each KV head once and no padding. Where `tp` exceeds the KV heads, or does not
divide the vocabulary, the few weights concerned are read whole and rearranged on the devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lmdeploy_jax.converters import orbax

Specs = Mapping[str, jax.ShapeDtypeStruct]


def load_converted(folder: str | os.PathLike[str], saved: Specs, wanted: Specs) -> dict[str, Array]:
    """The weights of a converted checkpoint, of shapes `saved` in it, as `wanted` asks for them.

    Raises CheckpointError as `orbax.load` does.
    """
    arrays = orbax.load(folder, {name: _read_as(saved[name], spec) for name, spec in wanted.items()})
    for name, spec in wanted.items():
        if saved[name].shape != spec.shape:
            rearrange = jax.jit(_rearrangement(name, spec.shape), out_shardings=spec.sharding)
            arrays[name] = rearrange(arrays[name])
    return arrays


def _read_as(saved: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if saved.shape == wanted.shape:
        return wanted
    assert isinstance(wanted.sharding, NamedSharding)  # shapes differ by tp alone, so there is a mesh
    whole = NamedSharding(wanted.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(saved.shape, wanted.dtype, sharding=whole)


def _rearrangement(name: str, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    if ".attention.qkv." in name:
        return lambda x: repeat_kv_heads(x, shape[0])
    if ".attention.o." in name:
        return lambda x: x.reshape(shape)
    return lambda x: jnp.pad(x, [(0, shape[0] - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def repeat_kv_heads(qkv: Array, kv_heads: int) -> Array:
    """[KH, G + 2, D, ...] -> [kv_heads, G' + 2, D, ...]: copies of each k and v head share its queries."""
    count, width, *rest = qkv.shape
    copies = kv_heads // count
    queries = qkv[:, :-2].reshape(kv_heads, (width - 2) // copies, *rest)
    return jnp.concatenate([queries, jnp.repeat(qkv[:, -2:], copies, axis=0)], axis=1)
