"""Products with their epilogue: what is fused is what is done apart, and lowers for Hopper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from lmdeploy_jax.pallas_kernels.encoder_attention import encoder_attention
from lmdeploy_jax.pallas_kernels.fused_dense import fused_dense, gelu, why_not_mosaic
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


@pytest.mark.parametrize("count", [1025, 1032])
def test_encoder_attention_lowers_for_hopper(count: int) -> None:
    spec = jax.ShapeDtypeStruct((1, 1032, 3, 2, 64), "bfloat16")
    assert _lowered(lambda qkv: encoder_attention(qkv, None, count=count, backend="mosaic"), spec)


def _lowered(step, *specs) -> int:
    """Calls of Mosaic in what is lowered for a GPU."""
    with as_on_h200():
        lower = export.export(jax.jit(step), platforms=["cuda"], disabled_checks=[MOSAIC_CALL])
        return lower(*specs).mlir_module().count("mosaic_gpu_v2")
