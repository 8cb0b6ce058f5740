"""A few words a row from every device."""

from __future__ import annotations

from jax import lax
from jaxtyping import Array, Int32

from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.workspace import WORDS, Workspace


def all_gather(
    rows: Int32[Array, "T W"],
    peers: Int32[Array, "1 K"],
    workspace: Workspace,
    *,
    axis: str | tuple[str, ...],
    backend: str,
) -> Int32[Array, "n T W"]:
    """Every device's `rows`, by rank, to be called inside a `shard_map` over `axis`.

    `peers` and the layout of their workspaces: see `lmdeploy_jax.parallel.peers`; XLA has no use for them.
    Raises ValueError for more words or rows than an exchange has.
    """
    check_backend(backend)
    if rows.shape[1] > WORDS or rows.shape[0] > workspace.rows:
        raise ValueError(f"rows {rows.shape} are more than {workspace.rows} of {WORDS} words")
    if backend != "pallas":  # no interpreter knows of peers
        return lax.all_gather(rows, axis)
    from lmdeploy_jax.pallas_kernels.all_gather import pallas  # CPUs never need it

    return pallas.all_gather(rows, peers, workspace, interpret=False)
