"""A layer's weights while they are quantised: as matrices, and with scales folded into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from lmdeploy_jax.converters.keytable import Leaf
from lmdeploy_jax.converters.layouts import Assembly
from lmdeploy_jax.lite.layer import Found, LayerModel
from lmdeploy_jax.lite.statistics import InputStatistics
from lmdeploy_jax.models.mixture import ExpertLinear

WEIGHT = ".weight"


@dataclass(frozen=True)
class Matrix:
    """A weight that is rounded as one: a linear layer's, or that of one of a mixture's experts."""

    module: str
    """The linear layer within its layer."""
    expert: int | None
    weight: Float32[Array, "N K"]
    inputs: InputStatistics | None
    """None: there was no calibration, or no token came by."""
    tensors: Mapping[str, np.ndarray]
    """Name in the checkpoint -> which of the N rows are the tensor's, in its order."""

    @property
    def name(self) -> str:
        return self.module if self.expert is None else f"{self.module}.{self.expert}"


class LayerWeights:
    """The weights of one layer as read, what calibration has found, and the scales folded in so far.

    plain: the dtype of tensors that are not quantised; None: as the checkpoint has them.
    """

    def __init__(self, model: LayerModel, leaves: Mapping[str, Leaf], plain: np.dtype | None = None) -> None:
        self.model, self.leaves = model, leaves
        self.arrays: dict[str, Array] = {
            name: jnp.asarray(leaf.read((), np.dtype(model.dtypes[name]))) for name, leaf in leaves.items()
        }
        """By name within the layer, as they are read: what is folded is not in them."""
        self.found: Found = {}
        self._plain = plain
        self._put: dict[str, Array] = {}
        self._columns: dict[str, Array] = {}
        self._rows: dict[str, Array] = {}

    def scale_columns(self, name: str, scales: Float32[Array, "*X K"]) -> None:
        """The weight `name` will be given inputs that are divided by `scales`."""
        self._columns[name] = self._columns.get(name, 1.0) * scales

    def scale_rows(self, name: str, scales: Float32[Array, "*out"]) -> None:
        """What the leaf `name`, a weight or a vector, gives is multiplied by `scales`."""
        self._rows[name] = self._rows.get(name, 1.0) * scales

    def put(self, name: str, array: Float32[Array, "..."]) -> None:
        """The leaf `name` is another from now on."""
        self._put[name] = array

    def stored(self, name: str, array: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """Rounded as the checkpoint's tensor of the leaf `name` will hold it."""
        leaf = self.leaves[name]
        dtype = leaf.reader.info(next(iter(leaf.names.values()))).dtype
        return array.astype(self._plain or dtype).astype(jnp.float32)

    def wide(self, name: str) -> Float32[Array, ...]:
        """A leaf in float32, with all that is folded in, in its own shape."""
        array = self._put.get(name, self.arrays[name])
        return _folded(array, self._rows.get(name), self._columns.get(name), self._inner(name))

    def changed(self) -> set[str]:
        """The leaves into which something is folded."""
        return self._columns.keys() | self._rows.keys() | self._put.keys()

    def matrices(self, module: str, *, folded: bool = True) -> Iterator[Matrix]:
        """The matrices of a linear layer, one, or as many as there are experts, with what is folded in or
        without.
        """
        linear, name = self.model.linears[module], module + WEIGHT
        found, experts = self.found.get(module), isinstance(linear, ExpertLinear)
        weight = self.wide(name) if folded else _folded(self.arrays[name], None, None, self._inner(name))
        weight = weight.reshape(weight.shape[0] if experts else 1, -1, prod(weight.shape[linear.out_axes :]))
        rows = tensor_rows(self.leaves[name].assembly)
        for number in range(len(weight)):
            expert = number if experts else None
            seen = None if found is None else found.of_expert(expert)
            if seen is not None and not seen.count:
                seen = None
            if folded and seen is not None and name in self._columns:
                columns = self._columns[name]
                seen = seen.scaled(columns[number] if columns.ndim > 1 else columns)
            first = number * weight.shape[1]
            own = {
                self.leaves[name].names[part]: lines - first
                for part, lines in rows.items()
                if first <= lines[0] < first + weight.shape[1]
            }
            yield Matrix(module, expert, weight[number], seen, own)

    def _inner(self, name: str) -> int:
        linear = self.model.linears.get(name.removesuffix(WEIGHT))
        return 1 if linear is None else self.arrays[name].ndim - linear.out_axes

    def source_tensors(self, name: str) -> dict[str, np.ndarray]:
        """A leaf as the tensors that it came of, in float32."""
        leaf, array = self.leaves[name], np.asarray(self.wide(name))
        axes = leaf.assembly.row_axes
        flat, found = array.reshape(-1, *array.shape[axes:]), {}
        for part, lines in tensor_rows(leaf.assembly).items():
            found[leaf.names[part]] = flat[lines].reshape(leaf.assembly.sources[part])
        return found


@partial(jax.jit, static_argnums=3)
def _folded(array: Array, rows: Array | None, columns: Array | None, inner: int) -> Float32[Array, "..."]:
    """A leaf whose last `inner` axes are columns, its rows and columns scaled."""
    array = array.astype(jnp.float32)
    if rows is not None:
        array = array * rows.reshape(*rows.shape, *(1,) * (array.ndim - rows.ndim))
    if columns is not None:
        outer = array.ndim - inner
        shape = (*columns.shape[:-1], *(1,) * (outer - columns.ndim + 1), *array.shape[outer:])
        array = array * columns.reshape(shape)
    return array


def tensor_rows(assembly: Assembly) -> dict[str, np.ndarray]:
    """For each part of a weight, the weight's rows that are the part's, in its order."""
    found = {part: np.full(shape[0] if shape else 1, -1) for part, shape in assembly.sources.items()}
    done = 0
    for run in assembly.runs:
        if run.part is not None:
            found[run.part][run.start : run.stop : run.step] = np.arange(done, done + run.count)
        done += run.count
    return found


def is_quantisable(model: LayerModel, leaves: Mapping[str, Leaf], module: str) -> bool:
    """Whether a linear layer's matrices are whole tensors of a checkpoint, which may be replaced."""
    leaf: Any = leaves[module + WEIGHT]
    whole = leaf.assembly.row_axes == model.linears[module].out_axes
    return whole and all(name.endswith(WEIGHT) for name in leaf.names.values())
