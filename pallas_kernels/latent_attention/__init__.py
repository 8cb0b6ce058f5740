"""Multi-head latent attention (DeepSeek-V2, 2024): a token has one latent, key and value of all heads."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.latent_attention import xla
from lmdeploy_jax.pallas_kernels.latent_attention.xla import values_of_latents
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork
from lmdeploy_jax.pallas_kernels.shapes import PlainPages, Slots, Tiles

__all__ = ["latent_attention", "latent_queries", "values_of_latents"]


def latent_queries(
    q: Float[Array, "T H D"],
    latents: Float[Array, "T L"],
    kv_b: Float[Array, "H N R"],
    work: HeadWork,
    *,
    backend: str = "xla",
) -> tuple[Float[Array, "T H L"], Float[Array, "T L"]]:
    """The queries and latents that `latent_attention` takes, of the products that make them.

    q [T, H, P + Rr] has P elements that the first P rows of kv_b [H, P + V, R] lead into the space of the
    latents, and Rr that rotate, as do the last of latents [T, R + Rr], whose others are normed by the norm of
    keys. The rest of `work` does not count.
    """
    check_backend(backend)
    if backend == "xla":
        return xla.queries(q, latents, kv_b, work)
    from lmdeploy_jax.pallas_kernels.latent_attention import queries  # CPUs never need it

    interpret = backend == "pallas_interpret"
    return queries.latent_queries(q, latents, kv_b, work, interpret=interpret)


def latent_attention(
    q: Float[Array, "T H D"],
    latents: Float[Array, "T D"],
    pages: PlainPages,
    slots: Slots,
    page_table: Int32[Array, "S M"],
    kv_lens: Int32[Array, "S"],
    tiles: Tiles | None,
    *,
    rank: int,
    options: AttentionOptions,
    tile_rows: int,
    backend: str = "xla",
) -> tuple[Float[Array, "T H R"], PlainPages]:
    """Writes the tokens' latents into the cache and attends to those of their sequences.

    q [T, H, D] are queries in the space of the latents, whose first `rank` elements are values as well as
    keys, and whose others, rotated, are keys alone; latents [T, D]; pages [pages, 1, PAGE_SIZE, D]. slots,
    page_table, kv_lens and tiles as in `paged_attention` and `prefill_attention`: without tiles each sequence
    has one token; tiles are of `tile_rows` rows, which are the backend's own where it is not "xla". Softmax
    in f32. Returns [T, H, rank] in q's dtype, zeros in rows that no tile covers, and the cache with the new
    tokens. In place where the caller donates the cache. Raises ValueError for shapes that do not fit.
    """
    if pages.shape[1:] != (1, PAGE_SIZE, q.shape[2]) or not rank <= q.shape[2]:
        raise ValueError(
            f"pages of shape {pages.shape} must be [pages, 1, {PAGE_SIZE}, {q.shape[2]}], as queries of "
            f"shape {q.shape} are, and rank {rank} at most {q.shape[2]}"
        )
    check_backend(backend)
    if backend != "xla":
        return _by_kernels(
            q, latents, pages, slots, page_table, kv_lens, tiles, rank, options, backend == "pallas_interpret"
        )
    pages = xla.write(pages, latents, slots)
    if tiles is None:
        out = xla.decode(q, pages, page_table, kv_lens, options)
    else:
        out = xla.prefill(q, pages, page_table, tiles, options, tile_rows)
    return out[..., :rank], pages


def _by_kernels(
    q: Float[Array, "T H D"],
    latents: Float[Array, "T D"],
    pages: PlainPages,
    slots: Slots,
    page_table: Int32[Array, "S M"],
    kv_lens: Int32[Array, "S"],
    tiles: Tiles | None,
    rank: int,
    options: AttentionOptions,
    interpret: bool,
) -> tuple[Float[Array, "T H R"], PlainPages]:
    from lmdeploy_jax.pallas_kernels.latent_attention import pallas  # CPUs never need it

    if tiles is None:
        arrays = (q, latents, pages, slots, page_table, kv_lens)
        return pallas.decode(*arrays, rank, options, interpret=interpret)
    pages = xla.write(pages, latents, slots)
    return pallas.prefill(q, pages, page_table, tiles, rank, options, interpret=interpret), pages
