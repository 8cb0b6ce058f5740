"""K or V of a quantised paged cache: the arrays, and the arithmetic between them and numbers.

The functions are what the XLA operations and the Pallas kernels do alike, down to the bits: floats are
rounded and read as float16, by shifts, so that no device needs a type of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float16, Float32, Int32, Shaped, UInt16

from lmdeploy_jax.pallas_kernels.kv_formats import KVFormat

MAX_FLOAT16 = 65504.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantPages:
    """words uint16 [pages, KH, P, words], scales [pages, KH, P]; see `KVFormat`. Or, where rows of tokens
    are meant, [T, KH, words] and [T, KH]; or what has the same structure: specs, or refs in a kernel.
    """

    words: Any
    scales: Any
    format: KVFormat = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the numbers: [pages, KH, P, D]."""
        return (*self.words.shape[:-1], self.words.shape[-1] * self.format.per_word)

    @property
    def ndim(self) -> int:
        return self.words.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the words."""
        return self.words.dtype


def as_pages(arrays: tuple[Shaped[Array, "..."], ...], form: KVFormat | None) -> tuple[Any, Any]:
    """K and V of a cache, of the arrays that hold them."""
    if form is None:
        k_pages, v_pages = arrays
        return k_pages, v_pages
    k_words, k_scales, v_words, v_scales = arrays
    return QuantPages(k_words, k_scales, form), QuantPages(v_words, v_scales, form)


def quantised(x: Float[Array, "*rows D"], form: KVFormat) -> QuantPages:
    """Each row with its scale."""
    codes, scales = encode(x, form)
    parts = codes.reshape(*codes.shape[:-1], form.per_word, codes.shape[-1] // form.per_word)
    shifts = jnp.arange(form.per_word, dtype=jnp.int32)[:, None] * form.bits
    words = jnp.sum(parts << shifts, axis=-2, dtype=jnp.int32)
    return QuantPages(words.astype(jnp.uint16), scales, form)


def dequantised(rows: QuantPages) -> Float32[Array, "*rows D"]:
    """The inverse."""
    form, words = rows.format, rows.words
    codes = jnp.concatenate([code(words, i, form) for i in range(form.per_word)], axis=-1)
    scales, zeros = split_scales(rows.scales, form)
    values = codes.astype(jnp.float32)
    return (values if zeros is None else values - zeros[..., None]) * scales[..., None]


def encode(
    x: Float[Array, "*rows D"], form: KVFormat
) -> tuple[Int32[Array, "*rows D"], Shaped[Array, "*rows"]]:
    """The codes of each row, and its scale."""
    return _encode_floats(x, form) if form.is_float else _encode_integers(x, form)


def _encode_integers(x: jax.Array, form: KVFormat) -> tuple[jax.Array, jax.Array]:
    """LMDeploy's formula. The range always has 0 in it: a row of equal numbers has one, too."""
    x = x.astype(jnp.float32)
    low, high = jnp.minimum(jnp.min(x, axis=-1), 0.0), jnp.maximum(jnp.max(x, axis=-1), 0.0)
    scale = ((high - low) / form.levels).astype(jnp.float16)
    step = scale.astype(jnp.float32)
    step = jnp.where(step > 0, step, 1.0)
    zero = (-low / step - form.centre).astype(jnp.float16)
    shifted = x / step[..., None] + (zero.astype(jnp.float32) + (form.centre + 0.5))[..., None]
    codes = jnp.minimum(jnp.maximum(shifted, 0.0), float(form.levels)).astype(jnp.int32)
    return codes, _bits(scale) | _bits(zero) << 16


def _encode_floats(x: jax.Array, form: KVFormat) -> tuple[jax.Array, jax.Array]:
    """To the nearest, ties to even; what is no number becomes 0, since other sequences get the page later."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / form.largest
    scaled = x / jnp.where(scale > 0, scale, 1.0)[..., None]
    scaled = jnp.minimum(jnp.maximum(scaled, -form.largest), form.largest)
    scaled = jnp.where(jnp.abs(scaled) <= form.largest, scaled, 0.0)
    bits, shift = _bits(scaled.astype(jnp.float16)).astype(jnp.int32), _shift(form)
    rounded = (bits + ((1 << shift - 1) - 1) + (bits >> shift & 1)) >> shift
    sign = rounded >> 15 - shift << 7
    return rounded & 0x7F | sign, scale


def code(words: UInt16[Array, "*shape"], number: int, form: KVFormat) -> Float16[Array, "*shape"]:
    """What code number `number` of each word stands for, before zero point and scale: of integers, 1024 and
    the code, since that takes no more than to put the code at the end of a float16.
    """
    part = words >> jnp.uint16(form.bits * number) & jnp.uint16(form.levels)
    if not form.is_float:
        return lax.bitcast_convert_type(part | jnp.uint16(0x6400), jnp.float16)
    shift = jnp.uint16(_shift(form))
    sign = (part & jnp.uint16(0x80)) << jnp.uint16(8)
    return lax.bitcast_convert_type((part & jnp.uint16(0x7F)) << shift | sign, jnp.float16)


def split_scales(
    scales: Shaped[Array, "*rows"], form: KVFormat
) -> tuple[Float32[Array, "*rows"], Float32[Array, "*rows"] | None]:
    """Scales and, of integers, zero points, in what `code` gives."""
    if form.is_float:
        return scales, None
    halves = (scales & jnp.uint32(0xFFFF), scales >> jnp.uint32(16))
    scale, zero = (
        lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16).astype(jnp.float32) for half in halves
    )
    return scale, zero + float(1024 + form.centre)


def _shift(form: KVFormat) -> int:
    """Bits of a float16 behind those that are kept."""
    assert form.mantissa is not None
    return 10 - form.mantissa


def _bits(x: Float16[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
