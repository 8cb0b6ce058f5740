"""Encoder attention: of patches among each other, both ways, without a cache."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.encoder_attention import xla
from lmdeploy_jax.pallas_kernels.registry import check_backend

__all__ = ["encoder_attention"]


def encoder_attention(
    qkv: Float[Array, "B N 3 H D"], segments: Int32[Array, "B N"] | None, *, backend: str
) -> Float[Array, "B N H D"]:
    """Softmax attention within each of B sequences of N patches; q, k and v stand side by side, as one
    product gives them.

    segments: a patch sees those of its own segment, None: all of its sequence. They rise along a sequence,
    but for -1, which stands anywhere for padding; its rows come out as anything finite. The logits are scaled
    by D ** -0.5, the softmax is in f32. For "xla", a long N is a multiple of `xla.DENSE`, and a longer one of
    `xla.QUERIES`. Raises ValueError for an unknown backend.
    """
    check_backend(backend)
    if backend == "xla":
        return xla.encoder_attention(qkv, segments)
    from lmdeploy_jax.pallas_kernels.encoder_attention import pallas  # CPUs never need it

    return pallas.encoder_attention(qkv, segments, interpret=backend == "pallas_interpret")
