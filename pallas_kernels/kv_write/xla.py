"""KV write as plain XLA operations, in place where the caller donates the cache."""

from __future__ import annotations

import jax
from jax import lax


def kv_write(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.kv_write.kv_write`."""
    tokens, kv_heads, head_dim = k.shape
    page_size = k_pages.shape[2]

    # A loop of windowed updates: XLA's scatter on a CPU is the same loop with more steps in its body.
    def write(token: jax.Array, pages: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at = (slots[token] // page_size, 0, slots[token] % page_size, 0)
        rows = (lax.dynamic_index_in_dim(x, token).reshape(1, kv_heads, 1, head_dim) for x in (k, v))
        new = [
            lax.dynamic_update_slice(p, row.astype(p.dtype), at) for p, row in zip(pages, rows, strict=True)
        ]
        return new[0], new[1]

    return lax.fori_loop(0, tokens, write, (k_pages, v_pages))
