"""Quantised caches: the arithmetic against LMDeploy's formulas in numpy, and attention against a full softmax
of what is left of keys and values. Unused slots hold scales that are NaN.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.kv_formats import E4M3, E5M2, INT4, INT8, KV_FORMATS, KVFormat
from lmdeploy_jax.pallas_kernels.paged_attention import paged_attention
from lmdeploy_jax.pallas_kernels.prefill_attention import pallas, prefill_attention, widened, xla
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages, dequantised, quantised
from tests.pallas_kernels import kv_reference
from tests.pallas_kernels.reference import PagedBatch, Shape, decode_case, prefill_case, relative_error

ALL = {"scale": 0.2, "window": 70, "soft_cap": 3.0}
ERROR = {"int8": 0.009, "int4": 0.16, "fp8_e4m3": 0.03, "fp8_e5m2": 0.06}  # of normal numbers, relative


@pytest.mark.parametrize("form", KV_FORMATS.values(), ids=lambda form: form.name)
def test_numbers_are_rounded_as_lmdeploy_rounds_them(form: KVFormat) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 2, 64)) * np.exp(rng.uniform(-9, 5, (500, 2, 1))) + rng.uniform(0, 0.1)
    x[0], x[1], x[2], x[3, :, 0] = 0, 3, -1e-3, 1e4
    x = x.astype(np.float32)
    got = np.asarray(dequantised(jax.jit(partial(quantised, form=form))(jnp.asarray(x))), np.float64)
    want = kv_reference.rounded(x, form)
    kv_reference.assert_same_numbers(got, want, form)
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_allclose(got[1:3], x[1:3], rtol=2e-3)  # equal numbers: LMDeploy divides by 0
    error = np.linalg.norm(got[4:] - x[4:], axis=-1) / np.linalg.norm(x[4:], axis=-1)
    assert np.median(error) < ERROR[form.name]


FEW = (0, 1, 65, 200, 0, 64, 130)  # of tokens
XLA = [
    Shape("int8", group=2, lengths=FEW, options={"scale": 0.2}, form=INT8),
    Shape("int4-everything", group=7, options=ALL, sinks=True, form=INT4),
    Shape("e4m3-window", group=1, lengths=FEW, options={"scale": 0.2, "window": 50}, form=E4M3),
    Shape("e5m2-chunk", group=2, lengths=FEW, options={"scale": 0.2, "chunk": 96}, form=E5M2),
]
KERNELS = [
    Shape(
        "int8-everything", 7, head_dim=32, dtype="bfloat16", lengths=FEW, options=ALL, sinks=True, form=INT8
    ),
    Shape("int4-chunk", 2, head_dim=64, lengths=FEW, options={"scale": 0.2, "chunk": 50}, form=INT4),
    Shape("e4m3", 4, head_dim=32, dtype="bfloat16", lengths=FEW, options={"scale": 0.2}, form=E4M3),
]
MORE = [
    Shape("int8-64", group=2, head_dim=64, options={"scale": 0.2}, form=INT8),
    Shape("e5m2-window", group=1, head_dim=32, options={"scale": 0.2, "window": 64}, sinks=True, form=E5M2),
]
DEVICE = [
    *KERNELS,
    *MORE,
    *(
        Shape(f"{form.name}-128", group=4, head_dim=128, dtype="bfloat16", options={"scale": 0.1}, form=form)
        for form in KV_FORMATS.values()
    ),
    Shape("int8-256", group=16, head_dim=256, dtype="float16", options={"scale": 0.05}, form=INT8),
]
CASES = [("xla", shape) for shape in XLA] + [("pallas_interpret", shape) for shape in KERNELS]
LONG_RUN = [pytest.param("pallas_interpret", shape, marks=pytest.mark.full) for shape in MORE]
GPU_CASES = [pytest.param("pallas", shape, marks=pytest.mark.gpu) for shape in DEVICE]


@pytest.mark.parametrize(("backend", "shape"), [*CASES, *LONG_RUN, *GPU_CASES], ids=str)
@pytest.mark.parametrize("op", [paged_attention, prefill_attention], ids=["decode", "prefill"])
def test_attention_equals_full_softmax(op: object, backend: str, shape: Shape) -> None:
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    case = decode_case if op is paged_attention else prefill_case
    out, expected = case(op, PagedBatch(shape), backend)
    tolerance = 1e-5 if backend == "xla" else 1e-3  # kernels multiply in float16
    assert relative_error(out, expected) < (5e-3 if shape.dtype == "bfloat16" else tolerance)
    assert not out[np.all(expected == 0, axis=(1, 2))].any(), "a row that sees nothing is not zero"


def test_prompts_read_pages_that_were_widened() -> None:
    """What Mosaic is given, read by XLA in its place; what finds no room goes through Triton."""
    lengths = (0, 200, 3, 130, 64)
    shape = Shape(
        "int8", 4, head_dim=32, dtype="bfloat16", lengths=lengths, options={"scale": 0.2}, form=INT8
    )
    out, expected = prefill_case(_through_scratch, PagedBatch(shape), "pallas_interpret")
    assert relative_error(out, expected) < 5e-3


def _through_scratch(
    q: jax.Array, k: QuantPages, v: QuantPages, table: jax.Array, tiles: jax.Array, **how: Any
) -> jax.Array:
    plan, options = widened.plan_scratch(table, tiles, room=5), how["options"]
    args = (q, k, v, table, plan.others, None, None, options)
    some = pallas.prefill_attention(*args, few_long=True, interpret=True)
    wide = widened.widen(k, v, plan.sources, q.dtype, interpret=True)
    rest = xla.prefill_attention(q, *wide, plan.page_table, plan.widened, None, options, 128)
    done = jnp.any(rest != 0, axis=(1, 2), keepdims=True)
    return jnp.where(done, rest, some)


def test_pages_are_widened_for_sequences_that_fit_whole() -> None:
    table = 10 * np.arange(1, 5)[:, None] + np.arange(4)
    tiles = [[1, 8, 128, 64], [0, 0, 70, 0], [2, 200, 9, 60], [3, 300, 4, 200], [0, 0, 0, 0]]
    plan_scratch = jax.jit(partial(widened.plan_scratch, room=6))
    plan = plan_scratch(jnp.asarray(table, jnp.int32), jnp.asarray(tiles, jnp.int32))
    assert plan.sources.tolist() == [10, 11, 20, 21, 22, 30]  # the third sequence has no room for its second
    assert plan.page_table[:2].tolist() == [[0, 1, 1, 1], [2, 3, 4, 4]]
    assert plan.widened.tolist() == [*tiles[:2], *[[0] * 4] * 3]
    assert plan.others.tolist() == [*[[0] * 4] * 2, *tiles[2:]]
