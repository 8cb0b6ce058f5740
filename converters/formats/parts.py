"""The tensors of one quantised module: looked up by their roles, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmdeploy_jax.converters.formats.scheme import is_float
from lmdeploy_jax.converters.headers import TensorInfo
from lmdeploy_jax.converters.reader import TensorReader
from lmdeploy_jax.converters.slicing import Index
from lmdeploy_jax.errors import CheckpointError

INTACT = "give an intact checkpoint, or the 16-bit one"


@dataclass(frozen=True)
class Parts:
    """A module of a checkpoint and its tensors: role ("qweight", "scales") -> name."""

    reader: TensorReader
    module: str
    names: Mapping[str, str]
    joint: str = "."
    """What stands between the module's name and a role."""

    def __contains__(self, role: object) -> bool:
        return role in self.names

    @property
    def folder(self) -> Path:
        return self.reader.folder

    def info(self, role: str) -> TensorInfo:
        """Raises CheckpointError where the module has no tensor of that role."""
        return self.reader.info(self._name(role))

    def read(self, role: str, index: Index = ()) -> np.ndarray:
        """The slice of a tensor, in its own dtype."""
        return self.reader.read(self._name(role), index)

    def first(self, *roles: str) -> str:
        """The first of the roles that is there. Raises CheckpointError where none is."""
        found = next((role for role in roles if role in self.names), None)
        return self._name(roles[0]) and roles[0] if found is None else found

    def sized(self, role: str, *, axes: int | Sequence[int], dtypes: Sequence[type] = ()) -> tuple[int, ...]:
        """A tensor's shape, of so many axes, of one of the dtypes (default: plain floats)."""
        info, allowed = self.info(role), (axes,) if isinstance(axes, int) else tuple(axes)
        right = info.dtype in dtypes if dtypes else is_float(info.dtype)
        if not right or len(info.shape) not in allowed or 0 in info.shape:
            kinds = " or ".join(np.dtype(kind).name for kind in dtypes) or "floats"
            expected = f"{' or '.join(map(str, allowed))} axes of {kinds}"
            raise self.damaged(role, f"is {info.dtype} {list(info.shape)}; it must have {expected}")
        return info.shape

    def want(self, role: str, shape: Sequence[int], why: str) -> None:
        """Raises CheckpointError where a tensor is not of the shape that `why` asks for."""
        found = self.info(role).shape
        if found != tuple(shape):
            raise self.damaged(role, f"has shape {list(found)}; {why} asks for {list(shape)}")

    def groups(self, role: str, columns: int, count: int, told: int | None) -> int:
        """The columns of a group: `columns` in `count` equal groups, as the config `told` (-1: all; None)."""
        if columns % count:
            raise self.damaged(role, f"has {count} groups, which do not divide {columns} columns")
        size = columns // count
        if told is not None and size != (columns if told == -1 else told) and count > 1:
            raise self.damaged(role, f"has groups of {size} columns, but group_size is {told} in the config")
        return size

    def damaged(self, role: str, fault: str) -> CheckpointError:
        """The error that names the tensor of a role."""
        name = self._name(role)
        return CheckpointError(f"{self.reader.info(name).file}: tensor {name}: {fault}; {INTACT}")

    def _name(self, role: str) -> str:
        if role not in self.names:
            there = ", ".join(self.names.values())
            raise CheckpointError(
                f"{self.folder}: missing tensor {self.module}{self.joint}{role}, which belongs to {there}; "
                f"{INTACT}"
            )
        return self.names[role]


def within(rows: range, unit: int) -> range:
    """The units (words of `unit` elements) that hold the elements `rows`."""
    return range(rows.start // unit, -(-rows.stop // unit))


def cut(rows: range, unit: int) -> slice:
    """Where the elements `rows` lie among those of the units that `within` gives."""
    first = rows.start // unit * unit
    return slice(rows.start - first, rows.stop - first)


def as_slice(items: range) -> slice:
    return slice(items.start, items.stop)
