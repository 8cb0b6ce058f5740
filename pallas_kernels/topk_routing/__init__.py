"""Which experts of a mixture a token has, and what their outputs are multiplied by, from its logits."""

from __future__ import annotations

from jaxtyping import Array, Float32, Int32

from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.topk_routing import xla
from lmdeploy_jax.pallas_kernels.topk_routing.options import TopK

__all__ = ["TopK", "topk_routing"]


def topk_routing(
    logits: Float32[Array, "*S T X"],
    correction: Float32[Array, "X"] | None,
    options: TopK,
    *,
    bias: Float32[Array, "X"] | None = None,
    backend: str,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """The experts of each token, best first, and their weights. Of logits [S, T, X] the sum over S is meant.

    `bias` is added to the logits, `correction` to the scores for the choice alone. Among equals the expert of
    the lowest number goes first. Raises ValueError where there are fewer experts than each token is to have.
    """
    check_backend(backend)
    experts = logits.shape[-1]
    if not 1 <= options.count <= experts or experts % options.groups:
        raise ValueError(
            f"{options.count} experts a token cannot be chosen among {experts} in {options.groups} "
            "equal groups"
        )
    if backend == "xla":
        logits = logits.sum(0) if logits.ndim == 3 else logits
        return xla.topk_routing(logits if bias is None else logits + bias, correction, options)
    from lmdeploy_jax.pallas_kernels.topk_routing import pallas  # CPUs never need it

    parts = logits if logits.ndim == 3 else logits[None]
    return pallas.topk_routing(parts, bias, correction, options, interpret=backend == "pallas_interpret")
