"""Converted weights for more tensor parallelism than they were saved for.

A converted checkpoint holds each KV head once and no padding. Where `tp` exceeds the KV heads, or does not
divide the vocabulary, each device reads of the few weights concerned what its own part is made of. Quantised
ones, and all where Orbax itself must read them, are read whole and rearranged on the devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lmdeploy_jax.converters import orbax
from lmdeploy_jax.converters.slicing import Index, as_ranges
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.formats import WeightFormat
from lmdeploy_jax.models.quantised import QuantArrays, dequantise
from lmdeploy_jax.pallas_kernels.quant_gemm.words import pack_words, unpack_words

GROUPED = ("scales", "zeros")  # of quantised weights: their first axis counts groups of columns
Specs = Mapping[str, jax.ShapeDtypeStruct]
Formats = Mapping[str, WeightFormat]
Rearrange = Callable[[Array], Array]
Shape = tuple[int, ...]
Read = Callable[[Index], np.ndarray]


class Cut(NamedTuple):
    """A quantised weight as it was saved, and as devices hold it."""

    saved: WeightFormat
    held: WeightFormat


def load_converted(
    folder: str | os.PathLike[str],
    saved: Specs,
    specs: Specs,
    cuts: Mapping[str, Cut] = MappingProxyType({}),
) -> dict[str, Array]:
    """The weights of a converted checkpoint, of shapes `saved` in it, as `specs` asks for them.

    `cuts`: of quantised weights, how they were saved and how devices hold them.
    Raises CheckpointError as `orbax.load` does.
    """
    changes = {name: _changes(name, saved[name], spec, cuts) for name, spec in specs.items()}
    parts: dict[str, orbax.ReadPart] = {}
    if any(changes.values()) and orbax.is_plain(folder):
        plain = [name for name in specs if changes[name] and name.rpartition(".")[0] not in cuts]
        parts = {
            name: orbax.ReadPart(saved[name], _part(name, saved[name].shape, specs[name].shape))
            for name in plain
        }
        changes |= {name: [] for name in parts}
    read = {name: _replicated(saved[name], spec) if changes[name] else spec for name, spec in specs.items()}
    arrays = orbax.load(folder, read, parts=parts)
    for name, steps in changes.items():
        for step in steps:
            arrays[name] = jax.jit(step)(arrays[name])
        if steps:
            arrays[name] = jax.device_put(arrays[name], specs[name].sharding)
    return arrays


def _replicated(saved: jax.ShapeDtypeStruct, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    assert isinstance(spec.sharding, NamedSharding)  # arrays differ by tp alone, so there is a mesh
    replicated = NamedSharding(spec.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(saved.shape, spec.dtype, sharding=replicated)


def cuts_of(folder: str | os.PathLike[str], formats: Formats, saved: Specs, dense: Specs) -> dict[str, Cut]:
    """Each quantised weight's cut. `saved`: the arrays in the file; `dense`: the weights on the devices.

    Raises CheckpointError for a weight that devices cannot share.
    """
    cuts = {}
    for name, held in formats.items():
        values = saved[f"{name}.values"].shape
        columns, spec = values[-1] * held.per_value, dense[name]
        assert spec.sharding is not None
        share = prod(spec.sharding.shard_shape(spec.shape)[len(values) - 1 :])
        if held.columns and columns > share:
            raise CheckpointError(
                f"{folder}: {name} was converted with the columns of its groups apart (desc_act), which tp "
                "cannot cut; load the original checkpoint"
            )
        cuts[name] = Cut(held, held.cut(columns, columns // share))
    return cuts


def _changes(
    name: str, saved: jax.ShapeDtypeStruct, spec: jax.ShapeDtypeStruct, cuts: Mapping[str, Cut]
) -> list[Rearrange]:
    """What is done to an array, one after the other."""
    weight, _, role = name.rpartition(".")
    steps: list[Rearrange] = []
    shape = saved.shape
    if weight in cuts:
        old, new = cuts[weight]
        if role == "values" and old.per_value > 1 and old.tile != new.tile:
            steps.append(lambda x: pack_words(unpack_words(x, old.tile), new.tile))
        if role in GROUPED and old.groups != new.groups:
            steps.append(lambda x: jnp.repeat(x, old.group // new.group, axis=0)[: new.groups])
            shape = (new.groups, *shape[1:])
    if shape != spec.shape:
        steps.append(_rearrangement(name, spec.shape))
    return steps


def _rearrangement(name: str, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    if name.rpartition(".")[2] in GROUPED:
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


def _part(name: str, saved: Shape, shape: Shape) -> Callable[[Read, Index], np.ndarray]:
    """What `_rearrangement` does to the whole, for a slice that cuts no other axis than that of devices."""
    if ".attention.qkv." in name:
        return partial(_heads, saved, shape, 0, 2)
    if ".attention.o." in name:
        return partial(_heads, saved, shape, 1, 0)
    return partial(_padded, saved, shape)


def _heads(saved: Shape, shape: Shape, axis: int, kv: int, read: Read, index: Index) -> np.ndarray:
    """KV heads along `axis`, each with its share of a stored one's queries and the `kv` rows behind these."""
    copies, queries = shape[axis] // saved[axis], shape[axis + 1] - kv

    def head(number: int) -> np.ndarray:
        stored, share = divmod(number, copies)
        there = (*(slice(None),) * axis, slice(stored, stored + 1))
        rows = [slice(share * queries, (share + 1) * queries), slice(copies * queries, copies * queries + kv)]
        return np.concatenate([read((*there, each)) for each in rows if each.start < each.stop], axis + 1)

    return np.concatenate([head(number) for number in as_ranges(index, shape)[axis]], axis)


def _padded(saved: Shape, shape: Shape, read: Read, index: Index) -> np.ndarray:
    rows = as_ranges(index, shape)[0]
    first, last = (min(row, saved[0]) for row in (rows.start, rows.stop))
    stored = read((slice(first, last), *index[1:]))
    return np.pad(stored, [(0, len(rows) - len(stored))] + [(0, 0)] * (stored.ndim - 1))


def widened(
    arrays: Mapping[str, Array], formats: Mapping[str, WeightFormat], specs: Specs
) -> dict[str, Array]:
    """The weights with the quantised ones among them in the dtypes of `specs`, one after the other."""
    found = dict(arrays)
    for name, held in formats.items():
        parts = QuantArrays(*(found.pop(f"{name}.{role}", None) for role in QuantArrays._fields))  # type: ignore[arg-type]
        spec = specs[name]
        found[name] = jax.device_put(_widen(held, parts, spec.dtype, spec.shape), spec.sharding)
    return found


@partial(jax.jit, static_argnums=(0, 2, 3))
def _widen(held: WeightFormat, parts: QuantArrays, dtype: jnp.dtype, shape: tuple[int, ...]) -> Array:
    return dequantise(held, parts, dtype).reshape(shape)
