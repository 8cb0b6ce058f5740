"""What an attention op is told besides its arrays, and the checks that every implementation shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # model configs hold options, and are read where there is no JAX
    import jax

    from lmdeploy_jax.pallas_kernels.shapes import Pages

PAGE_SIZE = 64
"""Tokens a page. One page is one tile of the kernels."""

MASKED = -(2.0**100)
"""Logit of a key that a query does not see: finite, so that a row that sees nothing stays free of NaN. A
power of two, whose products are exact: where one instruction scales a logit and takes the row's scaled
maximum from it, any other number as large would leave its rounding error, whose exponential may be infinite.
"""


@dataclass(frozen=True)
class AttentionOptions:
    """Static options of an attention call.

    `scale` multiplies the logits; `window` is the number of newest keys a query sees (None: all);
    `soft_cap` bounds the scaled logits as `soft_cap * tanh(logits / soft_cap)`; `chunk`: a sequence is cut
    into chunks of so many positions, and a query sees no key of an earlier one (None: it is whole).
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1, or None for full attention")
        if self.chunk is not None and (self.chunk < 1 or self.window is not None):
            raise ValueError(
                f"chunk is {self.chunk}, window {self.window}; one must be None, a chunk 1 or more"
            )
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap is {self.soft_cap}; it must be positive, or None for no cap")


def check_cache(k_pages: Pages, v_pages: Pages) -> None:
    """Raises ValueError unless the two arrays are K and V of one paged cache."""
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            "k_pages and v_pages must be alike, [pages, kv_heads, page_size, head_dim]; got "
            f"{k_pages.shape} {k_pages.dtype} and {v_pages.shape} {v_pages.dtype}"
        )
    if k_pages.shape[2] != PAGE_SIZE:
        raise ValueError(f"the page size is {k_pages.shape[2]} tokens; the kernels are built for {PAGE_SIZE}")


def check_heads(q: jax.Array, k_pages: Pages, sinks: jax.Array | None) -> None:
    """Raises ValueError unless q [*, heads, head_dim] fits the cache's heads and the sinks fit q's."""
    _, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    if heads % kv_heads or head_dim != k_pages.shape[3]:
        raise ValueError(
            f"q of shape {q.shape} does not fit a cache of {kv_heads} KV heads of size {k_pages.shape[3]}: "
            "the query heads must be a multiple of the KV heads and the head sizes equal"
        )
    check_sinks(sinks, heads)


def check_sinks(sinks: jax.Array | None, heads: int) -> None:
    """Raises ValueError unless there is one sink a query head, or none at all."""
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks has shape {sinks.shape}; it must hold one logit a query head: ({heads},)")
