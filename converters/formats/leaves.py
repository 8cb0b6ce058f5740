"""Leaves of weights that stay quantised: values, scales and zeros of the model's rows, read by slice."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import jax
import numpy as np

from lmdeploy_jax.converters.device import Upload
from lmdeploy_jax.converters.formats.parts import as_slice
from lmdeploy_jax.converters.formats.reader import QuantReader
from lmdeploy_jax.converters.formats.repack import repacked
from lmdeploy_jax.converters.formats.scheme import pack_words
from lmdeploy_jax.converters.formats.tensor import QuantTensor
from lmdeploy_jax.converters.keytable import Leaf
from lmdeploy_jax.converters.layouts import Run, Shape
from lmdeploy_jax.converters.published import EMBEDDING
from lmdeploy_jax.converters.slicing import Index, Ranges, as_ranges, sizes
from lmdeploy_jax.models.formats import E8M0, FOUR_BITS, INT4, PER_WORD, WeightFormat

log = logging.getLogger("lmdeploy_jax")
EXPERTS = ".experts."
ROUTER = ".router.weight"  # decides between experts, and is small
VALUES, SCALES, ZEROS, ROW_SCALES, COLUMNS = "values", "scales", "zeros", "row_scales", "columns"
INPUT_SCALE = "input_scale"


def format_of(leaf: Leaf, reader: QuantReader, devices: int) -> WeightFormat | None:
    """How a weight can be held whose columns are dealt out over `devices`; None: in the model's own dtype.

    Parts of one weight may differ in groups, which are cut to what divides all of them: scales repeat. Where
    parts differ in elements, or in the columns of a group, there is no such form.
    """
    tensors = [reader.tensors.get(name) for name in leaf.names.values()]
    found = [tensor for tensor in tensors if tensor is not None]
    schemes = [tensor.scheme for tensor in found]
    if not found or len(found) < len(tensors) or len({scheme.element for scheme in schemes}) > 1:
        return None
    if not _groups_alike(found, devices):
        return None
    columns, element = found[0].shape[1], schemes[0].element
    if element in FOUR_BITS and columns // devices % PER_WORD:
        return None
    group = gcd(*(min(scheme.group, columns) for scheme in schemes))
    scales = {scheme.scale.name for scheme in schemes}
    held = WeightFormat(
        element,
        group,
        -(-columns // group),
        scales.pop() if len(scales) == 1 else "float32",
        zeros=_zeros_dtype(element) if any(scheme.has_zeros for scheme in schemes) else None,
        row_scales=any(scheme.has_row_scales for scheme in schemes),
        columns=found[0].g_idx is not None,
        activations=schemes[0].activations if len({scheme.activations for scheme in schemes}) == 1 else None,
        input_scale=all(scheme.input_scale is not None for scheme in schemes),
    )
    return held.cut(columns, devices)


def _groups_alike(tensors: Sequence[QuantTensor], devices: int) -> bool:
    """Whether the columns of a group lie side by side, or can be laid so in all tensors at once."""
    g_idx = tensors[0].g_idx
    if g_idx is None:
        return all(tensor.g_idx is None for tensor in tensors)
    alike = all(tensor.g_idx is not None and np.array_equal(tensor.g_idx, g_idx) for tensor in tensors)
    return alike and devices == 1 and (np.bincount(g_idx) == tensors[0].scheme.group).all()


def _zeros_dtype(element: str) -> str:
    """GPTQ's first version can store 16 and 256, one more than fits the elements."""
    return "uint8" if element == INT4 else "int16"


