"""A sum over devices, residual addition and RMSNorm in Pallas (Triton backend): one program a row.

A program stores its row for every other device, and adds its own and what it has from them by rank: all
devices have the same bits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.norm.pallas import weigh
from lmdeploy_jax.pallas_kernels.peer_memory import Exchange, Peers
from lmdeploy_jax.pallas_kernels.workspace import Workspace, elements


def all_reduce_add_rms_norm(
    x: Float[Array, "T E"],
    parts: Float[Array, "S T E"],
    weight: Float[Array, "E"],
    peers: Int32[Array, "1 K"],
    *,
    eps: float,
    offset: float,
    interpret: bool,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """See `lmdeploy_jax.pallas_kernels.all_reduce_norm`."""
    rows, size = x.shape
    threads = pl.next_power_of_2(size) // elements(x.dtype)
    how = Launch("all_reduce_add_rms_norm", (rows,), min(max(threads // 32, 1), 16), 1, {0: 0})
    workspace = Workspace.of(peers.shape[1], size, x.dtype)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kernel = functools.partial(_kernel, workspace=workspace, eps=eps, offset=offset)
    added, normed = launch(kernel, how, [like, like], x, parts, weight, peers, interpret=interpret)
    return added, normed


def _kernel(
    x_ref: jax.Ref,
    parts_ref: jax.Ref,
    weight_ref: jax.Ref,
    peers_ref: jax.Ref,
    added_ref: jax.Ref,
    normed_ref: jax.Ref,
    *,
    workspace: Workspace,
    eps: float,
    offset: float,
) -> None:
    row, size = pl.program_id(0), x_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    mask = column < size
    exchange = Exchange(Peers(peers_ref), workspace, row, column, size, x_ref.dtype)
    partial = jnp.zeros(column.shape, jnp.float32)
    for part in range(parts_ref.shape[0]):
        partial += plt.load(parts_ref.at[part, row, column], mask=mask, other=0).astype(jnp.float32)
    x = plt.load(x_ref.at[row, column], mask=mask, other=0).astype(jnp.float32)
    weight = plt.load(weight_ref.at[column], mask=mask, other=0)
    total = jnp.zeros(column.shape, jnp.float32)
    for share in exchange.shares(partial.astype(x_ref.dtype)):
        total += share.astype(jnp.float32)
    added = (x + total).astype(x_ref.dtype)
    plt.store(added_ref.at[row, column], added, mask=mask)
    wide = added.astype(jnp.float32)
    scale = lax.rsqrt(jnp.sum(wide * wide) * (1.0 / size) + eps)
    scale = exchange.end(jnp.full(wide.shape, scale))
    plt.store(normed_ref.at[row, column], weigh(wide * scale, weight, offset, x_ref.dtype), mask=mask)
