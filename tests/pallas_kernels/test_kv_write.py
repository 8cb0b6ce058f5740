"""KV write, every implementation, against assignment in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import kv_write

PAGES, KV_HEADS, HEAD_DIM = 5, 3, 80  # neither heads nor head size fill a power of two
SLOTS = np.asarray([64, 127, 319, 7, 0, 7, 200], np.int32)  # the 7s and the 0 are padding rows in page 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "backend", ["xla", "pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)]
)
def test_writes_the_slots_and_nothing_else(backend: str, dtype: str) -> None:
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng(1)
    caches = [jnp.asarray(rng.normal(size=(PAGES, KV_HEADS, 64, HEAD_DIM)), dtype) for _ in range(2)]
    rows = [jnp.asarray(rng.normal(size=(len(SLOTS), KV_HEADS, HEAD_DIM)), dtype) for _ in range(2)]
    expected = [_assigned(cache, new) for cache, new in zip(caches, rows, strict=True)]
    write = jax.jit(lambda *arrays: kv_write(*arrays, backend=backend), donate_argnums=(0, 1))
    for got, want in zip(write(*caches, *rows, jnp.asarray(SLOTS)), expected, strict=True):
        got = np.array(got)
        got[0, :, 7] = want[0, :, 7]  # either of the two padding rows may have come last
        np.testing.assert_array_equal(got, want)


def _assigned(cache: jax.Array, rows: jax.Array) -> np.ndarray:
    want = np.array(cache)
    want[SLOTS // 64, :, SLOTS % 64] = np.asarray(rows)
    return want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_xla_on_cpu_writes_in_place(dtype: str) -> None:
    cache = jax.ShapeDtypeStruct((300, 2, 64, 64), dtype)
    rows, slots = jax.ShapeDtypeStruct((4, 2, 64), dtype), jax.ShapeDtypeStruct((4,), jnp.int32)
    write = jax.jit(lambda *arrays: kv_write(*arrays, backend="xla"), donate_argnums=(0, 1))
    memory = write.lower(cache, cache, rows, rows, slots).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100_000
    assert memory.alias_size_in_bytes == 2 * np.prod(cache.shape) * cache.dtype.itemsize


def test_a_shape_that_does_not_fit_is_refused() -> None:
    cache, slots = jnp.zeros((2, 2, 64, 16)), jnp.zeros(3, jnp.int32)
    rows = jnp.zeros((3, 2, 16))
    with pytest.raises(ValueError, match="k and v must"):
        kv_write(cache, cache, rows, rows[:2], slots, backend="xla")
    with pytest.raises(ValueError, match="page size is 32"):
        kv_write(cache[:, :, :32], cache[:, :, :32], rows, rows, slots, backend="xla")
