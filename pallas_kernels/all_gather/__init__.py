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
    Raises ValueError for more rows than an exchange has, and unless a row has 1, 2 or 4 words.
    """
    check_backend(backend)
    if rows.shape[1] not in (1, 2, WORDS) or rows.shape[0] > workspace.rows:  # 3 are not aligned
        raise ValueError(f"rows {rows.shape} are not up to {workspace.rows} of 1, 2 or {WORDS} words")
    if backend != "pallas":  # no interpreter knows of peers
        return lax.all_gather(rows, axis)
    from lmdeploy_jax.pallas_kernels.all_gather import pallas  # CPUs never need it

    return pallas.all_gather(rows, peers, workspace, interpret=False)
