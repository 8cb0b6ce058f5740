"""State space duality, the recurrence of Mamba 2 (Dao and Gu, 2024): one matrix a head and sequence."""

from __future__ import annotations

from functools import partial

from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.advance import advance_by
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.spans import Spans
from lmdeploy_jax.pallas_kernels.ssd import xla
from lmdeploy_jax.pallas_kernels.token_blocks import Step


def ssd(
    x: Float[Array, "T G R P"],
    dt: Float32[Array, "T G R"],
    a: Float32[Array, "G R"],
    b: Float[Array, "T G N"],
    c: Float[Array, "T G N"],
    d: Float32[Array, "G R"],
    states: Float32[Array, "slots H N P"],
    spans: Spans,
    *,
    backend: str = "xla",
) -> tuple[Float32[Array, "T G R P"], Float32[Array, "slots H N P"]]:
    """Token by token, of each of R heads a group: `h <- exp(a dt) h + dt b x'`, and the output `h'c + d x`. A
    sequence's h is 0 before its first token and in `states` after the tokens of earlier steps.

    Everything in f32. Returns the outputs, of tokens that only pad the step anything finite, and the states
    behind the step, in place where the caller donates them. Blocks of longer chunks are prepared by XLA with
    every backend.
    Raises ValueError for shapes that do not fit.
    """
    groups, per_group, size = x.shape[1:]
    expected = (groups * per_group, b.shape[2], size)
    if states.shape[1:] != expected or b.shape != c.shape:
        raise ValueError(
            f"states of shape {states.shape} must be [slots, {', '.join(map(str, expected))}], as inputs of "
            f"shape {x.shape} and b of shape {b.shape} are, and c {c.shape} like b"
        )
    step = _step(backend)
    run = step if spans.starts is None else partial(xla.packed, step=step, advance=advance_by(backend))
    out, states = run(x, dt, a * dt, b, c, states, spans)
    return out + d[..., None] * x, states


def _step(backend: str) -> Step:
    check_backend(backend)
    if backend == "xla":
        return xla.step
    from lmdeploy_jax.pallas_kernels.ssd import pallas  # CPUs never need it

    return partial(pallas.step, interpret=backend == "pallas_interpret")
