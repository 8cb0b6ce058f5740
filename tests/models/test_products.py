"""Products by plan: which one a weight gets by format, platform, table and rows; all compute the same."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmdeploy_jax.converters.load import LoadedModel, build_skeleton
from lmdeploy_jax.models import linear as linear_module
from lmdeploy_jax.models import products
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.products import plan, plan_gated, plan_norm
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear
from lmdeploy_jax.models.tuning import Measurement, Tuning
from lmdeploy_jax.pallas_kernels.skinny_gemm import Tiling
from tests.models.paged import PagedRunner
from tests.models.test_program import CONFIG
from tests.models.test_tuning import LARGE, SMALL, TABLE

KERNELS = Kernels("pallas_interpret", tuning=TABLE)
PLAIN = Kernels("pallas_interpret")


def filled(linear: Linear) -> Linear:
    linear.weight[...] = jax.random.normal(jax.random.key(0), linear.weight.shape, jnp.bfloat16)
    return linear


def linear_of(out: tuple[int, ...], inner: tuple[int, ...], dtype: str = "bfloat16") -> Linear:
    return filled(Linear(out, inner, (None,) * len(out + inner), bias=False, dtype=jnp.dtype(dtype)))


def close(got: jax.Array, want: jax.Array, most: float = 1e-2) -> None:
    got, want = (np.asarray(array, np.float32) for array in (got, want))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < most


@pytest.mark.parametrize(("tokens", "parts"), [(1, 2), (3, 1), (9, 0)])
def test_products_are_the_same_however_they_are_done(tokens, parts):
    linear = linear_of((3, 32), (2, 64))
    x = jax.random.normal(jax.random.key(1), (tokens, 2, 64), jnp.bfloat16)
    out = plan(KERNELS, "parts", linear, x)(linear, x)
    assert out.shape == ((parts,) if parts else ()) + (tokens, 3, 32)
    total = np.asarray(out.sum(axis=0) if parts else out, np.float32)
    want = plan(PLAIN, "parts", linear, x)(linear, x)
    np.testing.assert_allclose(total, np.asarray(want, np.float32), rtol=2e-2, atol=0.1)


def test_float32_is_left_to_xla():
    linear, x = linear_of((96,), (128,), "float32"), jnp.ones((1, 128))
    assert plan(KERNELS, "parts", linear, x) == products.XlaProduct()
    assert plan(KERNELS, "parts", linear, jnp.ones((2, 128))) == products.TransposedProduct()  # on a CPU


@pytest.mark.parametrize("outputs", [(3, 32), (2, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_cpu_s_products_are_those_of_other_platforms(outputs, bias):
    linear = Linear(outputs, (64,), (None,) * 3, bias=bias, dtype=jnp.dtype("float32"))
    linear.weight[...] = jax.random.normal(jax.random.key(0), linear.weight.shape)
    if bias:
        linear.bias[...] = jax.random.normal(jax.random.key(2), outputs)
    x = jax.random.normal(jax.random.key(1), (5, 64))
    close(products.TransposedProduct()(linear, x), products.XlaProduct()(linear, x), 1e-6)
    if outputs[0] == 2:
        gated = (products.TransposedGatedProduct, products.XlaGatedProduct)
        close(*(kind(jax.nn.silu)(linear, x) for kind in gated), 1e-6)


@pytest.mark.parametrize(
    ("outputs", "kind"), [(96, products.SkinnyGatedProduct), (192, products.XlaGatedProduct)]
)
def test_rows_that_cannot_be_streamed_are_left_to_xla(outputs, kind):
    linear, x = linear_of((2, outputs), (128,)), jnp.ones((5, 128), jnp.bfloat16)
    assert isinstance(plan_gated(KERNELS, linear, x, jax.nn.silu), kind)


TILING = Tiling(32, 32, 1, 4, 2)
NORMED = Tuning(
    (
        Measurement("w16a16", "norm_parts", 96, 128, 1, TILING, 1.0, 2.0),
        Measurement("w16a16", "norm_gated", 96, 128, 1, TILING, 1.0, 2.0),
    )
)


@pytest.mark.parametrize(("tokens", "parts", "tuned"), [(1, 2, True), (1, 0, True), (3, 2, False)])
def test_a_norm_is_part_of_its_product_for_one_row(tokens, parts, tuned):
    kernels = Kernels("pallas_interpret", tuning=NORMED)
    qkv, gate_up = linear_of((3, 32), (128,)), linear_of((2, 96), (128,))
    norm = RMSNorm(128, 1e-5, 1.0, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (tokens, 128), jnp.bfloat16)
    delta = jax.random.normal(jax.random.key(2), (parts, *x.shape) if parts else x.shape, jnp.bfloat16)
    for linear, activation in ((qkv, None), (gate_up, jax.nn.silu)):
        planned = partial(plan_norm, linear=linear, x=x, activation=activation)
        fused, separate = (planned(k, normed=True) for k in (kernels, PLAIN))
        assert isinstance(fused, products.FusedNorm) == tuned
        assert isinstance(planned(kernels, normed=False), products.SeparateNorm)  # the first layer
        (added, got), (wanted, want) = (way(linear, x, delta, norm) for way in (fused, separate))
        if activation is None:
            assert got.shape == ((1, 1, 3, 32) if tuned else want.shape)
        close(added, wanted)
        close(got.reshape(want.shape), want)


@pytest.mark.parametrize(("tokens", "unscaled"), [(1, True), (3, False)])
def test_attention_may_apply_the_norm_s_scale_to_one_row_s_parts(tokens, unscaled):
    cut = replace(TILING, splits=4)
    table = Tuning((Measurement("w16a16", "norm_parts", 96, 128, 1, cut, 1.0, 2.0),))
    options = {"bias": False, "dtype": jnp.dtype("bfloat16")}
    ways = [
        ColumnParallelLinear(
            (3, 32), (128,), (None,) * 3, kernels=Kernels("pallas_interpret", tuning=t), **options
        )
        for t in (table, Tuning())
    ]
    norm = RMSNorm(128, 1e-5, 1.0, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (tokens, 128), jnp.bfloat16)
    for linear in ways:
        filled(linear)
    (added, parts, squares), (wanted, want, none) = (way.unscaled(x, x, norm) for way in ways)
    assert none is None
    assert (squares is not None) == unscaled
    if squares is not None:
        assert parts.shape == (4, 1, 3, 32)
        parts = parts.sum(0) * jax.lax.rsqrt(squares.sum())
    close(added, wanted)
    close(parts, want)
    if unscaled:
        fused = products.FusedNorm(TILING, "pallas_interpret")  # for other readers
        assert plan_norm(ways[0].kernels, ways[0], x, normed=True) == fused


def test_what_is_not_added_as_it_is_comes_whole_and_all_with_its_bias():
    options = {"dtype": jnp.dtype("bfloat16"), "kernels": KERNELS}
    x = jax.random.normal(jax.random.key(1), (1, 128), jnp.bfloat16)
    for bias, added_up in itertools.product((False, True), repeat=2):
        linear = RowParallelLinear((96,), (128,), (None, None), bias=bias, added_up=added_up, **options)
        filled(linear)
        if bias:
            linear.bias[...] = jnp.full((96,), 64.0, jnp.bfloat16)
        want = products.XlaProduct()(linear, x) + 64 * bias
        assert linear(x).shape == ((2, 1, 96) if added_up else (1, 96))
        close(linear(x).reshape(-1, 1, 96).sum(0), want)


class Int8Weight(nnx.Module):
    """A toy format: integers, and a scale for each row of the last axis."""

    format = "w8a16_int8"

    def __init__(self, weight: jax.Array, axes: tuple[str | None, ...]) -> None:
        scales = jnp.abs(weight).max(axis=-1) / 127
        self.dtype = weight.dtype
        self.values = nnx.Param(jnp.round(weight / scales[..., None]).astype(jnp.int8), axes=axes)
        self.scales = nnx.Param(scales.astype(jnp.float32), axes=axes[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dense(self) -> jax.Array:
        return (self.values[...] * self.scales[...][..., None]).astype(self.dtype)


def test_a_weight_may_be_several_leaves():
    """What a quantised format needs: leaves of its own with names and axes, and measurements of its own."""
    table = Tuning((Measurement(Int8Weight.format, "parts", 96, 128, 8, LARGE, 1.0, 2.0), *TABLE.products))
    linear, x = linear_of((96,), (128,)), jax.random.normal(jax.random.key(1), (1, 128), jnp.bfloat16)
    want = products.XlaProduct()(linear, x)
    assert plan(KERNELS, "parts", linear, x).tiling == SMALL
    linear.weight = Int8Weight(linear.weight[...], ("mlp", "embed"))
    graph, state = nnx.split(linear)
    leaves, tree = jax.tree.flatten(state)
    assert [(leaf.dtype.name, leaf.shape) for leaf in leaves] == [("float32", (96,)), ("int8", (96, 128))]

    @jax.jit
    def product(leaves: list[jax.Array], x: jax.Array) -> jax.Array:
        merged = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        planned = plan(Kernels("pallas_interpret", tuning=table), "parts", merged, x)
        assert planned.tiling == LARGE
        assert plan(KERNELS, "parts", merged, x) == products.XlaProduct()
        return planned(merged, x)[0]

    close(product(leaves, x), want, 2e-2)


def test_a_decoder_of_such_weights_is_the_decoder_of_what_they_hold(monkeypatch):
    """Through the skeleton that checkpoints are bound to: a flat tuple of leaves, each with its name."""
    config = replace(CONFIG, layers=CONFIG.layers[:1])
    build = partial(build_skeleton, config, jnp.dtype("float32"), Kernels())
    dense = build()
    monkeypatch.setattr(linear_module, "DenseWeight", Int8Weight)
    quantised = build()
    assert {"embedding.weight.values", "layers.0.mlp.down.weight.scales"} <= quantised.specs.keys()
    rng = np.random.default_rng(0)
    leaves = {
        name: rng.integers(-127, 128, spec.shape, np.int8)
        if spec.dtype == jnp.int8
        else rng.normal(size=spec.shape).astype(spec.dtype) * (1e-3 if name.endswith("scales") else 1)
        for name, spec in quantised.specs.items()
    }
    held = {
        name: leaves[name]
        if name in leaves
        else leaves[f"{name}.values"] * leaves[f"{name}.scales"][..., None]
        for name in dense.specs
    }
    logits = []
    for skeleton, arrays in ((quantised, leaves), (dense, held)):
        model = LoadedModel(skeleton, tuple(map(jnp.asarray, arrays.values())), jnp.dtype("float32"))
        logits.append(PagedRunner(model).decode({0: (7, 0), 1: (8, 0)})[1])
    close(*logits, 1e-5)


@pytest.mark.full
def test_a_decoder_is_the_same_with_its_norms_scale_applied_by_attention(monkeypatch):
    """One row, from the second layer on: before the first, nothing is added to what is normed."""
    config, called = replace(CONFIG, layers=CONFIG.layers[:2]), []
    cut = Measurement("w16a16", "norm_parts", 160, 96, 1, replace(TILING, splits=3), 1.0, 2.0)

    def counting(*args, real=products.unscaled_norm_skinny_gemm, **how):
        called.append(args[0].shape)
        return real(*args, **how)

    monkeypatch.setattr(products, "unscaled_norm_skinny_gemm", counting)
    logits, rng, leaves = [], np.random.default_rng(0), ()
    for table in (Tuning((cut,)), Tuning()):
        kernels = Kernels("pallas_interpret", tuning=table)
        skeleton = build_skeleton(config, jnp.dtype("bfloat16"), kernels)
        leaves = leaves or tuple(
            jnp.asarray(rng.normal(size=s.shape), s.dtype) for s in skeleton.specs.values()
        )
        runner = PagedRunner(LoadedModel(skeleton, leaves, jnp.dtype("bfloat16")), rows=1)
        logits.append(runner.decode({0: (7, 0)})[0])
    assert called == [(1, 96)]
    close(*logits, 2e-2)
