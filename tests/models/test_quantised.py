"""Quantised weights in products: 8-bit activations as the formula has them, the rest as dense weights."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.bench import checkpoint, tune
from lmdeploy_jax.bench.quant_tune import QUANTISED
from lmdeploy_jax.bench.quantised import FORMATS
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.models import products
from lmdeploy_jax.models.formats import E4M3, INT4, INT8, WeightFormat
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.mlp import feed_forward
from lmdeploy_jax.models.mlp_config import MlpConfig
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.products import plan, plan_gated, plan_norm
from lmdeploy_jax.models.quant_products import FusedQuantNorm
from lmdeploy_jax.models.quantised import hold_quantised
from lmdeploy_jax.models.tuning import Measurement, Tuning
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm_quant
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling, Tiling
from tests.models.paged import PagedRunner

KERNELS = Kernels()
LIMITS = {INT8: 127.0, E4M3: 448.0}
SIZES = {"gate_up": 256, "down": 128}  # of what the products of a small MLP read


def quantised(
    held: WeightFormat, out: tuple[int, ...], inner: tuple[int, ...], dtype: str = "float32"
) -> Linear:
    linear = Linear(out, inner, (None,) * len(out + inner), bias=False, dtype=jnp.dtype(dtype))
    hold_quantised(linear, held)
    rng: Any = np.random.default_rng(0)
    values: Any = linear.weight.values
    if held.stored == "uint16":
        drawn = rng.integers(0, 2**16, values.shape)
    else:
        drawn = np.clip(rng.normal(size=values.shape) * LIMITS[held.element] / 3, -127, 127)
    values[...] = jnp.asarray(drawn).astype(held.stored)
    scales = linear.weight.scales
    scales[...] = jnp.asarray(rng.uniform(0.01, 0.1, scales.shape)).astype(scales.dtype)
    if held.zeros:
        zeros = linear.weight.zeros
        zeros[...] = jnp.asarray(rng.integers(0, 16, zeros.shape)).astype(held.zeros)
    return linear


def rounded(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The formula, in float64: a row's largest element becomes the largest that there is."""
    scale = np.abs(x).max(-1, keepdims=True) / LIMITS[kind]
    q = (
        np.round(x / scale)
        if kind == INT8
        else (x / scale).astype(np.float32).astype(jnp.dtype(E4M3)).astype(float)
    )
    return q, scale


@pytest.mark.parametrize("kind", [INT8, E4M3])
def test_activations_are_rounded_a_row(kind: str) -> None:
    x = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    x[2], x[3] = 0, x[3] * 1e4
    q, scales, _ = round_rows(jnp.asarray(x), kind)
    scale = scales.T
    assert (q.dtype, q.shape, scale.shape) == (jnp.dtype(kind), (5, 96), (5, 1))
    theirs, _ = rounded(np.delete(x, 2, 0), kind)
    np.testing.assert_array_equal(np.delete(np.asarray(q, np.float32), 2, 0), theirs)
    error = np.abs(np.asarray(q, np.float32) * np.asarray(scale) - x).max(-1)
    assert (error <= np.abs(x).max(-1) * (0.5 / 127 if kind == INT8 else 2**-4)).all()


@pytest.mark.parametrize("kind", [INT8, E4M3])
@pytest.mark.parametrize("tokens", [1, 7])
def test_products_of_eight_bits(kind: str, tokens: int) -> None:
    held = WeightFormat(kind, 64, 1, "float32", activations=kind)
    linear = quantised(held, (3, 32), (2, 32))
    x = np.random.default_rng(1).normal(size=(tokens, 2, 32)).astype(np.float32)
    planned = plan(KERNELS, "parts", linear, jnp.asarray(x))
    assert planned == products.RoundedProduct()
    q, scale = rounded(x.reshape(tokens, -1).astype(float), kind)
    weight: Any = linear.weight
    want = (
        q
        @ np.asarray(weight.values[...], float).reshape(96, 64).T
        * scale
        * np.asarray(weight.scales[...]).reshape(96)
    )
    ours = np.asarray(planned(linear, jnp.asarray(x)))
    assert ours.shape == (tokens, 3, 32)
    assert np.abs(ours.reshape(tokens, 96) - want).max() < 2e-6 * np.abs(want).max()
    dense = np.asarray(products.dense_product(jnp.asarray(x), linear.weight.dense())).reshape(tokens, 96)
    distance = np.linalg.norm(ours.reshape(tokens, 96) - dense) / np.linalg.norm(dense)
    assert 1e-4 < distance < (0.02 if kind == INT8 else 0.05)  # from activations that are not rounded


