"""Latent attention against a softmax over each sequence's latents, in two chunks and a token each."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.latent_attention import latent_attention, latent_queries, pallas
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork

RANK, TAIL = 12, 4
OPTIONS = AttentionOptions(0.3)
LENGTHS = (70, 9)  # tokens of the two sequences, the last of each decoded


def expected(q: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Of one sequence, q [n, H, D] of its last n tokens, latents [L, D]."""
    logits = np.einsum("nhd,ld->nhl", q, latents) * OPTIONS.scale
    first = len(latents) - len(q)
    seen = np.arange(len(latents)) <= first + np.arange(len(q))[:, None]
    weights = np.where(seen[:, None], np.exp(logits - logits.max(-1, keepdims=True)), 0)
    return np.einsum("nhl,lr->nhr", weights / weights.sum(-1, keepdims=True), latents[:, :RANK])


@pytest.mark.parametrize(
    ("backend", "rows"),
    [("xla", 8), ("pallas_interpret", 128), pytest.param("pallas", 128, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize(("heads", "programs"), [(5, 132), (20, 1)])
def test_chunks_and_tokens_attend_to_all_before_them(backend, rows, heads, programs, monkeypatch):
    """With one block of heads and two, neither of which they fill, and pages that are split and not."""
    monkeypatch.setattr(pallas, "PROGRAMS", programs)
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng(0)
    qs, latents = ([rng.normal(size=(n, *s)).astype(np.float32) for n in LENGTHS]
                   for s in ((heads, RANK + TAIL), (RANK + TAIL,)))  # fmt: skip
    table = np.array([[3, 1], [2, 0]], np.int32)
    pages = np.full((4, 1, PAGE_SIZE, RANK + TAIL), np.nan, np.float32)
    positions = [np.arange(n) for n in LENGTHS]
    slots = [table[i][p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for i, p in enumerate(positions)]
    run = jax.jit(latent_attention, static_argnames=("rank", "options", "tile_rows", "backend"))
    how = {"rank": RANK, "options": OPTIONS, "tile_rows": rows, "backend": backend}

    def step(spans, tiles):
        parts = (qs, latents, slots)
        q, new, at = (np.concatenate([x[i][a:b] for i, (a, b) in enumerate(spans)]) for x in parts)
        lens = np.array([b for _, b in spans], np.int32)
        return run(q, new, pages, at.astype(np.int32), table, lens, tiles, **how)

    for spans in ([(0, 66), (0, 5)], [(66, 69), (5, 8)]):
        counts, firsts = [b - a for a, b in spans], [a for a, _ in spans]
        starts = np.cumsum([0, *counts])[:-1]
        width = max_tiles(sum(counts), 2, rows)
        out, pages = step(spans, build_tiles((0, 1), starts, counts, firsts, rows, width))
        for i, (a, b) in enumerate(spans):
            want = expected(qs[i][a:b], latents[i][:b])
            np.testing.assert_allclose(out[starts[i] : starts[i] + b - a], want, rtol=1e-4, atol=1e-5)
    out, _ = step([(n - 1, n) for n in LENGTHS], None)
    want = np.concatenate([expected(q[-1:], x) for q, x in zip(qs, latents, strict=True)])
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("tokens", "rank", "turning"), [(1, 24, 4), (70, 136, None)])
def test_queries_are_led_into_the_latents_space(tokens, rank, turning, backend):
    """One row and several blocks of them, blocks of columns that nothing fills, and tails of which some
    elements turn or none.
    """
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    heads, nope, tail, value_dim = 3, 12, 6, 40
    shapes = (tokens, heads, nope + tail), (tokens, rank + tail), (heads, nope + value_dim, rank), (rank,)
    rng = np.random.default_rng(0)
    *arrays, norm = (jax.numpy.asarray(rng.normal(size=s), "float32") for s in shapes)
    angles = rng.normal(size=(2, tokens, (turning or 2) // 2))
    turn = (None, None) if turning is None else map(partial(jax.numpy.asarray, dtype="float32"), angles)
    work = HeadWork(None, None, norm, *turn)
    found, wanted = (latent_queries(*arrays, work, backend=each) for each in (backend, "xla"))
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_pages_that_do_not_fit_are_named():
    q, new, ints = np.zeros((2, 3, 16), np.float32), np.zeros((2, 16), np.float32), np.zeros(2, np.int32)
    pages = np.zeros((2, 2, PAGE_SIZE, 16), np.float32)
    with pytest.raises(ValueError, match=r"pages of shape \(2, 2, 64, 16\) must be \[pages, 1, 64, 16\]"):
        latent_attention(
            *map(jax.numpy.asarray, (q, new, pages, ints, ints[None].repeat(2, 0), ints)), None,
            rank=12, options=OPTIONS, tile_rows=8,
        )  # fmt: skip
