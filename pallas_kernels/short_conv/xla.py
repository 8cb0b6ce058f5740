"""The short convolution as plain XLA operations."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.spans import Spans


def step(
    x: Float[Array, "S H C"],
    weight: Float[Array, "H C K"],
    states: Float[Array, "slots H L C"],
    spans: Spans,
) -> tuple[Float32[Array, "S H C"], Float[Array, "slots H L C"]]:
    """One token a sequence."""
    window = jnp.concatenate([spans.before(states), x[:, :, None].astype(states.dtype)], axis=2)
    taps = weight.astype(jnp.float32).transpose(0, 2, 1)
    out = (window.astype(jnp.float32) * taps).sum(2)
    return out, spans.put(states, window[:, :, 1:])


def packed(
    x: Float[Array, "T H C"],
    weight: Float[Array, "H C K"],
    states: Float[Array, "slots H L C"],
    spans: Spans,
) -> tuple[Float32[Array, "T H C"], Float[Array, "slots H L C"]]:
    """Chunks, one behind the other."""
    assert spans.starts is not None
    tokens, last = len(x), weight.shape[-1] - 1
    before, owner = spans.before(states), spans.owners(len(x))
    within = jnp.arange(tokens) - spans.starts[owner]
    taps = weight.astype(jnp.float32)
    out = x.astype(jnp.float32) * taps[:, :, last]
    for lag in range(1, last + 1):
        shifted = jnp.pad(x, ((lag, 0), (0, 0), (0, 0)))[:tokens]
        kept = before[owner, :, jnp.clip(last + within - lag, 0, last - 1)]
        earlier = jnp.where((within < lag)[:, None, None], kept, shifted.astype(kept.dtype))
        out += earlier.astype(jnp.float32) * taps[:, :, last - lag]
    return out, spans.put(states, _last_inputs(x, before, spans))


def _last_inputs(
    x: Float[Array, "T H C"], before: Float[Array, "S H L C"], spans: Spans
) -> Float[Array, "S H L C"]:
    """Of each sequence, behind its tokens: of a short chunk, some of those before it too."""
    assert spans.starts is not None
    kept = jnp.arange(before.shape[2])
    at = spans.counts[:, None] - before.shape[2] + kept  # within the chunk; below 0: before it
    new = x[jnp.clip(spans.starts[:, None] + at, 0, len(x) - 1)].transpose(0, 2, 1, 3)
    old = jnp.take_along_axis(
        before, jnp.clip(spans.counts[:, None] + kept, 0, before.shape[2] - 1)[:, None, :, None], axis=2
    )
    return jnp.where((at >= 0)[:, None, :, None], new.astype(before.dtype), old)
