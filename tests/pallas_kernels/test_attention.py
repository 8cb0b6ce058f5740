"""Decode and prefill attention, every implementation, against a full softmax in numpy.

The caches hold NaN in every slot without a token, so that reading one slot too many shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.paged_attention import paged_attention
from lmdeploy_jax.pallas_kernels.prefill_attention import prefill_attention
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork
from tests.pallas_kernels.reference import PagedBatch, Shape, decode_case, prefill_case, relative_error

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
ALL = {"scale": 0.2, "window": 70, "soft_cap": 3.0}
LONG = (700, 1, 64, 129, 300, 5, 128, 1000)  # several tiles, and blocks of keys, of one sequence
SHORT = (3, 0, 64, 1)  # one page each: decode does not split

XLA = [
    Shape("plain", group=1, options={"scale": 0.2}),
    Shape("window", group=2, options={"scale": 0.2, "window": 50}),
    Shape("chunk", group=2, options={"scale": 0.2, "chunk": 96}),
    Shape("everything", group=7, options=ALL, sinks=True),
    Shape("bfloat16", group=2, dtype="bfloat16", options={"scale": 0.2}, sinks=True),
]
INTERPRET = [
    Shape("plain", group=2, head_dim=64, options={"scale": 0.2}),
    Shape("everything-80", group=7, head_dim=80, options=ALL, sinks=True),
    Shape("bfloat16-96", group=1, head_dim=96, dtype="bfloat16", options={"scale": 0.1, "soft_cap": 5.0}),
    Shape("chunk", group=2, head_dim=16, options={"scale": 0.2, "chunk": 50}),
    Shape("one-page", group=3, head_dim=16, lengths=SHORT, options={"scale": 0.2}, sinks=True),
    Shape("parts of pages", group=2, head_dim=512, lengths=(3, 0, 70), options={"scale": 0.05, "window": 40}),
]
DEVICE = [
    *INTERPRET,
    *(shape for shape in XLA[1:] if shape.name != "chunk"),
    Shape("head-128", group=4, head_dim=128, dtype="bfloat16", options={"scale": 0.1}),
    Shape("head-512", group=8, head_dim=512, dtype="bfloat16", options={"scale": 0.05}),
    Shape("head-256", group=16, head_dim=256, dtype="float16", options={"scale": 0.05, "window": 64}),
]

MOSAIC = [
    Shape("mosaic-128", group=4, head_dim=128, dtype="bfloat16", options={"scale": 0.1}, lengths=LONG),
    Shape("mosaic-64", group=7, head_dim=64, dtype="float16", options={"scale": 0.1}, lengths=LONG),
]

BOTH_WAYS = [
    Shape("blocks-of-20", group=2, options={"scale": 0.2}, block=20),
    Shape("blocks-in-a-window", group=1, head_dim=64, options={"scale": 0.2, "window": 50}, block=70),
    Shape("whole-sequences", group=7, head_dim=80, options=ALL, sinks=True, block=100),
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


@pytest.mark.parametrize(
    "backend", ["xla", "pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("shape", BOTH_WAYS, ids=str)
def test_blocks_attend_both_ways(backend: str, shape: Shape) -> None:
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    out, expected = prefill_case(prefill_attention, PagedBatch(shape), backend)
    assert relative_error(out, expected) < TOLERANCE[shape.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", MOSAIC, ids=str)
def test_mosaic_prefill_equals_full_softmax(shape: Shape) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    out, expected = prefill_case(prefill_attention, PagedBatch(shape, unused=100.0), "mosaic")
    assert relative_error(out, expected) < TOLERANCE[shape.dtype]


@dataclass(frozen=True)
class Fused:
    """A decode step that does everything on the way from the qkv product."""

    name: str
    head_dim: int
    group: int
    dtype: str = "float32"
    rotary: int | None = None
    norm: bool = False
    bias: bool = False
    offset: float = 0.0
    parts: int = 1
    options: dict[str, float] = field(default_factory=lambda: {"scale": 0.1})
    sinks: bool = False
    unscaled: bool = False

    def __str__(self) -> str:
        return self.name


FUSED = [
    Fused("llama", 128, 4, "bfloat16", rotary=128, parts=2, unscaled=True),
    Fused("qwen2", 64, 7, rotary=64, bias=True, parts=4),
    Fused("qwen3", 128, 2, rotary=128, norm=True, parts=2, options={"scale": 0.1, "window": 64}),
    Fused("gemma", 256, 2, "float16", rotary=256, norm=True, offset=1.0, options=ALL),
    Fused("partial-80", 80, 1, rotary=32, bias=True, options={"scale": 0.1, "window": 1}, sinks=True),
    Fused("wide-96", 96, 16, rotary=96, norm=True, bias=True, options={"scale": 0.1, "window": 65}),
]


@pytest.mark.parametrize("backend", ["pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_decode_does_what_the_separate_operations_do(case: Fused, backend: str) -> None:
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    shape = Shape(case.name, case.group, 2, case.head_dim, case.dtype, options=case.options, sinks=case.sinks)
    batch = PagedBatch(shape)
    rng, tokens = batch.rng, len(batch.lengths)
    qkv = rng.standard_normal((case.parts, tokens, 2, case.group + 2, case.head_dim)).astype(np.float32)
    angles = rng.uniform(0, 6, (tokens, (case.rotary or 0) // 2)).astype(np.float32)
    norms = [jnp.asarray(1 + 0.3 * batch.draw(case.head_dim), case.dtype) if case.norm else None] * 2
    bias = jnp.asarray(batch.draw(*qkv.shape[2:]), case.dtype) if case.bias else None
    squares = jnp.asarray([0.1, 0.2]) if case.unscaled else None
    work = HeadWork(bias, *norms, jnp.cos(angles), jnp.sin(angles), 1e-5, case.offset, squares)
    slots = batch.newest_slots()
    caches = batch.device(*(batch.without(pages, slots) for pages in (batch.k_pages, batch.v_pages)))
    arrays = (jnp.asarray(qkv), *caches, slots, batch.table, batch.lengths, np.zeros((tokens, 2), np.int32))
    sinks = None if batch.sinks is None else jnp.asarray(batch.sinks)
    options = {"options": AttentionOptions(**case.options), "dtype": case.dtype, "sinks": sinks}
    got, want = (
        jax.jit(lambda *arrays, b=b: paged_attention(*arrays, work, **options, backend=b)[:3])(*arrays)
        for b in (backend, "xla")
    )
    out, expected = (np.asarray(x[0], np.float64) for x in (got, want))
    assert relative_error(out, expected) < TOLERANCE[case.dtype]
    assert not out[batch.lengths == 0].any(), "a padding row is not zero"
    for pages, wanted in zip(got[1:], want[1:], strict=True):
        pages, wanted = (np.nan_to_num(np.asarray(x, np.float64)[1:]) for x in (pages, wanted))
        assert relative_error(pages, wanted) < TOLERANCE[case.dtype]
        np.testing.assert_array_equal(pages == 0, wanted == 0)  # NaN before, and still where nothing is


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_xla_on_cpu_never_copies_the_cache(dtype: str) -> None:
    cache, qkv = jax.ShapeDtypeStruct((300, 2, 64, 64), dtype), jax.ShapeDtypeStruct((2, 2, 4, 64), dtype)
    rest = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (2, 8), (2,))]
    op = partial(paged_attention, options=AttentionOptions(1.0), dtype=dtype, backend="xla")
    attend = jax.jit(lambda *a: op(*a, jnp.zeros((2, 2), int), HeadWork())[:3], donate_argnums=(1, 2))
    memory = attend.lower(qkv, cache, cache, *rest).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 300 * 2 * 64 * 64


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_shape_that_does_not_fit_is_refused() -> None:
    cache, table, lens = jnp.zeros((2, 2, 64, 16)), jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    zeros, qkv = jnp.zeros((1, 2), int), jnp.zeros((1, 2, 3, 16))

    plain = AttentionOptions(1.0)

    def decode(qkv: jax.Array = qkv, zeros: jax.Array = zeros, backend: str = "xla", **more: object) -> None:
        arrays = (qkv, cache, cache, lens, table, lens, zeros, HeadWork())
        paged_attention(*arrays, options=plain, dtype="float32", backend=backend, **more)

    with pytest.raises(ValueError, match="no query head"):
        decode(qkv[:, :, :2])
    with pytest.raises(ValueError, match="window is 0"):
        AttentionOptions(1.0, window=0)
    with pytest.raises(ValueError, match=r"sinks has shape \(3,\)"):
        decode(sinks=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"split_counters has shape \(1, 3\)"):
        decode(zeros=jnp.zeros((1, 3), int))
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        decode(backend="cuda")
    with pytest.raises(ValueError, match="multiple of the KV heads"):
        prefill_attention(jnp.zeros((1, 3, 16)), cache, cache, table, lens, options=plain, backend="xla")
    with pytest.raises(ValueError, match=r"must be \[tiles, 4\]"):
        prefill_attention(jnp.zeros((1, 2, 16)), cache, cache, table, lens, options=plain, backend="xla")
