"""Scales, clipping, GPTQ and rounding are the papers', as NumPy has them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.lite import awq
from lmdeploy_jax.lite.gptq import Gptq
from lmdeploy_jax.lite.rounding import Grid, round_rows
from lmdeploy_jax.lite.scaling import importance, scales_at
from lmdeploy_jax.lite.smooth_quant import SmoothQuant
from lmdeploy_jax.lite.statistics import observe
from lmdeploy_jax.lite.weights import Matrix
from tests.lite import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

GROUP, ROWS, COLUMNS, TOKENS = 16, 48, 64, 512


@pytest.fixture(scope="module", params=range(3))
def x(request: pytest.FixtureRequest) -> np.ndarray:
    """Inputs that go together, with a few large channels."""
    rng = np.random.default_rng(request.param)
    mixed = rng.normal(size=(TOKENS, COLUMNS)) @ (np.eye(COLUMNS) + 0.2 * rng.normal(size=(COLUMNS, COLUMNS)))
    return (mixed * np.where(rng.random(COLUMNS) < 0.1, 20, 1)).astype(np.float32).astype(float)


@pytest.fixture
def matrix(x: np.ndarray) -> Matrix:
    weight = np.random.default_rng(9).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    return Matrix("mlp.up", None, jnp.asarray(weight), observe(jnp.asarray(x, jnp.float32)), {})


def test_the_scales_are_those_of_the_least_error(x: np.ndarray, matrix: Matrix) -> None:
    weight = np.asarray(matrix.weight, float)
    losses, candidates = reference.awq_losses(x, weight, GROUP)
    found = np.asarray(awq.search([matrix], importance([matrix], GROUP), Grid(GROUP)))
    chosen = np.argmin([np.abs(found - scales).max() for scales in candidates])
    np.testing.assert_allclose(found, candidates[chosen], rtol=1e-4)
    assert losses[chosen] <= losses.min() * 1.01  # two ratios may be as good within rounding
    assert losses[chosen] < losses[0] / 2  # and none at all is much worse


def test_groups_are_clipped_where_their_part_errs_least(x: np.ndarray, matrix: Matrix) -> None:
    assert matrix.inputs is not None
    expected, ahead = reference.awq_clipped(x, np.asarray(matrix.weight, float), GROUP)
    found = np.asarray(awq.clipped(matrix.weight, matrix.inputs.gram, Grid(GROUP)))
    clear = np.repeat(ahead > 1e-2, GROUP, axis=1)
    assert clear.mean() > 0.8
    np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-5)
    assert (found != np.asarray(matrix.weight)).any()


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_papers(act_order: bool, x: np.ndarray, matrix: Matrix) -> None:
    assert matrix.inputs is not None
    weight, method = np.asarray(matrix.weight, float), Gptq(GROUP, act_order=act_order)
    order = np.argsort(-np.diag(np.asarray(matrix.inputs.gram)), kind="stable") if act_order else None
    expected = reference.gptq(x, weight, GROUP, method.damping, order)
    found = np.asarray(method.round(matrix, np.dtype(np.float32)).dense())
    # A value in the middle between two codes may go either way, and takes later ones of its row with it.
    alike = np.isclose(found, expected, atol=1e-5).mean()
    errors = [np.linalg.norm(x @ (made - weight).T) for made in (found, expected)]
    assert alike > 0.97
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert errors[0] < 0.8 * np.linalg.norm(x @ (reference.rounded(weight, GROUP, symmetric=True) - weight).T)


def test_a_channel_that_nobody_uses_is_rounded_as_it_is(x: np.ndarray, matrix: Matrix) -> None:
    silent = jnp.asarray(x, jnp.float32).at[:, 5].set(0)
    quiet = Matrix("mlp.up", None, matrix.weight, observe(silent), {})
    made = np.asarray(Gptq(GROUP).round(quiet, np.dtype(np.float32)).dense())
    nearest = reference.rounded(np.asarray(matrix.weight, float), GROUP, symmetric=True)
    np.testing.assert_allclose(made[:, 5], nearest[:, 5], rtol=1e-6)
    assert np.isfinite(made).all()
    # Nor is any used of an expert whose activation gave nothing for the few tokens that came by.
    unused = Matrix("mlp.up", None, matrix.weight, observe(0 * silent), {})
    made = np.asarray(Gptq(GROUP).round(unused, np.dtype(np.float32)).dense())
    np.testing.assert_allclose(made, nearest, rtol=1e-6)


def test_smooth_quant_scales_by_the_largest_input(x: np.ndarray, matrix: Matrix) -> None:
    expected = reference.smooth_scales(x, np.asarray(matrix.weight, float))
    np.testing.assert_allclose(SmoothQuant()._scales([matrix]), expected, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [("int8", None), ("float8_e4m3fn", 0.026)])
def test_rows_of_8_bits_err_by_what_they_must(dtype: str, error: float | None) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    steps = np.abs(weight).max(1) / 127
    error = error or float(np.sqrt((steps**2).mean() / 12))  # integers: evenly within half a step
    made = round_rows(jnp.asarray(weight), jnp.dtype(dtype), jnp.dtype("float32")).dense()
    assert np.linalg.norm(made - weight) / np.linalg.norm(weight) == pytest.approx(error, rel=0.1)


def test_channels_without_inputs_have_a_finite_scale() -> None:
    scales = np.asarray(scales_at(jnp.float32(0.5), jnp.array([0.0, 1.0, 4.0]), jnp.array([0.5, 0.0, 0.5])))
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
