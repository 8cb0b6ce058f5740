"""4-bit floats (E2M1), two a byte: MXFP4 with a power of two every 32, NVFP4 with an FP8 scale every 16."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lmdeploy_jax.converters.formats.parts import Parts, as_slice, cut, within
from lmdeploy_jax.converters.formats.scaled import E8M0, read_scales
from lmdeploy_jax.converters.formats.scheme import Scheme, nibbles
from lmdeploy_jax.models.formats import E2M1

MX_GROUP, NV_GROUP = 32, 16
E4M3_SCALES = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Fp4Tensor:
    """Packed u8 [..., N, K / 2], perhaps as [..., N, K / 32, 16], and scales [..., N, K / group].

    global_scale: what multiplies all scales.
    """

    parts: Parts
    shape: tuple[int, int]
    scheme: Scheme
    packed: str
    scale_role: str
    global_scale: np.float32 | None = None
    g_idx: None = None

    def elements(self, rows: range, columns: range) -> np.ndarray:
        shape = self.parts.info(self.packed).shape
        if len(shape) != 2:
            octets = self.parts.read(self.packed).reshape(self.shape[0], -1)[as_slice(rows)]
            return nibbles(octets)[:, as_slice(columns)]
        octets = self.parts.read(self.packed, (as_slice(rows), as_slice(within(columns, 2))))
        return nibbles(octets)[:, cut(columns, 2)]

    def scales(self, rows: range) -> np.ndarray:
        return read_scales(self.parts, self.scale_role).reshape(self.shape[0], -1)[as_slice(rows)]

    def zeros(self, rows: range) -> None:
        return None

    def row_scales(self, rows: range) -> np.ndarray | None:
        return None if self.global_scale is None else np.full(len(rows), self.global_scale, np.float32)


def open_mxfp4(parts: Parts, packed: str, scale_role: str) -> Fp4Tensor:
    """`packed` [..., N, K / 32, 16] or [N, K / 2]. Raises CheckpointError where the scales do not fit it."""
    shape = parts.sized(packed, axes=(2, 3, 4), dtypes=(np.uint8,))
    if len(shape) > 2 and shape[-1] != MX_GROUP // 2:
        raise parts.damaged(
            packed, f"has shape {list(shape)}; its last axis must hold the 16 bytes of a group"
        )
    leading, columns = (shape[:-1], 2 * shape[-1]) if len(shape) == 2 else (shape[:-2], 32 * shape[-2])
    return _open(parts, packed, scale_role, leading, columns, MX_GROUP, E8M0)


def open_nvfp4(parts: Parts, packed: str, scale_role: str, global_role: str, *, divides: bool) -> Fp4Tensor:
    """`packed` [N, K / 2], a scalar `global_role` by which scales are multiplied, or which `divides` them."""
    rows, octets = parts.sized(packed, axes=2, dtypes=(np.uint8,))
    if math.prod(parts.sized(global_role, axes=(0, 1, 2))) != 1:
        raise parts.damaged(
            global_role, f"has shape {list(parts.info(global_role).shape)}; it must be one number"
        )
    scale = np.float32(parts.read(global_role).reshape(()))
    if not np.isfinite(scale) or scale <= 0:
        raise parts.damaged(global_role, f"is {scale}; it must be a number above 0")
    scale = np.float32(1) / scale if divides else scale
    return _open(parts, packed, scale_role, (rows,), 2 * octets, NV_GROUP, E4M3_SCALES, scale)


def _open(
    parts: Parts,
    packed: str,
    scale_role: str,
    leading: tuple[int, ...],
    columns: int,
    group: int,
    dtype: np.dtype,
    scale: np.float32 | None = None,
) -> Fp4Tensor:
    stored = (dtype.type, np.uint8) if dtype == E8M0 else (dtype.type,)
    parts.sized(scale_role, axes=len(leading) + 1, dtypes=stored)
    parts.want(scale_role, (*leading, columns // group), f"{parts.names[packed]} of {columns} columns")
    scheme = Scheme(E2M1, group, dtype, has_row_scales=scale is not None)
    return Fp4Tensor(parts, (math.prod(leading), columns), scheme, packed, scale_role, scale)
