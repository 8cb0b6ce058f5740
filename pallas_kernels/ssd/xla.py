"""State space duality as plain XLA operations: a token at once, and in its chunked form."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from lmdeploy_jax.pallas_kernels.spans import Spans
from lmdeploy_jax.pallas_kernels.token_blocks import (
    Advance,
    Prepared,
    Step,
    einsum,
    in_turn,
    prepared,
    run_packed,
)

Inputs = tuple[Array, Array, Array, Array, Array]  # x, dt, log_decay, b, c


def step(
    x: Float[Array, "S G R P"],
    dt: Float32[Array, "S G R"],
    log_decay: Float32[Array, "S G R"],
    b: Float[Array, "S G N"],
    c: Float[Array, "S G N"],
    states: Float32[Array, "slots H N P"],
    spans: Spans,
    wanted: Bool[Array, "S"] | None = None,
) -> tuple[Float32[Array, "S G R P"], Float32[Array, "slots H N P"]]:
    """One token a sequence, without what skips the state; the states of those that are not `wanted` stay as
    they are.
    """
    x, b, c = (each.astype(jnp.float32) for each in (x, b, c))
    before = spans.before(states)
    before = before.reshape(*x.shape[:3], *before.shape[2:])
    decay, added = jnp.exp(log_decay)[..., None], dt[..., None] * x
    after = decay[..., None] * before + b[:, :, None, :, None] * added[..., None, :]
    seen = decay * einsum("tgn,tgrnp->tgrp", c, before)
    out = seen + einsum("tgn,tgn->tg", c, b)[..., None, None] * added
    return out, spans.put(states, after.reshape(len(after), *states.shape[1:]), wanted)


def packed(
    x: Float[Array, "T G R P"],
    dt: Float32[Array, "T G R"],
    log_decay: Float32[Array, "T G R"],
    b: Float[Array, "T G N"],
    c: Float[Array, "T G N"],
    states: Float32[Array, "slots H N P"],
    spans: Spans,
    step: Step,
    advance: Advance = in_turn,
) -> tuple[Float32[Array, "T G R P"], Float32[Array, "slots H N P"]]:
    """Chunks, one behind the other; `step` does those of one token, `advance` blocks in turn."""
    return run_packed((x, dt, log_decay, b, c), states, spans, step, _prepare, advance)


def _prepare(inputs: Inputs) -> Prepared:
    """A block of tokens of one sequence. Rows of zeros change nothing."""
    x, dt, log_decay, b, c = (each.astype(jnp.float32) for each in inputs)
    total = jnp.cumsum(log_decay, axis=0).transpose(1, 2, 0)  # [G, R, B]
    return prepared(c, b, (dt[..., None] * x).transpose(1, 2, 0, 3), total)
