"""Converted weights for more tensor parallelism than they were saved for.

A converted checkpoint holds each KV head once and no padding. Where `tp` exceeds the KV heads, or does not
divide the vocabulary, the few weights concerned are read whole and rearranged on the devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lmdeploy_jax.converters import orbax
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.formats import WeightFormat
from lmdeploy_jax.models.quantised import QuantArrays, dequantise

GROUPED = (".scales", ".zeros")  # of quantised weights: their first axis counts groups of columns
Specs = Mapping[str, jax.ShapeDtypeStruct]


def load_converted(folder: str | os.PathLike[str], saved: Specs, specs: Specs) -> dict[str, Array]:
    """The weights of a converted checkpoint, of shapes `saved` in it, as `specs` asks for them.

    Raises CheckpointError as `orbax.load` does.
    """
    arrays = orbax.load(folder, {name: _read_as(saved[name], spec) for name, spec in specs.items()})
    for name, spec in specs.items():
        if saved[name].shape != spec.shape:
            rearrange = jax.jit(_rearrangement(name, spec.shape), out_shardings=spec.sharding)
            arrays[name] = rearrange(arrays[name])
    return arrays


def _read_as(saved: jax.ShapeDtypeStruct, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if saved.shape == spec.shape:
        return spec
    assert isinstance(spec.sharding, NamedSharding)  # shapes differ by tp alone, so there is a mesh
    replicated = NamedSharding(spec.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(saved.shape, spec.dtype, sharding=replicated)


def _rearrangement(name: str, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    if name.endswith(GROUPED):
        return jax.vmap(_rearrangement(name.rpartition(".")[0], shape[1:]))
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


def check_cuts(folder: str | os.PathLike[str], formats: Mapping[str, WeightFormat], wanted: Specs) -> None:
    """Raises CheckpointError where devices would share words or groups of columns, as they were packed."""
    for name, held in formats.items():
        spec = wanted[f"{name}.values"]
        assert spec.sharding is not None
        share = spec.sharding.shard_shape(spec.shape)[-1]
        unit = held.tile // held.per_value if held.per_value > 1 else 1
        whole = share == spec.shape[-1]
        if not whole and (share % unit or (held.groups > 1 and share * held.per_value % held.group)):
            raise CheckpointError(
                f"{folder}: {name} was converted in groups of {held.group} columns, which tp would cut: a "
                f"device has {share * held.per_value}; load the original checkpoint, or with another tp"
            )


def widened(
    arrays: Mapping[str, Array], formats: Mapping[str, WeightFormat], wanted: Specs
) -> dict[str, Array]:
    """The weights with the quantised ones among them in the dtypes of `wanted`, one after the other."""
    found = dict(arrays)
    for name, held in formats.items():
        parts = QuantArrays(*(found.pop(f"{name}.{role}", None) for role in QuantArrays._fields))  # type: ignore[arg-type]
        spec = wanted[name]
        found[name] = jax.device_put(_widen(held, parts, spec.dtype, spec.shape), spec.sharding)
    return found


@partial(jax.jit, static_argnums=(0, 2, 3))
def _widen(held: WeightFormat, parts: QuantArrays, dtype: jnp.dtype, shape: tuple[int, ...]) -> Array:
    return dequantise(held, parts, dtype).reshape(shape)
