"""Between the qkv product and attention: bias, norms of q and k, rotation, and the write of K and V."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.options import check_cache
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.rope_kv_write import xla
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork
from lmdeploy_jax.pallas_kernels.shapes import QKV, Pages, Slots

__all__ = ["HeadWork", "as_parts", "rope_kv_write"]


def rope_kv_write(
    qkv: QKV,
    k_pages: Pages,
    v_pages: Pages,
    slots: Slots,
    work: HeadWork,
    *,
    dtype: DTypeLike,
    backend: str,
) -> tuple[Float[Array, "T KH R-2 D"], Pages, Pages]:
    """-> q [T, KH, G, D] in `dtype`, ready for attention, and the cache with T new tokens in it.

    qkv [T, KH, G + 2, D]: for each KV head its G query heads, k and v; or [S, T, KH, G + 2, D] in f32: parts
    whose sum is meant. k_pages, v_pages [pages, KH, PAGE_SIZE, D]; K and V are cast to the cache's dtype.
    slots int32 [T] are the flat indices `page * PAGE_SIZE + offset`; rows that pad the batch carry slots of
    page 0, which may repeat, or negative ones, for which nothing outside page 0 is written.
    In place where the caller donates the cache. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    parts = as_parts(qkv, k_pages, v_pages, slots, work)
    args = (parts, k_pages, v_pages, slots, work)
    if backend == "xla":
        return xla.rope_kv_write(*args, dtype=dtype)
    from lmdeploy_jax.pallas_kernels.rope_kv_write import pallas  # CPUs never need it

    return pallas.rope_kv_write(*args, dtype=dtype, interpret=backend == "pallas_interpret")


def as_parts(
    qkv: QKV, k_pages: Pages, v_pages: Pages, slots: Slots, work: HeadWork
) -> Float[Array, "S T KH R D"]:
    """qkv as [S, T, KH, G + 2, D]. Raises ValueError for shapes that do not fit."""
    check_cache(k_pages, v_pages)
    parts = qkv if qkv.ndim == 5 else qkv[None]
    _, kv_heads, _, head_dim = k_pages.shape
    tokens = slots.shape[0]
    if parts.ndim != 5 or parts.shape[1:3] + parts.shape[4:] != (tokens, kv_heads, head_dim):
        raise ValueError(
            f"qkv must be [{tokens}, {kv_heads}, query heads + 2, {head_dim}], as slots and cache are, or "
            f"several such parts; got {parts.shape[1:]}"
        )
    if parts.shape[3] < 3:
        raise ValueError(f"qkv of shape {parts.shape[1:]} has no query head beside k and v")
    half = None if work.cos is None else work.cos.shape[-1]
    expected = {
        "bias": parts.shape[2:],
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
        "cos": (tokens, half),
        "sin": (tokens, half),
        "mean_squares": parts.shape[:1],
    }
    for name, shape in expected.items():
        array = getattr(work, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
    if half is not None and 2 * half > head_dim:
        raise ValueError(f"cos and sin rotate {2 * half} elements of heads that have {head_dim}")
    return parts
