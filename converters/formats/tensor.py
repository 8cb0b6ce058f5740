"""One quantised weight of a checkpoint, whatever its format."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lmdeploy_jax.converters.formats.parts import Parts
from lmdeploy_jax.converters.formats.scheme import SYMMETRIC_ZERO, Scheme, element_values


class QuantTensor(Protocol):
    """One quantised weight of a checkpoint, readable by slice."""

    @property
    def parts(self) -> Parts:
        """The tensors that it is made of."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    def scheme(self) -> Scheme:
        """How it is held."""

    @property
    def g_idx(self) -> np.ndarray | None:
        """i32 [K], each column's group, where the columns of a group do not lie side by side; else None."""

    def elements(self, rows: range, columns: range) -> np.ndarray:
        """[n, k]: uint8 codes of 4-bit elements, int8, or the float8 type."""

    def scales(self, rows: range) -> np.ndarray:
        """[n, G] of `scheme.scale`, without the row scales."""

    def zeros(self, rows: range) -> np.ndarray | None:
        """Integers [n, G]; None where `scheme.has_zeros` is not set."""

    def row_scales(self, rows: range) -> np.ndarray | None:
        """f32 [n]; None where `scheme.has_row_scales` is not set."""


def groups_of(tensor: QuantTensor, columns: range) -> np.ndarray:
    """The group of each of the columns."""
    if tensor.g_idx is not None:
        return tensor.g_idx[columns.start : columns.stop]
    return np.arange(columns.start, columns.stop) // tensor.scheme.group


def dequantise(tensor: QuantTensor, rows: range, columns: range) -> np.ndarray:
    """The slice of the weight that the tensor stands for, f32 [n, k]."""
    scheme, groups = tensor.scheme, groups_of(tensor, columns)
    out = np.array(element_values(tensor.elements(rows, columns), scheme.element), order="C")
    zeros = tensor.zeros(rows)
    out -= SYMMETRIC_ZERO.get(scheme.element, 0) if zeros is None else zeros.astype(np.float32)[:, groups]
    scales = tensor.scales(rows).astype(np.float32)
    row_scales = tensor.row_scales(rows)
    if row_scales is not None:
        scales = scales * row_scales[:, None]
    out *= scales[:, groups]
    return out
