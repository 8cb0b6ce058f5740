"""KV write in Pallas (Triton backend): one program a token and group of heads, in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.launch import Launch, launch

HEADS = 8  # most KV heads a program


def kv_write(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.kv_write.kv_write`."""
    tokens, kv_heads, _ = k.shape
    grid = (tokens, pl.cdiv(kv_heads, HEADS))
    how = Launch("kv_write", grid, num_warps=4, num_stages=1, aliases={0: 0, 1: 1})
    caches = [jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_pages, v_pages)]
    new_k, new_v = launch(_kernel, how, caches, k_pages, v_pages, k, v, slots, interpret=interpret)
    return new_k, new_v


def _kernel(
    _k_in: jax.Ref,
    _v_in: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    slots_ref: jax.Ref,
    k_out: jax.Ref,
    v_out: jax.Ref,
) -> None:
    token = pl.program_id(0)
    _, kv_heads, head_dim = k_ref.shape
    block = min(HEADS, pl.next_power_of_2(kv_heads))
    head = (pl.program_id(1) * HEADS + jnp.arange(block, dtype=jnp.int32))[:, None]
    column = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)[None, :]
    mask = (head < kv_heads) & (column < head_dim)
    slot, page_size = slots_ref[token], k_out.shape[2]
    page, offset = lax.div(slot, page_size), lax.rem(slot, page_size)
    for source, target in ((k_ref, k_out), (v_ref, v_out)):
        rows = plt.load(source.at[token, head, column], mask=mask, other=0)
        plt.store(target.at[page, head, offset, column], rows.astype(target.dtype), mask=mask)
