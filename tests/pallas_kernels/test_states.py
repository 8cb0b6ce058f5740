"""Ops over a state a sequence, held against loops over single tokens in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.delta_rule import delta_rule
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles
from lmdeploy_jax.pallas_kernels.short_conv import short_conv
from lmdeploy_jax.pallas_kernels.spans import decode_spans, ragged_spans
from lmdeploy_jax.pallas_kernels.ssd import ssd

HEADS, PER_KEY, KEY, VALUE, TAPS = 2, 3, 8, 6, 4
ROWS, TOKENS, TILE = 4, 256, 16
LENGTHS = (150, 70, 3, 1)
STEPS = (  # (sequence, tokens) of each step; sequence 1 is cut within a block, at a block's end and singly
    ((1, 2), (0, 150)),
    ((1, 62), (2, 1)),
    ((2, 1), (3, 1), (1, 1)),
    ((1, 4), (2, 1)),
)
SLOTS = (3, 0, 4, 1)  # of the sequences; 2 is a stranger's, 5 nobody's


def drawn(shapes: Sequence[tuple[int, ...]], seed: int) -> list[list[np.ndarray]]:
    """Of each sequence, arrays of as many rows as it has tokens."""
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=(n, *shape)).astype(np.float32) for shape in shapes] for n in LENGTHS]


def delta_inputs() -> list[list[np.ndarray]]:
    shapes = [(HEADS, KEY)] * 2 + [(HEADS, PER_KEY, VALUE)] + [(HEADS, PER_KEY)] * 2
    found = []
    for q, k, v, decay, beta in drawn(shapes, 1):
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        found.append([q, k, v, -np.exp(decay), 1 / (1 + np.exp(-beta))])
    return found


def delta_expected(q, k, v, decay, beta) -> np.ndarray:
    q, k, v, decay, beta = (x.astype(np.float64) for x in (q, k, v, decay, beta))
    state, out = np.zeros((HEADS, PER_KEY, KEY, VALUE)), np.zeros_like(v)
    for t in range(len(q)):
        state *= np.exp(decay[t])[..., None, None]
        delta = beta[t][..., None] * (v[t] - np.einsum("hd,hrdv->hrv", k[t], state))
        state += np.einsum("hd,hrv->hrdv", k[t], delta)
        out[t] = np.einsum("hd,hrdv->hrv", q[t], state)
    return out


A, D = np.random.default_rng(3).normal(size=(2, HEADS, PER_KEY)).astype(np.float32)


def ssd_inputs() -> list[list[np.ndarray]]:
    shapes = [(HEADS, PER_KEY, VALUE), (HEADS, PER_KEY), (HEADS, KEY), (HEADS, KEY)]
    return [[x, np.log1p(np.exp(dt)), b, c] for x, dt, b, c in drawn(shapes, 5)]


def ssd_expected(x, dt, b, c) -> np.ndarray:
    x, dt, b, c = (each.astype(np.float64) for each in (x, dt, b, c))
    state, out = np.zeros((HEADS, PER_KEY, KEY, VALUE)), np.zeros_like(x)
    for t in range(len(x)):
        state *= np.exp(-np.exp(A.astype(np.float64)) * dt[t])[..., None, None]
        state += np.einsum("gn,grp->grnp", b[t], dt[t][..., None] * x[t])
        out[t] = np.einsum("gn,grnp->grp", c[t], state) + D[..., None] * x[t]
    return out


def space(x, dt, b, c, states, spans, **how):
    return ssd(x, dt, -jnp.exp(A), b, c, jnp.asarray(D), states, spans, **how)


WEIGHT = np.random.default_rng(0).normal(size=(HEADS, KEY, TAPS)).astype(np.float32)
BIAS = np.random.default_rng(6).normal(size=(HEADS, KEY)).astype(np.float32)


def conv_expected(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x.astype(np.float64), ((TAPS - 1, 0), (0, 0), (0, 0)))
    return BIAS + sum(padded[j : j + len(x)] * WEIGHT[:, :, j] for j in range(TAPS))


def conv(x, states, spans, **how):
    return short_conv(x, jnp.asarray(WEIGHT), states, spans, jnp.asarray(BIAS), **how)


Case = tuple[list[list[np.ndarray]], Callable, Callable, tuple[int, ...]]
CASES: dict[str, Case] = {
    "delta_rule": (delta_inputs(), delta_expected, delta_rule, (HEADS * PER_KEY, KEY, VALUE)),
    "ssd": (ssd_inputs(), ssd_expected, space, (HEADS * PER_KEY, KEY, VALUE)),
    "short_conv": (drawn([(HEADS, KEY)], 2), conv_expected, conv, (HEADS, TAPS - 1, KEY)),
}


@pytest.fixture(params=["xla", "pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)])
def backend(request):
    if request.param == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    return request.param


@pytest.fixture(params=CASES)
def case(request, backend):
    name = request.param
    inputs, expected, op, shape = CASES[name]
    return inputs, expected, partial(op, backend=backend), shape


def garbage(shape: tuple[int, ...]) -> np.ndarray:
    """What other sequences left in the slots, and NaN in nobody's."""
    states = np.full((max(SLOTS) + 2, *shape), 7.0, np.float32)
    states[-1] = np.nan
    return states


