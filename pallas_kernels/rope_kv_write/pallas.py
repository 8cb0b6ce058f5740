"""Bias, norms, rotation and KV write in Pallas (Triton backend): a program a token and KV head, in place."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.heads import HeadRefs, HeadTile
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork
from lmdeploy_jax.pallas_kernels.shapes import Pages, Slots

MAX_WARPS = 8


def rope_kv_write(
    parts: Float[Array, "S T KH R D"],
    k_pages: Pages,
    v_pages: Pages,
    slots: Slots,
    work: HeadWork,
    *,
    dtype: DTypeLike,
    interpret: bool,
) -> tuple[Float[Array, "T KH R-2 D"], Pages, Pages]:
    """See `lmdeploy_jax.pallas_kernels.rope_kv_write`."""
    _, tokens, kv_heads, rows, head_dim = parts.shape
    size = pl.next_power_of_2(rows - 1) * pl.next_power_of_2(head_dim)
    num_warps = min(max(size // 256, 1), MAX_WARPS)  # eight elements a thread
    cache, structure = jax.tree.flatten((k_pages, v_pages))
    aliases = {i: i for i in range(len(cache))}
    how = Launch("rope_kv_write", (tokens, kv_heads), num_warps, num_stages=1, aliases=aliases)
    out = [
        *(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in cache),
        jax.ShapeDtypeStruct((tokens, kv_heads, rows - 2, head_dim), dtype),
    ]
    kernel = functools.partial(_kernel, cache=structure, eps=work.eps, offset=work.offset)
    *written, q = launch(kernel, how, out, *cache, slots, parts, *work.arrays(), interpret=interpret)
    return q, *jax.tree.unflatten(structure, written)


def _kernel(*refs: Any, cache: Any, eps: float, offset: float) -> None:
    """`cache`: the structure of K and V, whose arrays come first, as inputs and as outputs."""
    arrays = cache.num_leaves
    slots_ref, *work = refs[arrays : -1 - arrays]
    k_pages, v_pages = jax.tree.unflatten(cache, refs[-1 - arrays : -1])
    q_out = refs[-1]
    token, kv_head = pl.program_id(0), pl.program_id(1)
    coded = isinstance(k_pages, QuantPages)
    tile = HeadTile(HeadRefs(*work), token, kv_head, q_out.dtype, eps, offset, coded)
    values, slot, rotated = tile.values(), slots_ref[token], tile.rotated()
    plt.store(q_out.at[token, kv_head, tile.row, tile.column], rotated, mask=tile.is_query)
    tile.write(rotated, values, k_pages, v_pages, slot)
