"""Bias, norms, rotation and KV write, every implementation, against numpy."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork, rope_kv_write

PAGES, EPS = 5, 1e-5
# The 7s and the 0 are padding rows in page 0; the negative ones must not reach other pages.
SLOTS = np.asarray([64, 127, -1, 319, 7, 0, 7, 200, -64], np.int32)
TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 1e-3}


@dataclass(frozen=True)
class Case:
    name: str
    head_dim: int
    group: int = 2
    kv_heads: int = 2
    dtype: str = "float32"
    rotary: int | None = None  # elements that rotate
    bias: bool = False
    norm: bool = False
    offset: float = 0.0
    parts: int = 1
    cache_dtype: str | None = None
    unscaled: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain-80", 80, kv_heads=3, bias=True),
    Case("llama-64", 64, group=7, rotary=64, bias=True, dtype="bfloat16"),
    Case("qwen3-128", 128, group=4, rotary=128, norm=True, dtype="bfloat16", parts=4),
    Case(
        "partial-96",
        96,
        group=1,
        rotary=48,
        norm=True,
        bias=True,
        parts=2,
        cache_dtype="bfloat16",
        unscaled=True,
    ),
    Case("gemma3-256", 256, rotary=256, norm=True, offset=1.0, dtype="float16"),
]


@pytest.mark.parametrize(
    "backend", ["xla", "pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_numpy_and_writes_nothing_else(case: Case, backend: str) -> None:
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    inputs = Inputs(case)
    op = jax.jit(
        lambda *arrays: rope_kv_write(*arrays, dtype=case.dtype, backend=backend),
        donate_argnums=(1, 2),
    )
    caches = [jnp.asarray(cache) for cache in inputs.caches]
    q, *caches = op(inputs.qkv, *caches, jnp.asarray(SLOTS), inputs.work)
    want_q, want_k, want_v = inputs.expected()
    assert_near(q, want_q, case.dtype)
    for got, before, rows in zip(caches, inputs.caches, (want_k, want_v), strict=True):
        got, before = np.asarray(got, np.float32), np.array(before, np.float32)
        untouched = np.ones((PAGES, 64), bool)
        untouched[0, [0, 7]] = False
        for slot, row in zip(SLOTS, rows, strict=True):
            if slot >= 64:
                assert_near(got[slot // 64, :, slot % 64], row, case.cache_dtype or case.dtype)
                untouched[slot // 64, slot % 64] = False
        np.testing.assert_array_equal(got.swapaxes(1, 2)[untouched], before.swapaxes(1, 2)[untouched])


class Inputs:
    """Random arrays of a case, and what numpy makes of them in float64."""

    def __init__(self, case: Case) -> None:
        self.case, self.rng = case, np.random.default_rng(1)
        tokens, rows = len(SLOTS), (case.kv_heads, case.group + 2, case.head_dim)
        cache = (PAGES, case.kv_heads, 64, case.head_dim)
        self.caches = [np.asarray(self._draw(*cache), case.cache_dtype or case.dtype) for _ in range(2)]
        self.qkv = self._draw(case.parts, tokens, *rows)
        if case.parts == 1:
            self.qkv = self.qkv[0].astype(case.dtype)
        angles = self.rng.uniform(0, 6, (tokens, (case.rotary or 0) // 2)).astype(np.float32)
        norms = (1 + 0.3 * self._draw(case.head_dim).astype(case.dtype) for _ in range(2))
        q_norm, k_norm = norms if case.norm else (None, None)
        bias = self._draw(*rows).astype(case.dtype) if case.bias else None
        turn = (np.cos(angles), np.sin(angles)) if case.rotary else (None, None)
        squares = np.float32([0.1, 0.2]) if case.unscaled else None
        work = HeadWork(bias, q_norm, k_norm, *turn, EPS, case.offset, squares)
        self.work = jax.tree.map(jnp.asarray, work)

    def _draw(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(jnp.dtype(self.case.dtype)).astype(np.float32)

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        work = jax.tree.map(lambda x: np.asarray(x, np.float64), self.work)
        qkv = np.asarray(self.qkv, np.float64)
        qkv = qkv.sum(0) if qkv.ndim == 5 else qkv
        if work.mean_squares is not None:
            qkv = qkv / np.sqrt(work.mean_squares.sum())
        if work.bias is not None:
            qkv = qkv + work.bias
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        return self._turned(q, work.q_norm, work), self._turned(k, work.k_norm, work), v

    def _turned(self, x: np.ndarray, weight: np.ndarray | None, work: HeadWork) -> np.ndarray:
        if weight is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * (weight + self.case.offset)
        if work.cos is None:
            return x
        half = self.case.rotary // 2
        pairs = x[..., :half] + 1j * x[..., half : 2 * half]
        turn = (work.cos + 1j * work.sin).reshape(len(SLOTS), *(1,) * (x.ndim - 2), half)
        pairs = pairs * turn
        return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


def assert_near(got: jax.Array, want: np.ndarray, dtype: str) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_xla_on_cpu_writes_in_place(dtype: str) -> None:
    cache = jax.ShapeDtypeStruct((300, 2, 64, 64), dtype)
    qkv, slots = jax.ShapeDtypeStruct((4, 2, 3, 64), dtype), jax.ShapeDtypeStruct((4,), jnp.int32)
    write = jax.jit(
        lambda *arrays: rope_kv_write(*arrays, HeadWork(), dtype=dtype, backend="xla"), donate_argnums=(1, 2)
    )
    memory = write.lower(qkv, cache, cache, slots).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100_000
    assert memory.alias_size_in_bytes == 2 * np.prod(cache.shape) * cache.dtype.itemsize


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_shape_that_does_not_fit_is_refused() -> None:
    cache, slots, qkv = jnp.zeros((2, 2, 64, 16)), jnp.zeros(3, jnp.int32), jnp.zeros((3, 2, 4, 16))

    def call(qkv: jax.Array, cache: jax.Array, work: HeadWork) -> None:
        rope_kv_write(qkv, cache, cache, slots, work, dtype="float32", backend="xla")

    with pytest.raises(ValueError, match=r"qkv must be \[3, 2, query heads"):
        call(qkv[:2], cache, HeadWork())
    with pytest.raises(ValueError, match="no query head"):
        call(qkv[:, :, :2], cache, HeadWork())
    with pytest.raises(ValueError, match="page size is 32"):
        call(qkv, cache[:, :, :32], HeadWork())
    with pytest.raises(ValueError, match=r"bias has shape \(16,\); it must be \(2, 4, 16\)"):
        call(qkv, cache, HeadWork(bias=jnp.zeros(16)))
    with pytest.raises(ValueError, match="rotate 20 elements of heads that have 16"):
        call(qkv, cache, HeadWork(cos=jnp.zeros((3, 10)), sin=jnp.zeros((3, 10))))
