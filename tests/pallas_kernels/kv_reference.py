"""LMDeploy's formulas of a quantised KV cache in numpy, and `KVFormat`'s order of the codes."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np

from lmdeploy_jax.pallas_kernels.kv_formats import KVFormat
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages, dequantised

FLOATS = {3: ml_dtypes.float8_e4m3fn, 2: ml_dtypes.float8_e5m2}
BINARY_POINT = {3: 2.0**8, 2: 1.0}  # of floats that are read as float16


def codes_of(x: np.ndarray, form: KVFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [..., D] -> codes, and each row's scale and zero point [..., 1]. As in LMDeploy the scale is that of
    the range, which has 0 in it here: where all numbers of a row are equal LMDeploy divides by 0.
    """
    if form.mantissa is not None:
        dtype = FLOATS[form.mantissa]
        scale = (np.abs(x).max(-1, keepdims=True) / float(ml_dtypes.finfo(dtype).max)).astype(np.float32)
        point = BINARY_POINT[form.mantissa]
        half = (x / np.where(scale > 0, scale, 1) / point).astype(np.float16)  # on the way, which moves a few
        return (half * np.float32(point)).astype(dtype), scale, np.zeros_like(scale)
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = ((high - low) / form.levels).astype(np.float16).astype(np.float32)
    step = np.where(scale > 0, scale, 1)
    zero = (-low / step - form.centre).astype(np.float16).astype(np.float32) + form.centre
    return np.clip(np.trunc(x / step + zero + 0.5), 0, form.levels).astype(np.uint8), scale, zero


def rounded(x: np.ndarray, form: KVFormat) -> np.ndarray:
    """The numbers that are left of x."""
    codes, scale, zero = codes_of(np.asarray(x, np.float32), form)
    return (codes.astype(np.float64) - zero) * scale


def pages_of(x: np.ndarray, form: KVFormat) -> tuple[np.ndarray, np.ndarray]:
    """x [pages, KH, P, D] -> words and scales. Rows of NaN have all bits set."""
    unused = np.isnan(x).any(-1)
    codes, scale, zero = codes_of(np.where(unused[..., None], 0, x).astype(np.float32), form)
    parts = np.split(codes.view(np.uint8).astype(np.uint16), form.per_word, axis=-1)
    words = sum(part << form.bits * i for i, part in enumerate(parts)).astype(np.uint16)
    if form.mantissa is None:
        pair = np.concatenate([scale, zero - form.centre], axis=-1).astype(np.float16)
        scales = np.ascontiguousarray(pair).view(np.uint32)[..., 0]
        return np.where(unused[..., None], np.uint16(0xFFFF), words), np.where(unused, ~np.uint32(0), scales)
    scales = scale[..., 0] * np.float32(BINARY_POINT[form.mantissa])
    # What nobody wrote holds finite codes, of zeros or of other tokens, but maybe no finite scales.
    return words, np.where(unused, np.float32(np.nan), scales)


def assert_same_pages(got: jax.Array | QuantPages, want: jax.Array | QuantPages) -> None:
    """But for page 0, which takes what pads."""
    if isinstance(got, QuantPages) and isinstance(want, QuantPages):
        assert_same_numbers(*(np.asarray(dequantised(x), np.float64)[1:] for x in (got, want)), want.format)
    else:
        np.testing.assert_array_equal(np.asarray(got, np.float32)[1:], np.asarray(want, np.float32)[1:])


def assert_same_numbers(got: np.ndarray, want: np.ndarray, form: KVFormat) -> None:
    """But for a few that lay halfway between two codes, and have the other one."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    got, want = np.nan_to_num(got), np.nan_to_num(want)
    error = np.abs(got - want) / (np.abs(want).max(-1, keepdims=True) + 1e-30)
    assert (error > 1e-3).mean() < 1e-3
    assert error.max() < 1.01 * (2 / form.levels if form.mantissa is None else 2**-form.mantissa)
