"""The gated delta rule in Pallas (Triton backend): a token at once."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Float32

from lmdeploy_jax.pallas_kernels.recurrent_step import recurrent_step
from lmdeploy_jax.pallas_kernels.spans import Spans


def step(
    q: Float[Array, "S H D"],
    k: Float[Array, "S H D"],
    v: Float[Array, "S H R V"],
    log_decay: Float32[Array, "S H R"],
    beta: Float32[Array, "S H R"],
    states: Float32[Array, "slots N D V"],
    spans: Spans,
    wanted: Bool[Array, "S"] | None = None,
    *,
    interpret: bool,
) -> tuple[Float32[Array, "S H R V"], Float32[Array, "slots N D V"]]:
    """As `xla.step`; the outputs of those that are not `wanted` are 0."""
    return recurrent_step(q, k, v, log_decay, beta, states, spans, wanted, interpret=interpret)
