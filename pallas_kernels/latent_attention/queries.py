"""What stands before a decode step's latent attention, in one kernel (Triton backend).

Queries are led into the space of the latents and rotated; beside them the tokens' own latents are normed and
rotated.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int32, Shaped

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.heads import partner_of
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.norm.pallas import inverse_rms, weigh
from lmdeploy_jax.pallas_kernels.paged_attention.pallas import MIN_ROWS
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork

COLUMNS, MOST_ROWS = 64, 64  # elements of a query that a program makes, and tokens that it makes them of
Place = tuple[Array | int, ...]


def latent_queries(
    q: Float[Array, "T H D"],
    latents: Float[Array, "T L"],
    kv_b: Float[Array, "H N R"],
    work: HeadWork,
    *,
    interpret: bool,
) -> tuple[Float[Array, "T H L"], Float[Array, "T L"]]:
    """See `lmdeploy_jax.pallas_kernels.latent_attention`."""
    tokens, heads, _ = q.shape
    rows = min(max(MIN_ROWS, pl.next_power_of_2(tokens)), MOST_ROWS)
    grid = (heads + 1, pl.cdiv(kv_b.shape[2], COLUMNS), pl.cdiv(tokens, rows))
    how = Launch("latent_queries", grid, num_warps=4, num_stages=1)
    shapes = (tokens, heads, latents.shape[1]), latents.shape
    out = [jax.ShapeDtypeStruct(shape, latents.dtype) for shape in shapes]
    kernel = functools.partial(_queries_kernel, rows=rows, eps=work.eps)
    arrays = (q, latents, kv_b, work.k_norm, work.cos, work.sin)
    queries, latents = launch(kernel, how, out, *arrays, interpret=interpret)
    return queries, latents


def _queries_kernel(
    q_ref: jax.Ref,
    both_ref: jax.Ref,
    kv_b_ref: jax.Ref,
    norm_ref: jax.Ref,
    cos_ref: jax.Ref | None,
    sin_ref: jax.Ref | None,
    queries_ref: jax.Ref,
    latents_ref: jax.Ref,
    *,
    rows: int,
    eps: float,
) -> None:
    """A program leads a head's queries into a block of columns; those of one head more make the latents."""
    head, block, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * rows
    (tokens, heads, width), rank = q_ref.shape, norm_ref.shape[0]
    nope = width - (both_ref.shape[1] - rank)
    turn = functools.partial(_turn, cos_ref, sin_ref)

    @pl.when(head < heads)
    def _lead() -> None:
        token = first + jnp.arange(rows, dtype=jnp.int32)
        there, element = token < tokens, _numbers(nope)
        column = block * COLUMNS + jnp.arange(COLUMNS, dtype=jnp.int32)
        q = _read(q_ref, (token[:, None], head, element[None, :]), there, element < nope)
        at = head, element[:, None], column[None, :]
        led = dot(q, _read(kv_b_ref, at, element < nope, column < rank))
        _store(queries_ref, (token[:, None], head, column[None, :]), led, there, column < rank)
        turn(q_ref, (token[:, None], head), nope, queries_ref, rank, there & (block == 0))

    @pl.when(head == heads)
    def _make_latents() -> None:
        each = pl.next_power_of_2(pl.cdiv(rows, pl.cdiv(rank, COLUMNS)))
        token = first + block * each + jnp.arange(each, dtype=jnp.int32)
        there, column = token < jnp.minimum(first + rows, tokens), _numbers(rank)
        at = token[:, None], column[None, :]
        wide = _read(both_ref, at, there, column < rank).astype(jnp.float32)
        weight = plt.load(norm_ref.at[column], mask=column < rank, other=0)
        normed = weigh(wide * inverse_rms(wide, rank, eps), weight[None, :], 0.0, latents_ref.dtype)
        _store(latents_ref, at, normed, there, column < rank)
        turn(both_ref, (token[:, None],), rank, latents_ref, rank, there)


def _turn(
    cos_ref: jax.Ref | None,
    sin_ref: jax.Ref | None,
    source: jax.Ref,
    rows: Place,
    first: int,
    target: jax.Ref,
    to: int,
    there: Bool[Array, "rows"],
) -> None:
    """Elements from `first` on, rotated as `rope_kv_write` does, into those of `target` from `to` on."""
    column = _numbers(target.shape[-1] - to)
    inside = column < target.shape[-1] - to
    x = _read(source, (*rows, first + column[None, :]), there, inside)
    if cos_ref is not None and sin_ref is not None:
        half = cos_ref.shape[1]
        partners = _read(source, (*rows, first + partner_of(column, half)[None, :]), there, inside)
        at = rows[0], jnp.where(column < half, column, column - half)[None, :]
        turns = inside & (column < 2 * half)
        cos, sin = (_read(ref, at, there, turns) for ref in (cos_ref, sin_ref))
        cos, sin = jnp.where(turns, cos, 1.0), jnp.where(column < half, -sin, sin)
        x = x.astype(jnp.float32) * cos + partners.astype(jnp.float32) * sin
    _store(target, (*rows, to + column[None, :]), x, there, inside)


def _numbers(count: int) -> Int32[Array, "padded"]:
    return jnp.arange(max(MIN_ROWS, pl.next_power_of_2(count)), dtype=jnp.int32)


def _read(ref: jax.Ref, at: Place, rows: Bool[Array, "N"], columns: Bool[Array, "M"]) -> Shaped[Array, "N M"]:
    return plt.load(ref.at[at], mask=rows[:, None] & columns[None, :], other=0)


def _store(
    ref: jax.Ref, at: Place, x: Shaped[Array, "N M"], rows: Bool[Array, "N"], columns: Bool[Array, "M"]
) -> None:
    plt.store(ref.at[at], x.astype(ref.dtype), mask=rows[:, None] & columns[None, :])
