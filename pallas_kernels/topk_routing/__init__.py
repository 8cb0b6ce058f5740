"""Which experts of a mixture a token has, and what their outputs are multiplied by, from its logits."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from lmdeploy_jax.pallas_kernels.norm import add_rms_norm
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.topk_routing import xla
from lmdeploy_jax.pallas_kernels.topk_routing.options import TopK

__all__ = ["TopK", "norm_topk_routing", "topk_routing"]


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
    _check(options, logits.shape[-1])
    if backend == "xla":
        logits = logits.sum(0) if logits.ndim == 3 else logits
        return xla.topk_routing(logits if bias is None else logits + bias, correction, options)
    from lmdeploy_jax.pallas_kernels.topk_routing import pallas  # CPUs never need it

    parts = logits if logits.ndim == 3 else logits[None]
    return pallas.topk_routing(parts, bias, correction, options, interpret=backend == "pallas_interpret")


def norm_topk_routing(
    x: Float[Array, "T E"],
    delta: Float[Array, "*S T E"],
    norm: Float[Array, "E"],
    router: Float[Array, "X E"],
    correction: Float32[Array, "X"] | None,
    options: TopK,
    *,
    bias: Float32[Array, "X"] | None = None,
    eps: float,
    offset: float = 0.0,
    backend: str,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"], Int32[Array, "T k"], Float32[Array, "T k"]]:
    """`add_rms_norm` of x, delta and norm, and `topk_routing` of what is normed, whose logits are its product
    with the router's weight [X, E], in f32 -> the new x, the normed x, experts and weights.
    """
    check_backend(backend)
    _check(options, router.shape[0])
    if backend == "xla":
        x, normed = add_rms_norm(x, delta, norm, eps=eps, offset=offset, backend=backend)
        rows, how = normed.astype(router.dtype), {"preferred_element_type": jnp.float32}
        logits = jnp.dot(rows, router.T, precision=lax.Precision.HIGHEST, **how)
        return x, normed, *topk_routing(logits, correction, options, bias=bias, backend=backend)
    from lmdeploy_jax.pallas_kernels.topk_routing import normed as kernel  # CPUs never need it

    arrays = (x, delta if delta.ndim == 3 else delta[None], norm, router, bias, correction)
    interpret = backend == "pallas_interpret"
    return kernel.norm_topk_routing(*arrays, options, eps=eps, offset=offset, interpret=interpret)


def _check(options: TopK, experts: int) -> None:
    if not 1 <= options.count <= experts or experts % options.groups:
        raise ValueError(
            f"{options.count} experts a token cannot be chosen among {experts} in {options.groups} "
            "equal groups"
        )