@dataclass(frozen=True)
class QuantLeaf:
    """One of a weight's arrays, made of the tensors of the weight's parts as it is read."""

    leaf: Leaf
    tensors: Mapping[str, QuantTensor]  # part -> tensor
    held: WeightFormat
    role: str

    @property
    def out(self) -> Shape:
        return self.leaf.shape[: self.leaf.assembly.row_axes]

    @property
    def shape(self) -> Shape:
        """See `WeightFormat`."""
        columns = prod(self.leaf.shape[self.leaf.assembly.row_axes :])
        if self.role == COLUMNS:
            return (columns,)
        if self.role == INPUT_SCALE:
            return (1,)
        if self.role == VALUES:
            return (*self.out, columns // self.held.per_value)
        return self.out if self.role == ROW_SCALES else (self.held.groups, *self.out)

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The slice `index` of the array."""
        ranges = as_ranges(index, self.shape)
        if self.role == COLUMNS:
            return _order(next(iter(self.tensors.values())))[ranges[0].start : ranges[0].stop].astype(dtype)
        if self.role == INPUT_SCALE:  # of parts, which read the same activations: the largest clips nothing
            scales = [tensor.scheme.input_scale or 0.0 for tensor in self.tensors.values()]
            return np.array([max(scales)], dtype)
        if self.role == VALUES:
            return self._rows(ranges[:-1], ranges[-1], dtype)
        if self.role == ROW_SCALES:
            return self._rows(ranges, range(1), dtype)[..., 0]
        return np.ascontiguousarray(np.moveaxis(self._rows(ranges[1:], ranges[0], dtype), -1, 0))

    def upload(self, index: Index) -> Upload | None:
        """`read(index)`, made by the device of the file's own words; None: they are none that it can read."""
        ranges = as_ranges(index, self.shape)
        if self.role != VALUES:
            return None
        runs, width = list(self.leaf.cut(ranges[:-1])), self.held.per_value
        columns = range(ranges[-1].start * width, ranges[-1].stop * width)
        first = next(iter(self.tensors.values()))
        order = None if first.g_idx is None else _order(first)
        tile, shape = self.held.tile, sizes(ranges[:-1])
        return repacked(self.tensors, _hulls(runs), runs, columns, order, tile=tile, shape=shape)

    def _rows(self, rows: Ranges, along: range, dtype: np.dtype) -> np.ndarray:
        """[*rows, along]; each part's tensor is decoded once, from the first of its rows to the last."""
        runs = list(self.leaf.cut(rows))
        out = np.zeros((sum(run.count for run in runs), len(along)), dtype)
        hulls = _hulls(runs)
        blocks = {part: self._block(self.tensors[part], hull, along, dtype) for part, hull in hulls.items()}
        done = 0
        for run in runs:
            if run.part is not None:
                first = hulls[run.part].start
                out[done : done + run.count] = blocks[run.part][
                    run.start - first : run.stop - first : run.step
                ]
            done += run.count
        return out.reshape(*sizes(rows), len(along))

    def _block(self, tensor: QuantTensor, rows: range, along: range, dtype: np.dtype) -> np.ndarray:
        """[n, len(along)] of one tensor's rows."""
        if self.role == VALUES:
            width = self.held.per_value
            columns = range(along.start * width, along.stop * width)
            if tensor.g_idx is None:
                elements = tensor.elements(rows, columns)
            else:
                elements = tensor.elements(rows, range(tensor.shape[1]))[:, _order(tensor)[as_slice(columns)]]
            return elements if width == 1 else pack_words(elements, self.held.tile)
        if self.role == ROW_SCALES:
            scales = tensor.row_scales(rows)
            return np.ones((len(rows), 1), dtype) if scales is None else scales[:, None]
        groups = np.arange(along.start, along.stop) * self.held.group // tensor.scheme.group
        if self.role == ZEROS:
            zeros = tensor.zeros(rows)
            absent = 8 if self.held.element == INT4 else 0
            return np.full((len(rows), len(along)), absent, dtype) if zeros is None else zeros[:, groups]
        scales = tensor.scales(rows)[:, groups]
        return scales.view(np.uint8) if self.held.scale == E8M0 else scales


def _order(tensor: QuantTensor) -> np.ndarray:
    """The columns, group by group."""
    assert tensor.g_idx is not None
    return np.argsort(tensor.g_idx, kind="stable")


def _hulls(runs: Sequence[Run]) -> dict[str, range]:
    """The rows of each part from the first that is read to the last."""
    hulls: dict[str, range] = {}
    for run in runs:
        if run.part is not None:
            known = hulls.get(run.part, range(run.start, run.start))
            hulls[run.part] = range(min(known.start, run.start), max(known.stop, run.stop))
    return hulls


def quant_leaves(name: str, leaf: Leaf, reader: QuantReader, held: WeightFormat) -> dict[str, QuantLeaf]:
    """The arrays of the weight `name`, by the names of the model's leaves."""
    tensors = {part: reader.tensors[tensor] for part, tensor in leaf.names.items()}
    roles = [VALUES, SCALES]
    roles += [ZEROS] if held.zeros else []
    roles += [ROW_SCALES] if held.row_scales else []
    roles += [COLUMNS] if held.columns else []
    roles += [INPUT_SCALE] if held.input_scale else []
    return {f"{name}.{role}": QuantLeaf(leaf, tensors, held, role) for role in roles}


def held_leaves(
    leaves: Mapping[str, Leaf], reader: QuantReader, specs: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, WeightFormat], dict[str, Leaf | QuantLeaf]]:
    """The formats of the weights that stay quantised, and all leaves with those weights' arrays in place.

    leaves, specs: of the model whose weights are all dense, on its devices.
    """
    formats: dict[str, WeightFormat] = {}
    found: dict[str, Leaf | QuantLeaf] = {}
    for name, leaf in leaves.items():
        plain = name == EMBEDDING or name.endswith(ROUTER)
        held = None if plain else format_of(leaf, reader, _devices(leaf, specs[name]))
        if held is not None and EXPERTS in name:  # each of which has a scale of its own
            held = replace(held, input_scale=False)
        if held is None:
            found[name] = leaf
        else:
            formats[name] = held
            found |= quant_leaves(name, leaf, reader, held)
    _tell_widened([name for name in leaves if name not in formats and _is_quantised(leaves[name], reader)])
    return formats, found


def _is_quantised(leaf: Leaf, reader: QuantReader) -> bool:
    return not reader.tensors.keys().isdisjoint(leaf.names.values())


def _tell_widened(names: Sequence[str]) -> None:
    if names:
        log.warning(
            "%d quantised weights are widened as they are read, as their parts are of several kinds, or "
            "several devices would share groups whose columns lie apart (desc_act); the first is %s",
            len(names), names[0],
        )  # fmt: skip


def _devices(leaf: Leaf, spec: jax.ShapeDtypeStruct) -> int:
    """How many devices the weight's columns are dealt out over."""
    assert spec.sharding is not None
    first, share = leaf.assembly.row_axes, spec.sharding.shard_shape(spec.shape)
    return prod(spec.shape[first:]) // prod(share[first:])
