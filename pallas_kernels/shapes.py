"""The arrays that several ops share, by shape and dtype; tests check these annotations at every call.

T tokens (packed rows), KH KV heads, H = KH * G query heads, D elements a head, P tokens a page. An axis has
one size in all arguments and results of a call; `*S` is any number of axes, none too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages

PlainPages = Float[Array, "pages KH P D"]
Pages = PlainPages | QuantPages
"""K or V of a paged cache."""

QKV = Float[Array, "*S T KH R D"]
"""The qkv product, or parts that sum to it. Of each KV head R = G + 2 rows: its query heads, k and v."""

Slots = Int32[Array, "T"]
"""Where a token's K and V lie in the cache: `page * PAGE_SIZE + offset`."""

Tiles = Int32[Array, "W 4"]
"""The work list of prefill attention, see `build_tiles`."""

Sinks = Float32[Array, "H"]
"""A logit of each query head that joins its softmax's denominator (gpt-oss)."""

Row = Float32[Array, "N"]
Output = Any
"""Float32[Array, "N D"], or a tuple of blocks of its columns."""
Softmax = tuple[Row, Row, Output]
"""A running softmax: maximum and denominator of each row, and output."""


class Unscaled(NamedTuple):
    """A product after an RMSNorm, but for the norm's scale: `parts.sum(0) * rsqrt(mean_squares.sum())`.

    Each part is of a share of the columns. `mean_squares`: the share's sum of squares over the number of all
    columns, and its share of the norm's epsilon.
    """

    parts: Float32[Array, "S *product"]
    mean_squares: Float32[Array, "S"]


class Quantised(NamedTuple):
    """A matrix of few bits an element: `(values - zeros) * scales`, G runs of columns with a scale each.

    values: E4M3 or int8, or uint16 words of four elements of 4 bits (`models.formats.WeightFormat` has their
    order): integers or, where scales are bytes of E8M0, E2M1. Without zeros, those of 4-bit integers are 8
    and the others 0.
    """

    values: Shaped[Array, "*rows columns"]
    scales: Shaped[Array, "G *rows"]
    zeros: Shaped[Array, "G *rows"] | None = None
