"""A causal convolution over the last few tokens of a sequence, each channel by itself."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.short_conv import xla
from lmdeploy_jax.pallas_kernels.spans import Spans


def short_conv(
    x: Float[Array, "T H C"],
    weight: Float[Array, "H C K"],
    states: Float[Array, "slots H L C"],
    spans: Spans,
    bias: Float[Array, "H C"] | None = None,
    *,
    backend: str = "xla",
) -> tuple[Float[Array, "T H C"], Float[Array, "slots H L C"]]:
    """`out[t] = bias + sum over j of weight[:, :, j] * x[t - K + 1 + j]`, in which tokens before a sequence's
    first are zeros and those of earlier steps come from `states`, the last K - 1 inputs of each sequence.

    Sums in f32. Returns the outputs in x's dtype, of tokens that only pad the step anything finite, and the
    states behind the step, in place where the caller donates them. Chunks are XLA's with every backend.
    Raises ValueError for shapes that do not fit.
    """
    (heads, channels, width), expected = weight.shape, (weight.shape[0], weight.shape[2] - 1, weight.shape[1])
    if x.shape[1:] != (heads, channels) or states.shape[1:] != expected:
        raise ValueError(
            f"inputs of shape {x.shape} and states of shape {states.shape} do not fit a convolution of "
            f"{width} taps over [T, {heads}, {channels}]: states are [slots, {', '.join(map(str, expected))}]"
        )
    check_backend(backend)
    if spans.starts is not None:
        out, states = xla.packed(x, weight, states, spans)
    elif backend == "xla":
        out, states = xla.step(x, weight, states, spans)
    else:
        from lmdeploy_jax.pallas_kernels.short_conv import pallas  # CPUs never need it

        interpret = backend == "pallas_interpret"
        out, states = pallas.step(x, weight, states, spans, interpret=interpret)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype), states
