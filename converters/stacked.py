"""Experts that a checkpoint holds in one tensor for all of a layer's, read as if they were single ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lmdeploy_jax.converters.headers import TensorInfo
from lmdeploy_jax.converters.layouts import Shape
from lmdeploy_jax.converters.reader import TensorReader
from lmdeploy_jax.converters.slicing import Index, as_ranges, sizes

PARTS: Mapping[str, tuple[str, ...]] = {"gate_up": ("gate", "up"), "down": ("down",)}
NAMES: Mapping[str, str] = {"gate_up_proj": "gate_up", "down_proj": "down"}


@dataclass(frozen=True)
class StackedExperts:
    """How a family stacks its experts: `PREFIX.gate_up_proj` [X, 2 I, E] and `PREFIX.down_proj` [X, E, I].

    names: tensor -> what it holds, where it is called otherwise; below: what stands below the prefix in the
    names of single ones. interleaved: gate and up take turns, row by row, instead of half and half.
    transposed: plain weights, and no others, have their inner axis first; None: where their shapes show it.
    """

    prefix: str = r".*\.experts"
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)
    below: str = ""
    interleaved: bool = False
    transposed: bool | None = False

    def views(self, name: str, reader: TensorReader) -> dict[str, _View]:
        """The single tensors in a stacked one, by the names that one by one they would have; else none."""
        match = re.fullmatch(rf"({self.prefix})\.({'|'.join(self.names)})(\.weight|_\w+)?", name)
        info = reader.info(name)
        if match is None or len(info.shape) < 2 or not info.nbytes:  # nothing may claim to be any number
            return {}
        held = self.names[match[2]]
        suffix = match[3] or ".weight"
        turned = suffix == ".weight" and self._are_transposed(match, reader)
        parts = PARTS[held]
        found = {}
        for expert in range(info.shape[0]):
            for number, part in enumerate(parts):
                single = f"{match[1]}{self.below}.{expert}.{part}_proj{suffix.replace('_bias', '.bias')}"
                found[single] = _View(name, expert, number, len(parts), self.interleaved, turned)
        return found

    def _are_transposed(self, match: re.Match[str], reader: TensorReader) -> bool:
        if self.transposed is not None:
            return self.transposed
        # The outer axis of `down` is the inner one of `gate_up`.
        first, last = (
            reader.info(f"{match[1]}.{other}{match[3] or ''}").shape
            for part in PARTS
            for other in self.names
            if self.names[other] == part
        )
        return first[1] == last[2]


@dataclass(frozen=True)
class _View:
    """Rows of one expert within a stacked tensor: those of part `number` of `parts`."""

    stacked: str
    expert: int
    number: int
    parts: int
    interleaved: bool
    turned: bool

    def shape(self, stacked: Shape) -> Shape:
        _, rows, *columns = self._ordered(stacked)
        return (rows // self.parts, *columns)

    def _ordered(self, stacked: Shape) -> Shape:
        return (stacked[0], stacked[2], stacked[1]) if self.turned else stacked

    def read(self, reader: TensorReader, stacked: Shape, index: Index) -> np.ndarray:
        rows, *columns = as_ranges(index, self.shape(stacked))
        first, step = self.number * self.shape(stacked)[0], 1
        if self.interleaved and self.parts > 1:
            first, step = self.number, self.parts
        span = slice(first + rows.start * step, first + rows.stop * step)
        rest = tuple(slice(c.start, c.stop) for c in columns)
        one = slice(self.expert, self.expert + 1)
        if self.turned:
            return np.ascontiguousarray(reader.read(self.stacked, (one, *rest, span))[0].T[::step])
        return reader.read(self.stacked, (one, span, *rest))[0][::step]


class StackedReader:
    """A checkpoint whose stacked experts are read one by one."""

    def __init__(self, reader: TensorReader, stacked: StackedExperts) -> None:
        self._reader = reader
        self._names: dict[str, None] = {}
        self._views: dict[str, _View] = {}
        for name in reader.names():
            views = stacked.views(name, reader)
            self._views |= views
            self._names |= dict.fromkeys(views or (name,))

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self._reader.folder

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in file order, the single ones' in place of stacked ones'."""
        return tuple(self._names)

    def holder(self, name: str) -> str:
        """The tensor that holds a single one: a stacked one, or itself."""
        return self._views[name].stacked if name in self._views else name

    def info(self, name: str) -> TensorInfo:
        """As `TensorReader.info`."""
        view = self._views.get(name)
        if view is None:
            return self._reader.info(name)
        info = self._reader.info(view.stacked)
        return replace(info, shape=view.shape(info.shape))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """As `TensorReader.read`."""
        view = self._views.get(name)
        if view is None:
            return self._reader.read(name, index)
        return view.read(self._reader, self._reader.info(view.stacked).shape, index)

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """As `TensorReader.read_into`."""
        if name not in self._views:
            self._reader.read_into(name, index, out)
            return
        wanted = sizes(as_ranges(index, self.info(name).shape))
        if out.shape != wanted:
            raise ValueError(f"{name}: slice {index} of shape {wanted} does not fit {out.shape}")
        np.copyto(out, self.read(name, index), casting="unsafe")
