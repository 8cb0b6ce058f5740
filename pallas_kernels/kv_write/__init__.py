"""KV write: new keys and values go into their slots of the paged cache."""

from __future__ import annotations

import jax

from pallas_kernels.kv_write import xla
from pallas_kernels.options import check_cache
from pallas_kernels.registry import check_backend


def kv_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    backend: str,
) -> tuple[jax.Array, jax.Array]:
    """Writes T tokens' keys and values into the cache and returns the cache.

    k_pages, v_pages [pages, KH, PAGE_SIZE, D]; k, v [T, KH, D], cast to the cache's dtype; slots int32 [T],
    the flat index `page * PAGE_SIZE + offset`. Rows that pad the batch carry slots of page 0, which may
    repeat. In place where the caller donates the cache. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    check_cache(k_pages, v_pages)
    _check_rows(k_pages, k, v, slots)
    if backend == "xla":
        return xla.kv_write(k_pages, v_pages, k, v, slots)
    from pallas_kernels.kv_write import pallas  # a CPU does without the import's time

    return pallas.kv_write(k_pages, v_pages, k, v, slots, interpret=backend == "pallas_interpret")


def _check_rows(k_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> None:
    _, kv_heads, _, head_dim = k_pages.shape
    expected = (slots.shape[0], kv_heads, head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(
            f"k and v must both have shape {expected}, as slots and cache do; got {k.shape} and {v.shape}"
        )
