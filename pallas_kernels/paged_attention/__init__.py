"""Decode attention: from the qkv product of one new token a sequence to its attention over the KV cache."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.options import AttentionOptions, check_sinks
from lmdeploy_jax.pallas_kernels.paged_attention import xla
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork, as_parts
from lmdeploy_jax.pallas_kernels.shapes import QKV, Pages, Sinks, Slots


def paged_attention(
    qkv: QKV,
    k_pages: Pages,
    v_pages: Pages,
    slots: Slots,
    page_table: Int32[Array, "T M"],
    kv_lens: Int32[Array, "T"],
    split_counters: Int32[Array, "T KH"],
    work: HeadWork,
    *,
    options: AttentionOptions,
    sinks: Sinks | None = None,
    dtype: DTypeLike,
    backend: str,
) -> tuple[Float[Array, "T KH R-2 D"], Pages, Pages, Int32[Array, "T KH"]]:
    """`rope_kv_write`, whose arguments qkv, the cache, slots, work and dtype are, and attention.

    Each of T sequences attends with its new token to what the cache has of it, the new token included, whose
    slot is the last one of those that kv_lens counts. page_table int32 [T, M], padded with 0; kv_lens int32
    [T] (0: a row that pads the batch; it comes out as zeros). A window limits the query at position L-1 to
    keys at positions above L-1-window, a chunk to those of its own; `sinks` f32 [H] adds a logit to each
    head's softmax denominator (gpt-oss). Softmax in f32. split_counters int32 [T, KH]: how many of the
    programs that share a sequence's pages are done; zero between calls, and in place where the caller lets
    go of them: one array serves all layers.
    Returns [T, KH, G, D] in `dtype`, the cache with the new tokens, and the counters. In place where the
    caller donates the cache. Raises ValueError for shapes or options that do not fit.
    """
    check_backend(backend)
    parts = as_parts(qkv, k_pages, v_pages, slots, work)
    tokens, kv_heads = parts.shape[1:3]
    check_sinks(sinks, kv_heads * (parts.shape[3] - 2))
    if split_counters.shape != (tokens, kv_heads):
        raise ValueError(f"split_counters has shape {split_counters.shape}; it must be {(tokens, kv_heads)}")
    arrays = (parts, k_pages, v_pages, slots, page_table, kv_lens)
    if backend == "xla":
        return *xla.paged_attention(*arrays, work, sinks, options, dtype=dtype), split_counters
    from lmdeploy_jax.pallas_kernels.paged_attention import pallas  # CPUs never need it

    interpret = backend == "pallas_interpret"
    return pallas.paged_attention(
        *arrays, split_counters, work, sinks, options, dtype=dtype, interpret=interpret
    )
