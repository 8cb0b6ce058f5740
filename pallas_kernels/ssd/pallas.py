"""State space duality in Pallas (Triton backend): a token at once."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Float32

from lmdeploy_jax.pallas_kernels.recurrent_step import recurrent_step
from lmdeploy_jax.pallas_kernels.spans import Spans


def step(
    x: Float[Array, "S G R P"],
    dt: Float32[Array, "S G R"],
    log_decay: Float32[Array, "S G R"],
    b: Float[Array, "S G N"],
    c: Float[Array, "S G N"],
    states: Float32[Array, "slots H N P"],
    spans: Spans,
    wanted: Bool[Array, "S"] | None = None,
    *,
    interpret: bool,
) -> tuple[Float32[Array, "S G R P"], Float32[Array, "slots H N P"]]:
    """As `xla.step`; the outputs of those that are not `wanted` are 0."""
    added = dt[..., None] * x
    return recurrent_step(c, b, added, log_decay, None, states, spans, wanted, interpret=interpret)
