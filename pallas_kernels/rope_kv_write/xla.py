"""Bias, norms, rotation and KV write as plain XLA operations, in place where the caller donates the cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.norm.xla import rms_norm
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages, quantised
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork
from lmdeploy_jax.pallas_kernels.shapes import Pages, Slots

Cache = tuple[Pages, Pages]
Arrays = list[jax.Array]


def rope_kv_write(
    parts: Float[Array, "S T KH R D"],
    k_pages: Pages,
    v_pages: Pages,
    slots: Slots,
    work: HeadWork,
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "T KH R-2 D"], Pages, Pages]:
    """See `lmdeploy_jax.pallas_kernels.rope_kv_write`."""
    qkv = parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0)
    qkv = qkv if work.mean_squares is None else qkv * lax.rsqrt(jnp.sum(work.mean_squares))
    qkv = qkv.astype(dtype)
    if work.bias is not None:
        qkv = qkv + work.bias
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if work.q_norm is not None:
        q = rms_norm(q, work.q_norm, eps=work.eps, offset=work.offset)
    if work.k_norm is not None:
        k = rms_norm(k, work.k_norm, eps=work.eps, offset=work.offset)
    if work.cos is not None and work.sin is not None:
        q, k = (rotate(x, work.cos, work.sin) for x in (q, k))
    return q, *_write(k_pages, v_pages, k, v, slots)


def rotate(
    x: Float[Array, "T *heads D"], cos: Float32[Array, "T half"], sin: Float32[Array, "T half"]
) -> Float[Array, "T *heads D"]:
    """Rotates the leading elements of each head, the first half paired with the second."""
    half = cos.shape[-1]
    shape = (x.shape[0], *(1,) * (x.ndim - 2), half)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    wide = x[..., : 2 * half].astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * half :]], axis=-1)


def _write(k_pages: Pages, v_pages: Pages, k: jax.Array, v: jax.Array, slots: jax.Array) -> Cache:
    """k, v [T, KH, D] into their slots; what has a negative one goes to page 0."""
    pages, structure = jax.tree.flatten((k_pages, v_pages))
    rows, slots = jax.tree.leaves((_rows(k, k_pages), _rows(v, v_pages))), jnp.maximum(slots, 0)
    # On CPUs, XLA's scatter is the faster where it is in place: it widens a cache of 16-bit floats.
    floats = k_pages.dtype in (jnp.bfloat16, jnp.float16)
    how = {"cpu": _write_in_loop if floats else _scatter, "default": _scatter}
    return jax.tree.unflatten(structure, lax.platform_dependent(pages, rows, slots, **how))


def _rows(x: jax.Array, pages: Pages) -> Any:
    """Tokens as `pages` hold them."""
    return quantised(x, pages.format) if isinstance(pages, QuantPages) else x.astype(pages.dtype)


def _scatter(pages: Arrays, rows: Arrays, slots: jax.Array) -> Arrays:
    page, offset = jnp.divmod(slots, pages[0].shape[2])
    return [array.at[page, :, offset].set(new) for array, new in zip(pages, rows, strict=True)]


def _write_in_loop(pages: Arrays, rows: Arrays, slots: jax.Array) -> Arrays:
    """A loop of windowed updates: in place for every dtype."""
    page_size = pages[0].shape[2]

    def write(token: jax.Array, pages: Arrays) -> Arrays:
        at = (slots[token] // page_size, 0, slots[token] % page_size, 0)
        return [_update(array, new, token, at) for array, new in zip(pages, rows, strict=True)]

    return lax.fori_loop(0, slots.shape[0], write, pages)


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
