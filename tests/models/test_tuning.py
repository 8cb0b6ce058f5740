"""The table of measured products: kept, merged, looked up, and what it makes the model do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models import tuning
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.tuning import Product, Tuning
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling, Tiling

SMALL, LARGE = Tiling(32, 32, 2, 4, 2), Tiling(32, 64, 1, 4, 2)
TABLE = Tuning(
    (
        Product("parts", 96, 128, 1, SMALL, 1.0, 2.0),
        Product("parts", 96, 128, 8, LARGE, 1.0, 2.0),
        Product("parts", 96, 128, 64, None, 2.0, 2.0),
        Product("gated", 96, 128, 8, Tiling(32, 32, 1, 4, 2), 1.0, 2.0),
        Product("gated", 192, 128, 8, StreamTiling(64, 2, 3), 1.0, 2.0),
    )
)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / tuning.file_name("NVIDIA H200")
    tuning.write(path, TABLE)
    assert path.name == "nvidia-h200.json"
    assert set(tuning.read(path).products) == set(TABLE.products)
    assert tuning.read(path).prefill_attention is None


def test_the_machine_s_own_table_wins(tmp_path):
    shipped = tuning.load("NVIDIA H200")
    assert shipped.products
    first = shipped.products[0]
    own = Product(first.kind, first.out, first.inner, 256, SMALL, 1.0, 2.0)
    tuning.write(tmp_path / "nvidia-h200.json", Tuning((own,)))
    merged = tuning.load("NVIDIA H200", tmp_path)
    assert merged.find(first.kind, (first.out, first.inner), 3) == SMALL
    assert len(merged.products) > 1
    assert tuning.load("some other card", tmp_path) == Tuning()


@pytest.mark.parametrize("text", ["{", "{}", '{"products": [{"kind": 1}]}'])
def test_a_broken_table_is_named(tmp_path, text):
    (tmp_path / "nvidia-h200.json").write_text(text)
    with pytest.raises(ConfigError, match=r"nvidia-h200.json cannot be read .*bench tune"):
        tuning.load("NVIDIA H200", tmp_path)


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(1, SMALL), (2, LARGE), (8, LARGE), (9, None), (64, None), (65, None)]
)
def test_the_next_larger_measurement_counts(tokens, wanted):
    assert TABLE.find("parts", (96, 128), tokens) == wanted
    assert TABLE.find("parts", (96, 129), tokens) is None


@pytest.fixture(scope="module")
def kernels():
    return Kernels("pallas_interpret", tuning=TABLE)


def filled(linear: Linear) -> Linear:
    linear.weight[...] = jax.random.normal(jax.random.key(0), linear.weight.shape, jnp.bfloat16)
    return linear


@pytest.mark.parametrize(("tokens", "parts"), [(1, 2), (3, 1), (9, 0)])
def test_products_are_the_same_however_they_are_done(kernels, tokens, parts):
    linear = filled(Linear((3, 32), (2, 64), (None,) * 4, bias=False, dtype=jnp.bfloat16))
    x = jax.random.normal(jax.random.key(1), (tokens, 2, 64), jnp.bfloat16)
    out = kernels.product(linear, x)
    assert out.shape == ((parts,) if parts else ()) + (tokens, 3, 32)
    total = np.asarray(out.sum(axis=0) if parts else out, np.float32)
    np.testing.assert_allclose(total, np.asarray(linear(x), np.float32), rtol=2e-2, atol=0.1)


def test_float32_is_left_to_xla(kernels):
    linear = Linear((96,), (128,), (None,) * 2, bias=False, dtype=jnp.float32)
    assert kernels.product(linear, jnp.ones((1, 128))).shape == (1, 96)


@pytest.mark.parametrize(("outputs", "done"), [(96, True), (192, False)])
def test_rows_that_cannot_be_streamed_are_left_to_xla(kernels, outputs, done):
    linear = filled(Linear((2, outputs), (128,), (None,) * 3, bias=False, dtype=jnp.bfloat16))
    out = kernels.gated_product(linear, jnp.ones((5, 128), jnp.bfloat16), jax.nn.silu)
    assert (out is not None) == done


NORMED = Tuning(
    (
        Product("norm_parts", 96, 128, 1, Tiling(32, 32, 1, 4, 2), 1.0, 2.0),
        Product("norm_gated", 96, 128, 1, Tiling(32, 32, 1, 4, 2), 1.0, 2.0),
    )
)


@pytest.mark.parametrize(("tokens", "parts", "tuned"), [(1, 2, True), (1, 0, True), (3, 2, False)])
def test_a_norm_is_part_of_its_product_for_one_row(tokens, parts, tuned):
    fused, separate = (Kernels("pallas_interpret", tuning=table) for table in (NORMED, Tuning()))
    qkv = filled(Linear((3, 32), (128,), (None,) * 3, bias=False, dtype=jnp.bfloat16))
    gate_up = filled(Linear((2, 96), (128,), (None,) * 3, bias=False, dtype=jnp.bfloat16))
    norm = RMSNorm(128, 1e-5, 1.0, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (tokens, 128), jnp.bfloat16)
    delta = jax.random.normal(jax.random.key(2), (parts, *x.shape) if parts else x.shape, jnp.bfloat16)
    (added, got), (wanted, want) = (k.norm_product(qkv, x, delta, norm) for k in (fused, separate))
    assert got.shape == ((1, 1, 3, 32) if tuned else want.shape)
    same(added, wanted)
    same(got.reshape(want.shape), want)
    done = fused.norm_gated_product(gate_up, x, delta, norm, jax.nn.silu)
    assert (done is not None) == tuned
    assert fused.norm_gated_product(gate_up, x, None, norm, jax.nn.silu) is None  # the first layer
    if done is not None:
        gate, up = jnp.moveaxis(gate_up(separate.add_norm(x, delta, norm)[1]), 1, 0)
        same(done[0], wanted)
        same(done[1], jax.nn.silu(gate) * up)


def same(got: jax.Array, want: jax.Array) -> None:
    got, want = (np.asarray(array, np.float32) for array in (got, want))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-2
