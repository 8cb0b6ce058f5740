"""A weight's values, made by its device of the file's own arrays: words packed anew, or rows rounded.

The host's way (`QuantTensor.elements`) is as exact, and takes a core a second for 100 MB of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.converters.device import Upload
from lmdeploy_jax.converters.formats.on_load import FLOAT8, LEAST, LIMIT
from lmdeploy_jax.converters.formats.packing import Packing, Rounding, WordTensor
from lmdeploy_jax.converters.layouts import Run, Shape
from lmdeploy_jax.pallas_kernels.quant_gemm.words import pack_words

MOST_PARTS = 8  # of a program; a layer's experts are too many for one


@dataclass(frozen=True)
class Cut:
    """Rows of a part, by its number; None: rows of zeros."""

    part: int | None
    first: int
    count: int
    step: int

    def of(self, parts: Sequence[jax.Array]) -> jax.Array:
        if self.part is None:
            return jnp.zeros((self.count, parts[0].shape[1]), parts[0].dtype)
        return parts[self.part][self.first : self.first + (self.count - 1) * self.step + 1 : self.step]


def repacked(
    parts: Mapping[str, object],
    hulls: Mapping[str, range],
    runs: Sequence[Run],
    columns: range,
    order: np.ndarray | None,
    *,
    tile: int,
    shape: Shape,
) -> Upload | None:
    """The values [*shape] of a weight's `runs` of rows, made of the rows `hulls` of its parts' tensors.

    order: of columns that lie apart in the file. None: the host has to make them.
    """
    tensors = [
        (tensor, rows)
        for part, rows in hulls.items()
        if isinstance(tensor := parts[part], WordTensor) and tensor.packing.is_whole(rows, columns)
    ]
    if not 0 < len(tensors) == len(hulls) <= MOST_PARTS:
        return None
    words = [tensor.words(rows, columns) for tensor, rows in tensors]
    how = {"packings": tuple(tensor.packing for tensor, _ in tensors), "cuts": _cuts(runs, hulls)}
    orders = () if order is None else (order.astype(np.int32),)
    return Upload((*words, *orders), partial(_values, **how, tile=tile, shape=shape))


def _cuts(runs: Sequence[Run], hulls: Mapping[str, range]) -> tuple[Cut, ...]:
    places = {part: place for place, part in enumerate(hulls)}
    return tuple(
        Cut(None, 0, run.count, 1)
        if run.part is None
        else Cut(places[run.part], run.start - hulls[run.part].start, run.count, run.step)
        for run in runs
    )


@partial(jax.jit, static_argnames=("packings", "cuts", "tile", "shape"))
def _values(
    *arrays: jax.Array,
    packings: tuple[Packing | Rounding, ...],
    cuts: tuple[Cut, ...],
    tile: int,
    shape: Shape,
) -> jax.Array:
    """Of each part's words and, behind them, perhaps the columns' order."""
    words, order = arrays[: len(packings)], arrays[len(packings) :]
    parts = [
        _rounded(its) if isinstance(packing, Rounding) else _packed(packing, its, order, tile)
        for packing, its in zip(packings, words, strict=True)
    ]
    return jnp.concatenate([cut.of(parts) for cut in cuts]).reshape(*shape, -1)


def _packed(packing: Packing, words: jax.Array, order: Sequence[jax.Array], tile: int) -> jax.Array:
    """Codes as `WeightFormat` has them."""
    codes = _unpacked(packing, words)
    codes = codes[:, order[0]] if order else codes
    eight = packing.bits == 8
    return jax.lax.bitcast_convert_type(codes ^ 128, jnp.int8) if eight else pack_words(codes, tile)


def _unpacked(packing: Packing, words: jax.Array) -> jax.Array:
    """int32 [a, b] -> the codes, uint8 [N, K]."""
    shifts = jnp.array(packing.places, jnp.uint32) * packing.bits
    words = words.astype(jnp.uint32)
    if packing.across != packing.transposed:
        codes = (words[:, None] >> shifts[:, None]).reshape(-1, words.shape[1])
    else:
        codes = (words[..., None] >> shifts).reshape(len(words), -1)
    codes = (codes & (1 << packing.bits) - 1).astype(jnp.uint8)
    return codes.T if packing.transposed else codes


def _rounded(rows: jax.Array) -> jax.Array:
    """As `RoundedTensor` has them."""
    wide = rows.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(wide).max(1, keepdims=True), LEAST) / np.float32(LIMIT)
    return jnp.clip(wide / scales, -LIMIT, LIMIT).astype(FLOAT8)
