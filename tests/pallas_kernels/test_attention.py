"""Decode and prefill attention, every implementation, against a full softmax in numpy.

The caches hold NaN in every slot without a token, so that reading one slot too many shows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.prefill_attention import prefill_attention
from tests.pallas_kernels.reference import PagedBatch, Shape, decode_case, prefill_case, relative_error

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
ALL = {"scale": 0.2, "window": 70, "soft_cap": 3.0}
LONG = (700, 1, 64, 129, 300, 5, 128, 1000)  # several tiles, and blocks of keys, of one sequence
SHORT = (3, 0, 64, 1)  # one page each: decode does not split

XLA = [
    Shape("plain", group=1, options={"scale": 0.2}),
    Shape("window", group=2, options={"scale": 0.2, "window": 50}),
    Shape("everything", group=7, options=ALL, sinks=True),
    Shape("bfloat16", group=2, dtype="bfloat16", options={"scale": 0.2}, sinks=True),
]
INTERPRET = [
    Shape("plain", group=2, head_dim=64, options={"scale": 0.2}),
    Shape("everything-80", group=7, head_dim=80, options=ALL, sinks=True),
    Shape("bfloat16-96", group=1, head_dim=96, dtype="bfloat16", options={"scale": 0.1, "soft_cap": 5.0}),
    Shape("one-page", group=3, head_dim=16, lengths=SHORT, options={"scale": 0.2}, sinks=True),
]
DEVICE = [
    *INTERPRET,
    *XLA[1:],
    Shape("head-128", group=4, head_dim=128, dtype="bfloat16", options={"scale": 0.1}),
    Shape("head-256", group=16, head_dim=256, dtype="float16", options={"scale": 0.05, "window": 64}),
]

MOSAIC = [
    Shape("mosaic-128", group=4, head_dim=128, dtype="bfloat16", options={"scale": 0.1}, lengths=LONG),
    Shape("mosaic-64", group=7, head_dim=64, dtype="float16", options={"scale": 0.1}, lengths=LONG),
]

CASES = [("xla", shape) for shape in XLA] + [("pallas_interpret", shape) for shape in INTERPRET]
GPU_CASES = [pytest.param("pallas", shape, marks=pytest.mark.gpu) for shape in DEVICE]


@pytest.mark.parametrize(("backend", "shape"), [*CASES, *GPU_CASES], ids=str)
@pytest.mark.parametrize("op", [paged_attention, prefill_attention], ids=["decode", "prefill"])
def test_equals_full_softmax(op: object, backend: str, shape: Shape) -> None:
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    case = decode_case if op is paged_attention else prefill_case
    out, expected = case(op, PagedBatch(shape), backend)
    assert relative_error(out, expected) < TOLERANCE[shape.dtype]
    assert not out[np.all(expected == 0, axis=(1, 2))].any(), "a row that sees nothing is not zero"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", MOSAIC, ids=str)
def test_mosaic_prefill_equals_full_softmax(shape: Shape) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    out, expected = prefill_case(prefill_attention, PagedBatch(shape, unused=100.0), "mosaic")
    assert relative_error(out, expected) < TOLERANCE[shape.dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_xla_on_cpu_never_copies_the_cache(dtype: str) -> None:
    cache = jax.ShapeDtypeStruct((300, 2, 64, 64), dtype)
    arrays = [
        jax.ShapeDtypeStruct((2, 4, 64), dtype),
        cache,
        cache,
        *(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, 8), (2,))),
    ]
    attend = jax.jit(lambda *a: paged_attention(*a, jnp.zeros((2, 2), int), scale=1.0, backend="xla")[0])
    memory = attend.lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 300 * 2 * 64 * 64


def test_a_shape_that_does_not_fit_is_refused() -> None:
    cache, table, lens = jnp.zeros((2, 2, 64, 16)), jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    zeros, q = jnp.zeros((1, 2), int), jnp.zeros((1, 2, 16))
    with pytest.raises(ValueError, match="multiple of the KV heads"):
        paged_attention(jnp.zeros((1, 3, 16)), cache, cache, table, lens, zeros, scale=1.0, backend="xla")
    with pytest.raises(ValueError, match="window is 0"):
        paged_attention(q, cache, cache, table, lens, zeros, scale=1.0, window=0, backend="xla")
    with pytest.raises(ValueError, match=r"arrivals has shape \(1, 3\)"):
        paged_attention(q, cache, cache, table, lens, jnp.zeros((1, 3), int), scale=1.0, backend="xla")
    with pytest.raises(ValueError, match=r"must be \[tiles, 4\]"):
        prefill_attention(jnp.zeros((1, 2, 16)), cache, cache, table, lens, scale=1.0, backend="xla")
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        paged_attention(q, cache, cache, table, lens, zeros, scale=1.0, backend="cuda")
