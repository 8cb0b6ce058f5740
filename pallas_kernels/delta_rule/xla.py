"""The gated delta rule as plain XLA operations: a token at once, and in its chunked form."""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Float32

from lmdeploy_jax.pallas_kernels.spans import Spans
from lmdeploy_jax.pallas_kernels.token_blocks import (
    Advance,
    Prepared,
    Step,
    decay_between,
    einsum,
    in_turn,
    prepared,
    run_packed,
)

Inputs = tuple[Array, Array, Array, Array, Array]  # q, k, v, log_decay, beta


def step(
    q: Float[Array, "S H D"],
    k: Float[Array, "S H D"],
    v: Float[Array, "S H R V"],
    log_decay: Float32[Array, "S H R"],
    beta: Float32[Array, "S H R"],
    states: Float32[Array, "slots N D V"],
    spans: Spans,
    wanted: Bool[Array, "S"] | None = None,
) -> tuple[Float32[Array, "S H R V"], Float32[Array, "slots N D V"]]:
    """One token a sequence; the states of those that are not `wanted` stay as they are.

    Both products read the state as it was, so that it is read once and written once.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    before = spans.before(states)
    before = before.reshape(*v.shape[:3], *before.shape[2:])
    decay = jnp.exp(log_decay)[..., None]
    predicted, seen = einsum("xthd,thrdv->xthrv", jnp.stack([k, q]), before) * decay
    added = beta[..., None] * (v - predicted)
    after = decay[..., None] * before + k[:, :, None, :, None] * added[..., None, :]
    out = seen + einsum("thd,thd->th", q, k)[..., None, None] * added
    return out, spans.put(states, after.reshape(len(after), *states.shape[1:]), wanted)


def packed(
    q: Float[Array, "T H D"],
    k: Float[Array, "T H D"],
    v: Float[Array, "T H R V"],
    log_decay: Float32[Array, "T H R"],
    beta: Float32[Array, "T H R"],
    states: Float32[Array, "slots N D V"],
    spans: Spans,
    step: Step,
    advance: Advance = in_turn,
) -> tuple[Float32[Array, "T H R V"], Float32[Array, "slots N D V"]]:
    """Chunks, one behind the other; `step` does those of one token, `advance` blocks in turn."""
    return run_packed((q, k, v, log_decay, beta), states, spans, step, _prepare, advance)


def _prepare(inputs: Inputs) -> Prepared:
    """A block of tokens of one sequence, whose updates of the state depend on each other in one triangular
    system. Rows of zeros change nothing.
    """
    q, k, v, log_decay, beta = (x.astype(jnp.float32) for x in inputs)
    total = jnp.cumsum(log_decay, axis=0).transpose(1, 2, 0)  # [H, R, B]
    beta = beta.transpose(1, 2, 0)[..., None]
    system = beta * decay_between(total) * einsum("ihd,jhd->hij", k, k)[:, None]
    seen = jnp.exp(total)[..., None] * k.transpose(1, 0, 2)[:, None]
    given = beta * jnp.concatenate([v.transpose(1, 2, 0, 3), seen], axis=3)
    solved = solve_triangular(jnp.tril(system, -1), given, lower=True, unit_diagonal=True)
    added, removed = jnp.split(solved, [v.shape[3]], axis=3)
    return prepared(q, k, added, total, removed)
