"""Products with their epilogue: what is fused is what is done apart, and lowers for Hopper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from lmdeploy_jax.pallas_kernels.encoder_attention import encoder_attention
from lmdeploy_jax.pallas_kernels.fused_dense import RowNorm, fused_dense, gelu, mosaic, why_not_mosaic
from tests.pallas_kernels.programs import as_on_h200

MOSAIC_CALL = export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
BFLOAT16_HALF_ULP = 2.0**-9


def test_a_short_gelu_is_within_what_bfloat16_rounds() -> None:
    x = jnp.linspace(-5, 12, 200001, dtype=jnp.float32)
    exact = (
        0.5 * np.asarray(x, np.float64) * (1 + np.asarray(jax.scipy.special.erf(x * 0.5**0.5), np.float64))
    )
    tail = x < -2  # where 1 + erf(x) has lost float32's digits
    exact[tail] = np.asarray(x[tail], np.float64) * np.asarray(jax.scipy.stats.norm.cdf(x[tail]), np.float64)
    error = np.abs(np.asarray(gelu(x)) - exact) / np.maximum(np.abs(exact), 1e-30)
    assert error[exact != 0].max() < 0.6 * BFLOAT16_HALF_ULP
    ends = jnp.asarray([-1e4, -40.0, -9.0, 1e4], jnp.float32)
    np.testing.assert_allclose(gelu(ends), [0, 0, 0, 1e4], atol=1e-15)


def test_bias_and_activation_are_rounded_once() -> None:
    draw = np.random.default_rng(0).standard_normal
    x, weight, bias = draw((3, 8)), draw((4, 8)), draw(4)
    arguments = [jnp.asarray(part, jnp.float32) for part in (x, weight, bias)]
    got = fused_dense(*arguments, activation=jax.nn.relu, backend="xla")
    np.testing.assert_allclose(got, np.maximum(x @ weight.T + bias, 0), rtol=1e-5)


@pytest.mark.parametrize("centres", [True, False])
def test_a_norm_within_a_product_is_the_norm_before_it(centres: bool) -> None:
    """LayerNorm and RMSNorm; a mean of ten deviations costs no digits that bfloat16 has."""
    draw = np.random.default_rng(0).standard_normal
    x, weight, bias, residual = (
        draw((5, 64)) + (10 if centres else 0),
        draw((16, 64)),
        draw(16),
        draw((5, 16)),
    )
    centred = x - x.mean(axis=1, keepdims=True) if centres else x
    want = residual + centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6) @ weight.T + bias
    x, weight, bias, residual = (jnp.asarray(part, jnp.float32) for part in (x, weight, bias, residual))
    norm = RowNorm(1e-6, weight.sum(axis=1) if centres else None)
    got = fused_dense(x, weight, bias, norm=norm, residual=residual, backend="xla")
    np.testing.assert_allclose(got, want, atol=2e-3 if centres else 1e-5)


@pytest.mark.parametrize(
    ("rows", "outputs", "width"), [(13416, 4096, 256), (1032, 4096, 192), (1032, 3072, 224)]
)
def test_tiles_fill_the_cores(rows: int, outputs: int, width: int) -> None:
    assert mosaic.fitted(rows, outputs).outputs == width


def test_what_mosaic_cannot_do_is_named() -> None:
    assert why_not_mosaic(13416, (4096, 1024), jnp.bfloat16) is None
    assert "float32" in str(why_not_mosaic(13416, (4096, 1024), jnp.float32))
    assert "4304" in str(why_not_mosaic(4096, (4304, 1152), jnp.bfloat16))
    wide = [jnp.zeros(shape, "bfloat16") for shape in ((5, 512), (256, 512), (256,))]
    with pytest.raises(ValueError, match="5 rows are no multiple of 8"):
        fused_dense(*wide, activation=gelu, backend="mosaic")


def test_a_product_lowers_for_hopper() -> None:
    specs = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((1032, 512), (256, 512), (256,))]
    assert _lowered(lambda *args: fused_dense(*args, activation=gelu, backend="mosaic"), *specs)


@pytest.mark.parametrize("width", [256, 160])
def test_a_norm_and_a_residual_lower_for_hopper(width: int) -> None:
    shapes = {"x": (1032, 512), "weight": (576, 512), "bias": (576,), "residual": (1032, 576)}
    specs = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}

    def step(sums: jax.Array, each: dict[str, jax.Array]) -> jax.Array:
        return mosaic.fused_dense(**each, norm=RowNorm(1e-6, sums), tuning=mosaic.Tuning(width))

    assert _lowered(step, jax.ShapeDtypeStruct((576,), "float32"), specs)


@pytest.mark.parametrize("count", [1025, 1032])
def test_encoder_attention_lowers_for_hopper(count: int) -> None:
    spec = jax.ShapeDtypeStruct((1, 1032, 3, 2, 64), "bfloat16")
    assert _lowered(lambda qkv: encoder_attention(qkv, None, count=count, backend="mosaic"), spec)


def _lowered(step, *specs) -> int:
    """Calls of Mosaic in what is lowered for a GPU."""
    with as_on_h200():
        lower = export.export(jax.jit(step), platforms=["cuda"], disabled_checks=[MOSAIC_CALL])
        return lower(*specs).mlir_module().count("mosaic_gpu_v2")
