"""Multi-head latent attention (DeepSeek-V2, 2024): a token has one latent, key and value of all heads."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from lmdeploy_jax.pallas_kernels.latent_attention import xla
from lmdeploy_jax.pallas_kernels.latent_attention.xla import values_of_latents
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.shapes import PlainPages, Slots, Tiles

__all__ = ["latent_attention", "latent_queries", "latent_values", "values_of_latents"]


def latent_queries(
    q: Float[Array, "*S T H D"],
    latents: Float[Array, "T L"],
    norm: Float[Array, "R"],
    kv_b: Float[Array, "H N R"],
    cos: Float32[Array, "T half"] | None,
    sin: Float32[Array, "T half"] | None,
    *,
    eps: float,
    backend: str = "xla",
) -> tuple[Float[Array, "T H L"], Float[Array, "T L"]]:
    """The queries and latents that `latent_attention` takes, of the products that make them.

    q [T, H, P + Rr], or parts whose sum is meant, P elements that the first P rows of kv_b [H, P + V, R] lead
    into the space of the latents, and Rr that are rotated by cos and sin, as are the last of latents
    [T, R + Rr], whose others are normed by `norm` [R] and eps. Rounded to the dtype of the latents. Raises
    ValueError for shapes that do not fit.
    """
    nope = q.shape[-1] - (latents.shape[1] - norm.size)
    if not 0 < nope <= kv_b.shape[1] or kv_b.shape[2] != norm.size:
        raise ValueError(
            f"queries {q.shape}, latents {latents.shape} and norm {norm.shape} do not fit kv_b {kv_b.shape}: "
            "they must be [T, H, P + Rr], [T, R + Rr], [R], and [H, P + V, R]"
        )
    check_backend(backend)
    parts = q if q.ndim == 4 else q[None]
    if backend == "xla":
        return xla.queries(parts, latents, norm, kv_b, cos, sin, eps)
    from lmdeploy_jax.pallas_kernels.latent_attention import projections  # CPUs never need it

    arrays, interpret = (parts, latents, norm, kv_b, cos, sin), backend == "pallas_interpret"
    return projections.latent_queries(*arrays, eps, interpret=interpret)


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
    _check(q, pages, rank)
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


def latent_values(
    q: Float[Array, "T H D"],
    latents: Float[Array, "T D"],
    pages: PlainPages,
    slots: Slots,
    page_table: Int32[Array, "T M"],
    kv_lens: Int32[Array, "T"],
    kv_b: Float[Array, "H N R"],
    *,
    value_dim: int,
    options: AttentionOptions,
    backend: str = "xla",
) -> tuple[Float[Array, "T H V"], PlainPages]:
    """`latent_attention` of one token a sequence, whose outputs the last `value_dim` rows of kv_b lead out of
    the space of the latents. Raises ValueError for shapes that do not fit.
    """
    rank, arrays = kv_b.shape[2], (q, latents, pages, slots, page_table, kv_lens)
    if backend == "xla":
        out, pages = latent_attention(*arrays, None, rank=rank, options=options, tile_rows=1)
        return values_of_latents(out, kv_b, value_dim), pages
    check_backend(backend)
    _check(q, pages, rank)
    from lmdeploy_jax.pallas_kernels.latent_attention import pallas, projections  # CPUs never need it

    interpret = backend == "pallas_interpret"
    parts, lse, pages = pallas.decode_parts(*arrays, rank, options, interpret=interpret)
    return projections.latent_values(parts, lse, kv_b, value_dim, q.dtype, interpret=interpret), pages


def _check(q: Float[Array, "T H D"], pages: PlainPages, rank: int) -> None:
    if pages.shape[1:] != (1, PAGE_SIZE, q.shape[2]) or not rank <= q.shape[2]:
        raise ValueError(
            f"pages of shape {pages.shape} must be [pages, 1, {PAGE_SIZE}, {q.shape[2]}], as queries of "
            f"shape {q.shape} are, and rank {rank} at most {q.shape[2]}"
        )


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
