"""KV write as plain XLA operations, in place where the caller donates the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Pages = tuple[jax.Array, jax.Array]


def kv_write(k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> Pages:
    """See `pallas_kernels.kv_write.kv_write`."""
    k, v = k.astype(k_pages.dtype), v.astype(v_pages.dtype)
    # On CPUs, XLA's scatter is the faster where it is in place: it widens a cache of 16-bit floats.
    on_cpu = _scatter if k_pages.dtype == jnp.float32 else _write_in_loop
    return lax.platform_dependent(k_pages, v_pages, k, v, slots, cpu=on_cpu, default=_scatter)


def _scatter(k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> Pages:
    page, offset = jnp.divmod(slots, k_pages.shape[2])
    return k_pages.at[page, :, offset].set(k), v_pages.at[page, :, offset].set(v)


def _write_in_loop(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> Pages:
    """A loop of windowed updates: in place for every dtype."""
    page_size = k_pages.shape[2]

    def write(token: jax.Array, pages: Pages) -> Pages:
        at = (slots[token] // page_size, 0, slots[token] % page_size, 0)
        return _update(pages[0], k, token, at), _update(pages[1], v, token, at)

    return lax.fori_loop(0, slots.shape[0], write, (k_pages, v_pages))


def _update(
    pages: jax.Array, rows: jax.Array, token: jax.Array, at: tuple[jax.Array | int, ...]
) -> jax.Array:
    row = lax.dynamic_index_in_dim(rows, token)[:, :, None]  # [1, KH, 1, D]
    if pages.dtype != jnp.bfloat16:
        return lax.dynamic_update_slice(pages, row, at)
    # As bits: XLA for CPUs would convert the whole cache to f32 and back for each row.
    bits = lax.dynamic_update_slice(_bits(pages), _bits(row), at)
    return lax.bitcast_convert_type(bits, pages.dtype)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16)