def jitted(op: Callable) -> Callable:
    def run(arrays, states, spans: Callable, *where):
        return op(*arrays, states, spans(*where))

    return jax.jit(run, static_argnums=2)


def packed(op: Callable, inputs, states, step, done):
    """One step of chunks -> the chunks' outputs, and the states."""
    counts = [count for _, count in step]
    starts = np.cumsum([0, *counts])
    arrays = [np.full((TOKENS, *x.shape[1:]), 0.5, np.float32) for x in inputs[0]]
    slots = np.full(ROWS, len(states) - 1, np.int32)
    for row, (sequence, count) in enumerate(step):
        slots[row] = SLOTS[sequence]
        for array, x in zip(arrays, inputs[sequence], strict=True):
            array[starts[row] : starts[row + 1]] = x[done[sequence] : done[sequence] + count]
    firsts = [done[sequence] for sequence, _ in step]
    width = max_tiles(TOKENS, ROWS, TILE)
    tiles = build_tiles(range(len(step)), starts[:-1], counts, firsts, TILE, width)
    out, states = op(arrays, states, ragged_spans, slots, tiles)
    assert np.isfinite(out).all()
    return np.split(np.asarray(out), starts[1:])[:-1], states


def test_chunks_of_any_size_are_the_loop_over_tokens(case):
    inputs, expected, op, shape = case
    states, done = garbage(shape), [0] * len(inputs)
    got: list[list[np.ndarray]] = [[] for _ in inputs]
    run = jitted(op)
    for step in STEPS:
        outs, states = packed(run, inputs, states, step, done)
        for (sequence, count), out in zip(step, outs, strict=True):
            got[sequence].append(out)
            done[sequence] += count
    for sequence, arrays in enumerate(inputs):
        want = expected(*(x[: done[sequence]] for x in arrays))
        np.testing.assert_allclose(np.concatenate(got[sequence]), want, rtol=1e-5, atol=2e-5)
    assert (np.asarray(states)[2] == 7.0).all()  # a stranger's


def test_single_tokens_go_on_where_chunks_ended(case):
    inputs, expected, op, shape = case
    run, count = jitted(op), 9
    states, lens = garbage(shape), np.array([66, 0, 0, 0], np.int32)
    _, states = packed(run, inputs, states, ((0, 65),), [0] * 4)
    got: list[list[np.ndarray]] = [[], []]
    for t in range(count):
        rows = [65 + t, t, 0, 0]  # sequence 0 goes on, sequence 1 begins; the others pad
        lens = np.array([66 + t, t + 1, 0, 0], np.int32)
        arrays = [
            np.stack([inputs[s][i][row] for s, row in zip((0, 1, 0, 0), rows, strict=True)])
            for i in range(len(inputs[0]))
        ]
        slots = np.array([SLOTS[0], SLOTS[1], len(states) - 1, SLOTS[2]], np.int32)
        out, states = run(arrays, states, decode_spans, slots, lens)
        assert np.isfinite(out).all()
        for sequence in (0, 1):
            got[sequence].append(np.asarray(out[sequence]))
    for sequence, first in ((0, 65), (1, 0)):
        want = expected(*(x[: first + count] for x in inputs[sequence]))[first:]
        np.testing.assert_allclose(np.stack(got[sequence]), want, rtol=1e-5, atol=2e-5)
    assert (np.asarray(states)[SLOTS[2]] == 7.0).all()  # a row without a token changes nothing


def test_wrong_shapes_are_named():
    op, inputs = jitted(delta_rule), delta_inputs()[2]
    where = (decode_spans, np.zeros(3, np.int32), np.ones(3, np.int32))
    with pytest.raises(ValueError, match=r"states of shape \(2, 5, 8, 6\) must be \[slots, 6, 8, 6\]"):
        op(inputs, np.zeros((2, 5, KEY, VALUE), np.float32), *where)
    with pytest.raises(ValueError, match=r"states of shape \(2, 5, 8, 6\) must be \[slots, 6, 8, 6\]"):
        jitted(space)(ssd_inputs()[2], np.zeros((2, 5, KEY, VALUE), np.float32), *where)
    with pytest.raises(ValueError, match=r"states are \[slots, 2, 3, 8\]"):
        jitted(conv)(drawn([(HEADS, KEY)], 2)[2], np.zeros((2, 2, 4, 8), np.float32), *where)
