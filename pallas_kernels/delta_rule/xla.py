"""The gated delta rule as plain XLA operations: a token at once, and in its chunked form."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Float32

from lmdeploy_jax.pallas_kernels.spans import Spans
from lmdeploy_jax.pallas_kernels.token_blocks import BLOCK, Block, for_blocks, put_rows, take_block, take_rows

Inputs = tuple[Array, Array, Array, Array, Array]  # q, k, v, log_decay, beta
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


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
) -> tuple[Float32[Array, "T H R V"], Float32[Array, "slots N D V"]]:
    """Chunks, one behind the other: those of one token at once, the others block by block."""
    inputs: Inputs = (q, k, v, log_decay, beta)
    q1, k1, v1, decay1, beta1 = take_rows(inputs, spans)
    single, states = step(q1, k1, v1, decay1, beta1, states, spans, spans.counts == 1)
    out = put_rows(jnp.zeros((len(q) + BLOCK, *v.shape[1:]), jnp.float32), single, spans)
    padded = tuple(jnp.pad(x, ((0, BLOCK), *((0, 0),) * (x.ndim - 1))) for x in inputs)

    def block(at: Block, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, states = carry
        before = jnp.where(at.fresh, 0.0, states[at.slot])
        values, after = _block(take_block(padded, at), before)
        return at.put(out, values), states.at[at.slot].set(after)

    out, states = for_blocks(spans, block, (out, states))
    return out[: len(q)], states


def _block(
    inputs: Inputs, state: Float32[Array, "N D V"]
) -> tuple[Float32[Array, "B H R V"], Float32[Array, "N D V"]]:
    """A block of tokens of one sequence, whose updates of the state depend on each other in one triangular
    system. Rows of zeros change nothing.
    """
    q, k, v, log_decay, beta = (x.astype(jnp.float32) for x in inputs)
    before = state.reshape(*v.shape[1:3], *state.shape[1:])
    total = jnp.cumsum(log_decay, axis=0).transpose(1, 2, 0)  # [H, R, B]
    beta = beta.transpose(1, 2, 0)[..., None]
    between = _decay_between(total)
    grown = jnp.exp(total)[..., None]
    system = beta * between * einsum("ihd,jhd->hij", k, k)[:, None]
    given = beta * (v.transpose(1, 2, 0, 3) - grown * einsum("ihd,hrdv->hriv", k, before))
    added = solve_triangular(jnp.tril(system, -1), given, lower=True, unit_diagonal=True)
    out = grown * einsum("ihd,hrdv->hriv", q, before)
    out += einsum("hrij,hrjv->hriv", between * einsum("ihd,jhd->hij", q, k)[:, None], added)
    left = jnp.exp(total[..., -1:] - total)[..., None]
    after = grown[..., -1:, :] * before + einsum("ihd,hriv->hrdv", k, left * added)
    return out.transpose(2, 0, 1, 3), after.reshape(state.shape)


def _decay_between(total: Float32[Array, "H R B"]) -> Float32[Array, "H R B B"]:
    """What is left at token i of what token j has added; 0 for later ones, whose exponents might overflow."""
    differences = total[..., :, None] - total[..., None, :]
    return jnp.exp(jnp.where(jnp.tri(total.shape[-1], dtype=bool), differences, -jnp.inf))
