"""A file's packed words as a device holds them, unpacked and packed anew there by a compiled program.

The host's own way (`QuantTensor.elements`) is as exact, and takes a core a second for 100 MB of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.converters.device import Upload
from lmdeploy_jax.converters.layouts import Run, Shape
from lmdeploy_jax.pallas_kernels.quant_gemm.words import pack_words

MOST_PARTS = 8  # of a program; a layer's experts are too many for one


@dataclass(frozen=True)
class Packing:
    """How int32 words hold the codes of a weight [N, K].

    across: a word's codes are neighbours in N, instead of in K. transposed: the words lie as those of [K, N].
    order: which of a word's codes lies at each place, from the lowest bits on; (): one after the other.
    """

    bits: int
    across: bool
    transposed: bool
    order: tuple[int, ...] = ()

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    def unpack(self, words: jax.Array) -> jax.Array:
        """int32 [a, b] -> the codes, uint8 [N, K]."""
        places = [self.order.index(i) if self.order else i for i in range(self.per_word)]
        shifts = jnp.array(places, jnp.uint32) * self.bits
        words = words.astype(jnp.uint32)
        if self.across != self.transposed:
            codes = (words[:, None] >> shifts[:, None]).reshape(-1, words.shape[1])
        else:
            codes = (words[..., None] >> shifts).reshape(len(words), -1)
        codes = (codes & (1 << self.bits) - 1).astype(jnp.uint8)
        return codes.T if self.transposed else codes


@runtime_checkable
class WordTensor(Protocol):
    """A `QuantTensor` whose elements lie in int32 words."""

    @property
    def packing(self) -> Packing:
        """How."""

    def words(self, rows: range, columns: range) -> np.ndarray:
        """The words that hold these elements, as the file has them."""


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
        if isinstance(tensor := parts[part], WordTensor) and _whole(tensor.packing, rows, columns)
    ]
    if not 0 < len(tensors) == len(hulls) <= MOST_PARTS:
        return None
    words = [tensor.words(rows, columns) for tensor, rows in tensors]
    how = {"packings": tuple(tensor.packing for tensor, _ in tensors), "cuts": _cuts(runs, hulls)}
    orders = () if order is None else (order.astype(np.int32),)
    return Upload((*words, *orders), partial(_values, **how, tile=tile, shape=shape))


def _whole(packing: Packing, rows: range, columns: range) -> bool:
    """Whether the words that hold these elements hold no others."""
    packed = rows if packing.across else columns
    return packed.start % packing.per_word == packed.stop % packing.per_word == 0


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
    *arrays: jax.Array, packings: tuple[Packing, ...], cuts: tuple[Cut, ...], tile: int, shape: Shape
) -> jax.Array:
    """Of each part's words and, behind them, perhaps the columns' order."""
    parts = []
    for packing, words in zip(packings, arrays, strict=False):
        codes = packing.unpack(words)
        codes = codes[:, arrays[-1]] if len(arrays) > len(packings) else codes
        eight = packing.bits == 8
        parts.append(
            jax.lax.bitcast_convert_type(codes ^ 128, jnp.int8) if eight else pack_words(codes, tile)
        )
    return jnp.concatenate([cut.of(parts) for cut in cuts]).reshape(*shape, -1)
