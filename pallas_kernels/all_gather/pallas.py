"""A few words a row from every device in Pallas (Triton backend): one warp a row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.peer_memory import Exchange, Peers
from lmdeploy_jax.pallas_kernels.workspace import WORDS, Workspace


def all_gather(
    rows: Int32[Array, "T W"], peers: Int32[Array, "1 K"], workspace: Workspace, *, interpret: bool
) -> Int32[Array, "n T W"]:
    """See `lmdeploy_jax.pallas_kernels.all_gather`."""
    out = jax.ShapeDtypeStruct((workspace.devices, *rows.shape), rows.dtype)
    how = Launch("all_gather", (rows.shape[0],), num_warps=1, num_stages=1)
    kernel = functools.partial(_kernel, workspace=workspace)
    return launch(kernel, how, out, rows, peers, interpret=interpret)


def _kernel(rows_ref: jax.Ref, peers_ref: jax.Ref, out_ref: jax.Ref, *, workspace: Workspace) -> None:
    row, size = pl.program_id(0), rows_ref.shape[1]
    column = jnp.arange(32 * WORDS, dtype=jnp.int32)
    mask = column < size
    exchange = Exchange(Peers(peers_ref), workspace, row, column, size, jnp.int32)
    shares = list(exchange.shares(plt.load(rows_ref.at[row, column], mask=mask, other=0)))
    total = jnp.full(column.shape, jnp.sum(sum(shares)))
    zero = exchange.end(total) - total  # which no thread has before all have read
    for sender, share in enumerate(shares):
        plt.store(out_ref.at[sender, row, column], share + zero, mask=mask)
