"""Weights of one byte an element with scales beside them: FP8 and INT8, whatever program wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lmdeploy_jax.converters.formats.parts import Parts, as_slice
from lmdeploy_jax.converters.formats.scheme import Scheme, is_float
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.formats import E4M3, E5M2, INT8

ELEMENTS: Mapping[np.dtype, str] = {
    np.dtype(np.int8): INT8,
    np.dtype(ml_dtypes.float8_e4m3fn): E4M3,
    np.dtype(ml_dtypes.float8_e5m2): E5M2,
}
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
Block = tuple[int, int]


@dataclass(frozen=True)
class ScaledTensor:
    """weight [N, K] and scales [N / rows of a block, G]; zero points, where there are any, are [N, G]."""

    parts: Parts
    shape: tuple[int, int]
    scheme: Scheme
    scale_role: str
    scale_rows: int
    g_idx: None = None

    def elements(self, rows: range, columns: range) -> np.ndarray:
        return self.parts.read("weight", (as_slice(rows), as_slice(columns)))

    def scales(self, rows: range) -> np.ndarray:
        scales = read_scales(self.parts, self.scale_role)
        count = -(-self.shape[0] // self.scale_rows)
        return scales.reshape(count, -1)[np.arange(rows.start, rows.stop) // self.scale_rows]

    def zeros(self, rows: range) -> np.ndarray | None:
        if not self.scheme.has_zeros:
            return None
        zeros = self.parts.read("weight_zero_point").astype(np.int16)
        count = -(-self.shape[0] // self.scale_rows)
        return zeros.reshape(count, -1)[np.arange(rows.start, rows.stop) // self.scale_rows]

    def row_scales(self, rows: range) -> None:
        return None


def read_scales(parts: Parts, role: str) -> np.ndarray:
    """Scales, of which some formats keep the exponent's byte alone."""
    scales = parts.read(role)
    return scales.view(E8M0) if scales.dtype == np.uint8 else scales


def open_scaled(
    parts: Parts,
    scale_role: str,
    *,
    block: Block | None = None,
    activations: str | None = None,
    has_zeros: bool = False,
    input_role: str | None = None,
) -> ScaledTensor:
    """A module's weight. The scales' shape says what shares one: all, a row, a `block`, or a row's group.

    input_role: the tensor of the scale of all activations, which then have no scales of their own.

    Raises CheckpointError where that cannot be told, and where the tensors do not fit each other.
    """
    rows, columns = parts.sized("weight", axes=2, dtypes=tuple(kind.type for kind in ELEMENTS))
    info = parts.info(scale_role)
    if not (is_float(info.dtype) or info.dtype in (E8M0, np.uint8)) or 0 in info.shape:
        raise parts.damaged(scale_role, f"is {info.dtype} {list(info.shape)}; scales are floats")
    scale_rows, group = _shared(parts, scale_role, rows, columns, block)
    element = ELEMENTS[parts.info("weight").dtype]
    dtype = E8M0 if info.dtype == np.uint8 else info.dtype
    input_scale = None if input_role is None else read_input_scale(parts, input_role)
    scheme = Scheme(element, group, dtype, has_zeros, activations=activations, input_scale=input_scale)
    return ScaledTensor(parts, (rows, columns), scheme, scale_role, scale_rows)


def read_input_scale(parts: Parts, role: str) -> float:
    """The one scale of a module's activations."""
    parts.sized(role, axes=(0, 1, 2))
    found = parts.read(role).astype(np.float32)
    if found.size != 1 or not np.isfinite(found).all() or found.item() <= 0:
        raise parts.damaged(role, f"holds {found.ravel()[:4].tolist()}; it must be one positive number")
    return float(found.item())


def _shared(parts: Parts, role: str, rows: int, columns: int, block: Block | None) -> Block:
    """The rows and the columns that share a scale."""
    shape = tuple(size for size in parts.info(role).shape if size != 1)
    if block is not None:
        counts = -(-rows // block[0]), -(-columns // block[1])
        if shape == tuple(count for count in counts if count != 1):
            return block
        raise _misfit(parts, role, f"blocks of {list(block)} ask for {list(counts)}")
    if not shape:
        return rows, columns
    if shape[0] == rows and len(shape) <= 2:
        count = shape[1] if len(shape) == 2 else 1
        return 1, parts.groups(role, columns, count, None)
    raise _misfit(parts, role, f"{rows} rows ask for one scale, {rows}, or {rows} by the number of groups")


def _misfit(parts: Parts, role: str, expected: str) -> CheckpointError:
    return parts.damaged(role, f"has shape {list(parts.info(role).shape)}; {expected}")
