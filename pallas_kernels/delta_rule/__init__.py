"""The gated delta rule (Yang et al., 2024): a recurrence over one matrix a head and sequence."""

from __future__ import annotations

from functools import partial

from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.advance import advance_by
from lmdeploy_jax.pallas_kernels.delta_rule import xla
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.spans import Spans
from lmdeploy_jax.pallas_kernels.token_blocks import Step


def delta_rule(
    q: Float[Array, "T H D"],
    k: Float[Array, "T H D"],
    v: Float[Array, "T H R V"],
    log_decay: Float32[Array, "T H R"],
    beta: Float32[Array, "T H R"],
    states: Float32[Array, "slots N D V"],
    spans: Spans,
    *,
    backend: str = "xla",
) -> tuple[Float32[Array, "T H R V"], Float32[Array, "slots N D V"]]:
    """Token by token, of each of R value heads a key head: `S <- exp(log_decay) S`, `S <- S + k d'` with
    `d = beta (v - S'k)`, and the output `S'q`. A sequence's S is 0 before its first token and in `states`
    after the tokens of earlier steps.

    Everything in f32. Returns the outputs, of tokens that only pad the step anything finite, and the states
    behind the step, in place where the caller donates them. Blocks of longer chunks are prepared by XLA with
    every backend.
    Raises ValueError for shapes that do not fit.
    """
    heads, per_key = v.shape[1:3]
    if states.shape[1:] != (heads * per_key, k.shape[2], v.shape[3]) or q.shape != k.shape:
        raise ValueError(
            f"states of shape {states.shape} must be [slots, {heads * per_key}, {k.shape[2]}, {v.shape[3]}], "
            f"as keys of shape {k.shape} and values of shape {v.shape} are, and queries {q.shape} like keys"
        )
    step = _step(backend)
    if spans.starts is None:
        return step(q, k, v, log_decay, beta, states, spans)
    return xla.packed(q, k, v, log_decay, beta, states, spans, step, advance_by(backend))


def _step(backend: str) -> Step:
    check_backend(backend)
    if backend == "xla":
        return xla.step
    from lmdeploy_jax.pallas_kernels.delta_rule import pallas  # CPUs never need it

    return partial(pallas.step, interpret=backend == "pallas_interpret")
