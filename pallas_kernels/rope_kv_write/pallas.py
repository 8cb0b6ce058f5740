"""Bias, norms, rotation and KV write in Pallas (Triton backend): a program a token and KV head, in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.launch import Launch, launch
from pallas_kernels.norm.pallas import inverse_rms, weigh
from pallas_kernels.rope_kv_write.work import HeadWork

MAX_WARPS = 8


def rope_kv_write(
    parts: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    work: HeadWork,
    *,
    eps: float,
    offset: float,
    dtype: DTypeLike,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.rope_kv_write.rope_kv_write`; parts [S, T, KH, G + 2, D]."""
    _, tokens, kv_heads, rows, head_dim = parts.shape
    size = pl.next_power_of_2(rows) * pl.next_power_of_2(head_dim)
    num_warps = min(max(size // 256, 1), MAX_WARPS)  # eight elements a thread
    how = Launch("rope_kv_write", (tokens, kv_heads), num_warps, num_stages=1, aliases={0: 0, 1: 1})
    out = [
        *(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_pages, v_pages)),
        jax.ShapeDtypeStruct((tokens, kv_heads, rows - 2, head_dim), dtype),
    ]
    kernel = functools.partial(_kernel, eps=eps, offset=offset)
    arrays = (k_pages, v_pages, parts, slots, work.bias, work.q_norm, work.k_norm, work.cos, work.sin)
    new_k, new_v, q = launch(kernel, how, out, *arrays, interpret=interpret)
    return q, new_k, new_v


def _kernel(
    _k_in: jax.Ref,
    _v_in: jax.Ref,
    parts_ref: jax.Ref,
    slots_ref: jax.Ref,
    bias_ref: jax.Ref | None,
    q_norm_ref: jax.Ref | None,
    k_norm_ref: jax.Ref | None,
    cos_ref: jax.Ref | None,
    sin_ref: jax.Ref | None,
    k_out: jax.Ref,
    v_out: jax.Ref,
    q_out: jax.Ref,
    *,
    eps: float,
    offset: float,
) -> None:
    """The tile's rows are the query heads of one KV head, its k and its v."""
    token, kv_head = pl.program_id(0), pl.program_id(1)
    groups, head_dim = q_out.shape[2:]
    row = jnp.arange(pl.next_power_of_2(groups + 2), dtype=jnp.int32)[:, None]
    column = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)[None, :]
    inside = column < head_dim
    mask = (row < groups + 2) & inside
    read = functools.partial(_read, parts_ref, bias_ref, token, kv_head, row, mask, q_out.dtype)
    plain = read(column)
    scale = inverse_rms(plain.astype(jnp.float32), head_dim, eps)
    norm = functools.partial(_norm, q_norm_ref, k_norm_ref, row < groups, inside, scale, offset)
    turned = norm(plain, column)
    if cos_ref is not None and sin_ref is not None:
        partner = _partner(column, cos_ref.shape[1])
        turned = _rotate(turned, norm(read(partner), partner), cos_ref, sin_ref, token, column)
    plt.store(q_out.at[token, kv_head, row, column], turned, mask=(row < groups) & inside)
    slot, page_size = slots_ref[token], k_out.shape[2]
    for number, pages, heads in ((groups, k_out, turned), (groups + 1, v_out, plain)):
        # Row `number` alone is stored; the others have places of their own, which interpret mode rewrites.
        place = lax.rem(slot + page_size + row - number, page_size)
        at = pages.at[lax.div(slot, page_size), kv_head, place, column]
        plt.store(at, heads.astype(pages.dtype), mask=(row == number) & inside & (slot >= 0))


def _read(
    parts_ref: jax.Ref,
    bias_ref: jax.Ref | None,
    token: jax.Array,
    kv_head: jax.Array,
    row: jax.Array,
    mask: jax.Array,
    dtype: jnp.dtype,
    column: jax.Array,
) -> jax.Array:
    """The heads' elements at `column`, rounded as the product and its bias are in the XLA path."""
    parts = [
        plt.load(parts_ref.at[part, token, kv_head, row, column], mask=mask, other=0)
        for part in range(parts_ref.shape[0])
    ]
    heads = sum(parts[1:], parts[0]).astype(dtype)
    if bias_ref is None:
        return heads
    bias = plt.load(bias_ref.at[kv_head, row, column], mask=mask, other=0)
    return (heads.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)


def _norm(
    q_norm_ref: jax.Ref | None,
    k_norm_ref: jax.Ref | None,
    is_query: jax.Array,
    inside: jax.Array,
    scale: jax.Array,
    offset: float,
    heads: jax.Array,
    column: jax.Array,
) -> jax.Array:
    if q_norm_ref is None or k_norm_ref is None:
        return heads
    q_weight, k_weight = (plt.load(ref.at[column], mask=inside, other=0) for ref in (q_norm_ref, k_norm_ref))
    weight = jnp.where(is_query, q_weight, k_weight)
    return weigh(heads.astype(jnp.float32) * scale, weight, offset, heads.dtype)


def _partner(column: jax.Array, half: int) -> jax.Array:
    """The element that each one is rotated with; itself where nothing rotates."""
    return jnp.where(column < half, column + half, jnp.where(column < 2 * half, column - half, column))


def _rotate(
    heads: jax.Array,
    partners: jax.Array,
    cos_ref: jax.Ref,
    sin_ref: jax.Ref,
    token: jax.Array,
    column: jax.Array,
) -> jax.Array:
    half = cos_ref.shape[1]
    first, turns = column < half, column < 2 * half
    angle = jnp.where(first, column, column - half)
    cos = plt.load(cos_ref.at[token, angle], mask=turns, other=1.0)
    sin = plt.load(sin_ref.at[token, angle], mask=turns, other=0.0)
    turned = heads.astype(jnp.float32) * cos + partners.astype(jnp.float32) * jnp.where(first, -sin, sin)
    return turned.astype(heads.dtype)
