"""Encoder attention: of patches among each other, both ways, without a cache."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.encoder_attention import xla
from lmdeploy_jax.pallas_kernels.registry import check_backend

__all__ = ["encoder_attention", "why_not_mosaic"]


def why_not_mosaic(dtype: DTypeLike, head_dim: int, *, segments: bool = False) -> str | None:
    """Why backend "mosaic" leaves it to "pallas", or None."""
    if segments:
        return "it knows no segments"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies 16-bit numbers, not {dtype}"
    return None if head_dim in (64, 128) else f"head_dim {head_dim} is neither 64 nor 128"


def encoder_attention(
    qkv: Float[Array, "B N 3 H D"],
    segments: Int32[Array, "B N"] | None,
    *,
    count: int | None = None,
    backend: str,
) -> Float[Array, "B N H D"]:
    """Softmax attention within each of B sequences of N patches; q, k and v stand side by side, as one
    product gives them.

    segments: a patch sees those of its own segment, None: all of its sequence. They rise along a sequence,
    but for -1, which stands anywhere for padding; its rows come out as anything finite. count: patches of a
    sequence, behind which padding stands, None: N. The logits are scaled by D ** -0.5, the softmax is in f32.
    For "xla", a long N is a multiple of `xla.DENSE`, and a longer one of `xla.QUERIES`. Backend "mosaic" is
    for Hopper and leaves to "pallas" what it cannot do, see `why_not_mosaic`, and an N that 8 does not
    divide. Raises ValueError for an unknown backend.
    """
    check_backend(backend, "mosaic")
    rows, reason = qkv.shape[1], why_not_mosaic(qkv.dtype, qkv.shape[-1], segments=segments is not None)
    if backend == "mosaic" and rows % 8 == 0 and reason is None:
        from lmdeploy_jax.pallas_kernels.encoder_attention import mosaic  # CPUs never need it

        return mosaic.encoder_attention(qkv, count or rows)
    if count is not None:
        qkv, segments = qkv[:, :count], None if segments is None else segments[:, :count]
    out = _attended(qkv, segments, backend)
    return jnp.pad(out, ((0, 0), (0, rows - out.shape[1]), (0, 0), (0, 0)))


def _attended(qkv: Array, segments: Array | None, backend: str) -> Array:
    if backend == "xla":
        return xla.encoder_attention(qkv, segments)
    from lmdeploy_jax.pallas_kernels.encoder_attention import pallas  # CPUs never need it

    return pallas.encoder_attention(qkv, segments, interpret=backend == "pallas_interpret")