def test_a_scale_of_the_file_rounds_all_activations() -> None:
    """As compressed-tensors' own `quantize` does, what is too large included; in a norm, before a product."""
    held = WeightFormat(E4M3, 64, 1, "float32", activations=E4M3, input_scale=True)
    linear = quantised(held, (96,), (64,))
    scale = np.float32(0.004)
    linear.weight.input_scale[...] = jnp.array([scale])
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    q = np.clip(x / scale, -448, 448).astype(jnp.dtype(E4M3)).astype(float)
    assert (np.abs(q) == 448).any()
    weight: Any = linear.weight
    want = q @ np.asarray(weight.values[...], float).T * scale * np.asarray(weight.scales[...])
    got = plan(KERNELS, "parts", linear, jnp.asarray(x))(linear, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    torch, scheme = pytest.importorskip("torch"), pytest.importorskip("compressed_tensors.quantization")
    told = scheme.QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    theirs = forward.quantize(torch.tensor(x), torch.tensor(scale), None, told, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.numpy(), q)
    ones = jnp.ones(64)
    for backend in ("xla", "pallas_interpret"):
        _, rows = add_rms_norm_quant(
            jnp.asarray(x), jnp.asarray(x), ones, E4M3, scale=jnp.array([scale]), eps=1e-5, backend=backend
        )
        normed = 2 * x / np.sqrt((4 * x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-5)
        np.testing.assert_array_equal(rows.scales, np.full((1, 5), scale))
        found = np.asarray(rows.values, float)
        np.testing.assert_allclose(found, np.clip(normed / scale, -448, 448), rtol=2**-4, atol=2**-9)


def test_what_a_scale_of_the_file_would_round_is_not_rounded_another_way() -> None:
    held = WeightFormat(E4M3, 256, 1, "float32", activations=E4M3, input_scale=True)
    cut = Tiling(32, 128, 2, 4, 3, min_rows=8, rounds=True)
    table = Tuning((Measurement(held.name, "parts", 96, 256, 1, cut, 1.0, 2.0),))
    linear, x = quantised(held, (96,), (256,), "bfloat16"), jnp.ones((1, 256), jnp.bfloat16)
    planned = plan(Kernels("pallas_interpret", tuning=table), "parts", linear, x)
    assert (planned.tiling.rounds, planned.tiling.widens) == (False, True)


def test_gated_and_normed_products_of_eight_bits() -> None:
    linear = quantised(WeightFormat(INT8, 64, 1, "float32", activations=INT8), (2, 48), (64,))
    x = jax.random.normal(jax.random.key(0), (5, 64))
    planned = plan_gated(KERNELS, linear, x, jax.nn.silu)
    both = products.RoundedProduct()(linear, x)
    np.testing.assert_allclose(planned(linear, x), jax.nn.silu(both[:, 0]) * both[:, 1], rtol=1e-6)
    measured = Kernels("pallas_interpret", tuning=Tuning(rounding="pallas"))
    for kernels, wanted in ((KERNELS, products.SeparateNorm), (measured, products.RoundingNorm)):
        fused = plan_norm(kernels, linear, x, normed=True, activation=jax.nn.silu)
        assert isinstance(fused, wanted)
        norm = RMSNorm(64, 1e-5, 1.0, dtype=jnp.float32)
        _, got = fused(linear, x, x, norm)
        np.testing.assert_allclose(got, planned(linear, norm(2 * x)), rtol=2e-2, atol=2e-3)
    assert plan(KERNELS, "whole", linear, x)(linear, x).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sums_of_many_rows_leave_as_the_model_s_own_type(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is one that holds what is not scaled yet."""
    held = WeightFormat(E4M3, 256, 1, "float32", activations=E4M3)
    linear, x = quantised(held, (96,), (256,), dtype), jax.random.normal(jax.random.key(0), (8, 256), dtype)

    def sums() -> tuple[np.ndarray, str]:
        found, jaxpr = (way(partial(products.RoundedProduct(), linear)) for way in (jax.jit, jax.make_jaxpr))
        return np.asarray(found(x), np.float64), re.findall("preferred_element_type=(.*)", str(jaxpr(x)))[-1]

    few, narrow = sums()
    assert narrow == "float32"
    monkeypatch.setattr("lmdeploy_jax.models.quant_products.MANY_ROWS", 8)
    many, narrow = sums()
    assert narrow == dtype
    assert np.linalg.norm(many - few) <= 2**-8 * np.linalg.norm(few)


FEW_ROWS = [  # weights that the kernels read, and how far apart whole products may be
    (WeightFormat(E4M3, 256, 1, "float32", activations=E4M3), 1e-2),
    (WeightFormat(E4M3, 128, 2, "float32", activations=E4M3), 5e-2),  # XLA rounds no activations
    (WeightFormat(INT8, 256, 1, "bfloat16", activations=INT8), 1e-2),
    (WeightFormat(INT4, 64, 4, "float16", zeros="uint8"), 1e-2),
]


@pytest.mark.parametrize(
    ("held", "most"),
    [FEW_ROWS[0], FEW_ROWS[3], *[pytest.param(*row, marks=pytest.mark.full) for row in FEW_ROWS[1:3]]],
    ids=lambda value: getattr(value, "name", None),
)
def test_few_rows_are_the_kernels_where_the_table_says_so(held: WeightFormat, most: float) -> None:
    """Norm, gated and plain products, which add up to what the plan without a table gives."""
    tiling = Tiling(32, 128, 2, 4, 2)
    whole = Tiling(32, 128, 1, 4, 2)
    table = Tuning(
        (
            Measurement(held.name, "parts", 96, 256, 8, tiling, 1.0, 2.0),
            Measurement(held.name, "gated", 64, 256, 8, whole, 1.0, 2.0),
        )
    )
    kernels, plain = Kernels("pallas_interpret", tuning=table), Kernels("pallas_interpret")
    x = jax.random.normal(jax.random.key(0), (3, 256), jnp.bfloat16)
    delta = jax.random.normal(jax.random.key(1), (3, 256), jnp.bfloat16)
    norm = RMSNorm(256, 1e-5, 1.0, dtype=jnp.bfloat16)
    for out, activation in (((3, 32), None), ((2, 64), jax.nn.silu)):
        linear = quantised(held, out, (256,), "bfloat16")
        ways = [plan_norm(k, linear, x, normed=True, activation=activation) for k in (kernels, plain)]
        wanted = products.RoundingNorm if held.activations else products.SeparateNorm
        assert isinstance(ways[0], wanted)
        assert "SkinnyQuant" in type(ways[0].product).__name__
        (added, got), (same, want) = (way(linear, x, delta, norm) for way in ways)
        np.testing.assert_array_equal(np.asarray(added, np.float32), np.asarray(same, np.float32))
        got = np.asarray(got if activation else got.sum(0), np.float32)
        want = np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) < most * np.linalg.norm(want)
        first = plan_norm(kernels, linear, x, normed=False, activation=activation)
        assert first(linear, x, None, norm)[1].shape == ways[0](linear, x, delta, norm)[1].shape


@pytest.mark.parametrize("held", [held for held, _ in FEW_ROWS if held.element != INT8], ids=lambda h: h.name)
def test_one_row_s_norm_is_within_its_product_where_the_table_says_so(held: WeightFormat) -> None:
    cut = Tiling(32, 128, 1, 4, 2, widens=held.activations is not None)
    kinds = (("norm_parts", 96), ("norm_gated", 64))
    table = Tuning(tuple(Measurement(held.name, kind, out, 256, 1, cut, 1.0, 2.0) for kind, out in kinds))
    kernels = Kernels("pallas_interpret", tuning=table)
    x, delta = jax.random.normal(jax.random.key(0), (2, 1, 256), jnp.bfloat16)
    norm = RMSNorm(256, 1e-5, 1.0, dtype=jnp.bfloat16)
    for out, activation in (((3, 32), None), ((2, 64), jax.nn.silu)):
        linear = quantised(held, out, (256,), "bfloat16")
        planned = plan_norm(kernels, linear, x, normed=True, activation=activation)
        assert planned == FusedQuantNorm(cut, kernels.backend, activation)
        added, got = planned(linear, x, delta, norm)
        dense = products.dense_product(norm(added), linear.weight.dense())
        want = activation(dense[:, 0]) * dense[:, 1] if activation else dense[None]
        assert got.shape == want.shape
        np.testing.assert_array_equal(np.asarray(added, np.float32), np.asarray(x + delta, np.float32))
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)  # activations are not rounded
        for rows, normed in ((2, True), (1, False)):
            apart = plan_norm(kernels, linear, x.repeat(rows, 0), normed=normed, activation=activation)
            assert not isinstance(apart, FusedQuantNorm)


def test_many_rows_stream_where_the_table_says_so_and_the_kernel_can() -> None:
    held = WeightFormat(INT4, 128, 2, "float16", zeros="uint8")
    stream = StreamTiling(128, 132, 4)
    measured = [Measurement(held.name, kind, 128, 256, 4096, stream, 1.0, 2.0) for kind in ("parts", "gated")]
    kernels = Kernels("pallas_interpret", tuning=Tuning(tuple(measured)))
    plain, gate_up = (quantised(held, out, (256,), "bfloat16") for out in ((2, 64), (2, 128)))
    for rows, streams in ((96, True), (256, True), (100, False), (8192, False)):
        x = jnp.zeros((rows, 256), jnp.bfloat16)
        found = plan(kernels, "parts", plain, x)
        streamed = products.StreamedQuantProduct(stream, kernels.backend)
        assert found == (streamed if streams else products.XlaProduct())
        assert plan_gated(kernels, gate_up, x, jax.nn.silu) == products.XlaGatedProduct(jax.nn.silu, found)


def test_what_no_norm_rounds_may_be_rounded_by_its_product() -> None:
    held = WeightFormat(E4M3, 256, 1, "float32", activations=E4M3)
    linear, x = quantised(held, (96,), (256,), "bfloat16"), jnp.ones((1, 256), jnp.bfloat16)
    tiling = Tiling(32, 128, 2, 4, 3, min_rows=8, rounds=True)
    table = Tuning((Measurement(held.name, "parts", 96, 256, 1, tiling, 1.0, 2.0),))
    kernels = Kernels("pallas_interpret", tuning=table)
    planned = plan(kernels, "parts", linear, x)
    assert planned == products.SkinnyQuantProduct(tiling, kernels.backend)
    assert "round_rows" not in str(jax.make_jaxpr(lambda x: planned(linear, x))(x))
    want = plan(Kernels(), "parts", linear, x)(linear, x)
    got = np.asarray(planned(linear, x).sum(0), np.float32)
    np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=1e-2)
    after = plan_norm(kernels, linear, x, normed=True)
    assert isinstance(after, products.SeparateNorm)  # what is rounded already would be rounded again


def test_a_gated_product_of_too_few_programs_comes_in_parts() -> None:
    held, tiling = WeightFormat(INT4, 128, 2, "float16", zeros="uint8"), Tiling(64, 128, 2, 4, 3)
    linear = quantised(held, (2, 64), (256,), "bfloat16")
    table = Tuning((Measurement(held.name, "gated", 64, 256, 8, tiling, 1.0, 2.0),))
    x = jax.random.normal(jax.random.key(0), (3, 256), jnp.bfloat16)
    planned, plain = (
        plan_gated(Kernels("pallas_interpret", tuning=t), linear, x, jax.nn.silu) for t in (table, Tuning())
    )
    assert isinstance(planned, products.PartsGatedProduct)
    ours, theirs = (np.asarray(way(linear, x), np.float32) for way in (planned, plain))
    assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("rows", "widens"), [(1, False), (2, True)])
def test_a_plain_head_is_not_widened_for_one_row_where_xla_has_no_kernel_of_its_own(
    rows: int, widens: bool
) -> None:
    """What XLA's CUDA library is asked for says so; a model without 8-bit products asks as ever."""
    head = Linear((512,), (256,), (None, None), bias=False, dtype=jnp.dtype("bfloat16"))
    x = jax.random.normal(jax.random.key(0), (rows, 256), jnp.bfloat16)
    head.weight[...] = jax.random.normal(jax.random.key(1), (512, 256), jnp.bfloat16)
    plain, narrow = (plan(Kernels(without_triton=w), "whole", head, x) for w in (False, True))
    assert plain == products.XlaProduct(jnp.float32)
    assert (narrow == plain) == widens
    np.testing.assert_allclose(narrow(head, x), plain(head, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [E4M3, pytest.param(INT8, marks=pytest.mark.full)])
def test_one_kernel_gates_and_rounds_for_down_where_the_table_says_so(kind: str) -> None:
    """Of XLA's sums, whose scales it applies, and of a kernel's parts, which it adds up."""
    names = ("gate_up", "down")
    held = {name: WeightFormat(kind, inner, 1, "float32", activations=kind) for name, inner in SIZES.items()}
    cut = Tiling(32, 128, 2, 4, 2)
    table = Tuning((Measurement(held["gate_up"].name, "gated", 128, 256, 8, cut, 1.0, 2.0),))
    x, delta = jax.random.normal(jax.random.key(0), (2, 3, 256), jnp.bfloat16)
    norm, config = RMSNorm(256, 1e-5, 1.0, dtype=jnp.bfloat16), MlpConfig(SIZES["down"])
    found = []
    for measured, alone, fused in (
        (Tuning(rounding="pallas"), ["add_rms_norm", "round_rows"], ["add_rms_norm", "act_and_mul_quant"]),
        (replace(table, rounding="pallas"), ["act_and_mul", "round_rows"], ["act_and_mul_quant"]),
    ):
        for tuned, launches in ((measured, alone), (replace(measured, activation="pallas"), fused)):
            kernels = Kernels("pallas_interpret", tuning=tuned)
            mlp: Any = feed_forward(256, config, added_plainly=True, dtype=jnp.bfloat16, kernels=kernels)
            for name in names:
                linear: Any = getattr(mlp, name)
                linear.weight = quantised(
                    held[name], linear.weight.shape[:-1], (SIZES[name],), "bfloat16"
                ).weight
            traced = re.findall(r"name=(\w+)", str(jax.make_jaxpr(lambda mlp=mlp: mlp(x, delta, norm))()))
            assert [name for name in traced if name in {*alone, *fused}] == launches
            if not measured.products:
                found.append(np.asarray(jax.jit(lambda mlp=mlp: mlp(x, delta, norm))()[1], np.float32))
    assert np.linalg.norm(found[0] - found[1]) < 1e-2 * np.linalg.norm(found[0])


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (WeightFormat(INT4, 32, 2, "float32", tile=64), "w4a16_g32"),
        (WeightFormat(INT8, 64, 1, "float32"), "w8a16_int8"),
        (WeightFormat(E4M3, 32, 2, "float32", activations=E4M3), "w8a8_float8_e4m3fn_g32"),
    ],
)
def test_other_weights_are_multiplied_as_dense_ones(held: WeightFormat, name: str) -> None:
    linear = quantised(held, (96,), (64,))
    assert linear.weight.format == name
    x = jax.random.normal(jax.random.key(0), (1, 64))
    planned = plan(KERNELS, "parts", linear, x)
    assert planned == products.XlaProduct()
    want = products.dense_product(x, linear.weight.dense())
    np.testing.assert_allclose(planned(linear, x), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("model_format", "most"), [pytest.param("fp8", 0.08, marks=pytest.mark.full), ("awq", 0.03)]
)
def test_a_model_answers_alike_with_kernels_and_without(
    model_format: str, most: float, tmp_path: Path
) -> None:
    """Two layers whose every product is a kernel, parts, norms and all; of 8 bits, some round what they read.

    What 16 bits round the one way and the other way, 8 bits may round a step of 6 % apart.
    """
    folder = checkpoint.make("tiny-llama", tmp_path, model_format=model_format)
    config, four, found = read_config(folder), model_format == "awq", []
    for name, shape in tune.products(config).items():
        if name in QUANTISED and not shape.normed:
            in_parts, rounds = shape.kind == "parts" or four, not shape.after_norm and not four
            tiling = Tiling(64, 128, 2 if in_parts else 1, 4, 3, min_rows=8, rounds=rounds)
            held = FORMATS[model_format].held(shape.inner).name
            found.append(Measurement(held, shape.kind, shape.out, shape.inner, 8, tiling, 1.0, 2.0))
    rest = {"dtype": "bfloat16", "dequantise": False, "config": config}
    tuned = load_model(folder, **rest, backend="pallas_interpret", tuning=Tuning(tuple(found)))
    layer = tuned.merge(tuned.leaves).layers[0]
    for linear, x in ((layer.attention.o, (2, 2, 2, 64)), (layer.mlp.down, (2, 512))):
        planned = plan(tuned.skeleton.kernels, "parts", linear, jnp.zeros(x, jnp.bfloat16))
        assert isinstance(planned, products.SkinnyQuantProduct)
    ours, theirs = (
        np.asarray(PagedRunner(model).decode({0: (7, 0), 1: (8, 0)})[1], np.float32)
        for model in (tuned, load_model(folder, **rest, backend="xla"))
    )
    assert np.linalg.norm(ours - theirs) < most * np.linalg.norm(theirs)
