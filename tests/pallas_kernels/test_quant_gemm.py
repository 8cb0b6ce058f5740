"""Products of quantised weights, every implementation, against numpy in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lmdeploy_jax.pallas_kernels.act_and_mul import act_and_mul, act_and_mul_quant
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm, add_rms_norm_quant
from lmdeploy_jax.pallas_kernels.quant_gemm import (
    gated_quant_gemm,
    norm_quant_gemm,
    quant_gemm,
    streamed_quant_gemm,
    unscaled_norm_quant_gemm,
    why_not_quant,
    why_not_streamed,
)
from lmdeploy_jax.pallas_kernels.quant_gemm.streaming import deepest, tile_of, vector_space
from lmdeploy_jax.pallas_kernels.quant_gemm.words import TILE, pack_words
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from lmdeploy_jax.pallas_kernels.skinny_gemm import Tiling

BACKENDS = ["xla", "pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)]
E4M3, INT8 = "float8_e4m3fn", "int8"
SMALL, MANY = Tiling(32, 128, 2, 4, 3), Tiling(64, 128, 1, 4, 3)
CASES = [  # element, groups, zero points, rows, outputs, columns, tiling
    (E4M3, 1, False, 1, 96, 512, SMALL),
    (E4M3, 1, False, 20, 100, 256, MANY),
    (E4M3, 4, False, 5, 96, 512, replace(SMALL, min_rows=8)),
    (INT8, 1, False, 3, 64, 512, SMALL),
    (INT8, 2, False, 33, 64, 256, MANY),
    ("int4", 8, True, 1, 96, 256, Tiling(32, 128, 2, 4, 3)),  # groups of 32
    ("int4", 4, True, 5, 100, 256, Tiling(64, 256, 1, 4, 3)),  # of 64
    ("int4", 4, True, 17, 64, 512, SMALL),  # of 128
    ("int4", 2, False, 2, 64, 512, SMALL),  # of 256
    ("int4", 1, False, 3, 96, 256, replace(MANY, min_rows=8)),
]
parametrize = pytest.mark.parametrize(
    ("element", "groups", "zeros", "rows", "outputs", "columns", "tiling"), CASES, ids=str
)
backends = pytest.mark.parametrize("backend", BACKENDS)


def on(backend: str) -> str:
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    return backend


def weight_of(element: str, groups: int, zeros: bool, *shape: int) -> tuple[Quantised, np.ndarray]:
    """A random weight [*out, K], and what it means."""
    rng = np.random.default_rng()
    *out, columns = shape
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (groups, *out)), jnp.float16 if element == "int4" else None)
    zero, points = 8.0 if element == "int4" else 0.0, None
    if element == "int4":
        codes = rng.integers(0, 16, shape)
        values = pack_words(jnp.asarray(codes), TILE)
    else:
        drawn = rng.normal(size=shape) * 40
        codes = np.asarray(jnp.asarray(np.clip(np.round(drawn), -127, 127)).astype(element), np.float64)
        values = jnp.asarray(codes).astype(element)
    if zeros:
        points = jnp.asarray(rng.integers(0, 17, scales.shape), jnp.uint8)
        zero = by_column(points, columns)
    return Quantised(values, scales, points), (codes - zero) * by_column(scales, columns)


def by_column(grouped: jax.Array, columns: int) -> np.ndarray:
    moved = np.moveaxis(np.asarray(grouped, np.float64), 0, -1)
    return moved.repeat(columns // moved.shape[-1], -1)


def rows_of(element: str, groups: int, rows: int, columns: int) -> tuple[jax.Array | Quantised, np.ndarray]:
    """Activations as a weight of `element` takes them, and what they mean."""
    x = jnp.asarray(np.random.default_rng().normal(size=(rows, columns)), jnp.bfloat16)
    if element == "int4":
        return x, np.asarray(x, np.float64)
    rounded = round_rows(x, element, groups=groups)
    return rounded, np.asarray(rounded.values, np.float64) * by_column(rounded.scales, columns)


def error(got: jax.Array, want: np.ndarray) -> float:
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@backends
@parametrize
def test_the_parts_sum_to_the_product(backend, element, groups, zeros, rows, outputs, columns, tiling):
    weight, wide = weight_of(element, groups, zeros, outputs, columns)
    x, row = rows_of(element, groups, rows, columns)
    parts = quant_gemm(x, weight, tiling, out_dtype=jnp.float32, backend=on(backend))
    assert parts.shape == (tiling.splits, rows, outputs)
    assert error(parts.sum(axis=0), row @ wide.T) < 2e-6
    first = wide.shape[1] // tiling.splits
    assert error(parts[0], row[:, :first] @ wide[:, :first].T) < 2e-6


@backends
@pytest.mark.parametrize(
    ("element", "groups", "zeros", "rows", "outputs", "columns", "tiling"), CASES[1::3], ids=str
)
def test_gated(backend, element, groups, zeros, rows, outputs, columns, tiling):
    weight, wide = weight_of(element, groups, zeros, 2, outputs, columns)
    x, row = rows_of(element, groups, rows, columns)
    tiling = Tiling(tiling.block_out // 2, tiling.block_in, 1, 4, 3)
    ways = {"activation": jnp.square, "out_dtype": jnp.float32, "backend": on(backend)}
    got = gated_quant_gemm(x, weight, tiling, **ways)
    gate, up = row @ wide.transpose(0, 2, 1)
    assert error(got, gate**2 * up) < 1e-5


@backends
@pytest.mark.parametrize(("splits", "rows", "columns"), [(1, 3, 100), (4, 2, 700)])
def test_an_activation_of_parts(backend, splits, rows, columns):
    parts = jnp.asarray(np.random.default_rng().normal(size=(splits, rows, 2, columns)), jnp.float32)
    ways = {"activation": jnp.square, "out_dtype": jnp.float32, "backend": on(backend)}
    gate, up = np.asarray(parts, np.float64).sum(0).transpose(1, 0, 2)
    assert error(act_and_mul(parts, **ways), gate**2 * up) < 1e-6


@backends
@pytest.mark.parametrize(("dtype", "groups", "splits"), [(E4M3, 1, 1), (INT8, 3, 2)])
def test_an_activation_rounds_what_it_gives(backend, dtype, groups, splits):
    """Of sums in 32 bits, whose scales it applies: as the product, the activation and the rounding apart."""
    rng = np.random.default_rng()
    sums = jnp.asarray(np.round(rng.normal(size=(splits, 3, 2, 384)) * 1000), jnp.int32)
    scales = {
        "row_scales": jnp.asarray(rng.uniform(0.5, 1.5, 3) / 1000, jnp.float32),
        "scales": jnp.asarray(rng.uniform(0.5, 1.5, (2, 384)), jnp.float32),
    }
    how = {"activation": jax.nn.silu, "out_dtype": jnp.bfloat16, "backend": on(backend)}
    got = act_and_mul_quant(sums, dtype, groups=groups, **scales, **how)
    parts = sums.astype(jnp.float32) * (scales["row_scales"][:, None, None] * scales["scales"])
    want = round_rows(act_and_mul(parts, **how), dtype, groups=groups)
    np.testing.assert_allclose(got.scales, want.scales, rtol=2**-7)
    wide, wanted = (np.asarray(r.values, np.float64) * by_column(r.scales, 384) for r in (got, want))
    assert np.linalg.norm(wide - wanted) < 1e-2 * np.linalg.norm(wanted)


@backends
@pytest.mark.parametrize(("element", "groups"), [(E4M3, 1), (E4M3, 4), (INT8, 1)])
def test_a_product_may_round_what_it_reads(backend, element, groups):
    """As a kernel of its own does it, with a scale for each row and block of columns."""
    weight, wide = weight_of(element, groups, False, 96, 512)
    x = jnp.asarray(np.random.default_rng().normal(size=(3, 512)), jnp.bfloat16)
    rounded = round_rows(x, element, groups=4)
    want = (np.asarray(rounded.values, np.float64) * by_column(rounded.scales, 512)) @ wide.T
    got = quant_gemm(x, weight, replace(SMALL, rounds=True), out_dtype=jnp.float32, backend=on(backend))
    assert error(got.sum(0), want) < 3e-3  # a division may fall to either side of a tie


@backends
@pytest.mark.parametrize(("element", "groups"), [(E4M3, 1), (E4M3, 4), (INT8, 1)])
def test_a_product_may_widen_its_weight(backend, element, groups):
    """Then its rows stay what they are."""
    weight, wide = weight_of(element, groups, False, 96, 512)
    x = jnp.asarray(np.random.default_rng().normal(size=(3, 512)), jnp.bfloat16)
    got = quant_gemm(x, weight, replace(SMALL, widens=True), out_dtype=jnp.float32, backend=on(backend))
    assert error(got.sum(0), np.asarray(x, np.float64) @ wide.T) < 2e-6


NORMED = [  # element, groups, zero points, columns, tiling
    (E4M3, 1, False, 512, Tiling(32, 128, 1, 4, 3, widens=True)),
    (E4M3, 4, False, 512, Tiling(32, 128, 1, 4, 3, min_rows=8, rounds=True)),
    pytest.param(INT8, 1, False, 512, Tiling(64, 256, 1, 4, 3, rounds=True), marks=pytest.mark.full),
    pytest.param("int4", 16, True, 512, Tiling(32, 128, 1, 4, 3), marks=pytest.mark.full),  # groups of 32
    ("int4", 4, True, 512, Tiling(64, 128, 1, 2, 3, min_rows=8)),  # of 128
    ("int4", 1, False, 256, Tiling(32, 256, 1, 4, 3)),
]


@backends
@pytest.mark.parametrize(("parts", "offset", "gated"), [(4, 0.0, False), (0, 1.0, True)])
@pytest.mark.parametrize(("element", "groups", "zeros", "columns", "tiling"), NORMED, ids=str)
def test_with_the_norm_before_it(backend, element, groups, zeros, columns, tiling, parts, offset, gated):
    rng, outputs = np.random.default_rng(), 100
    weight, wide = weight_of(element, groups, zeros, *((2, outputs) if gated else (outputs,)), columns)
    x, norm = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((1, columns), columns))
    delta = jnp.asarray(rng.normal(size=(parts, 1, columns) if parts else (1, columns)), jnp.float32)
    how = {"eps": 1e-5, "offset": offset}
    wanted, _ = add_rms_norm(x, delta, norm, **how, backend="xla")
    row = np.asarray(wanted, np.float64)
    row = row / np.sqrt((row**2).mean() + 1e-5) * (np.asarray(norm, np.float64) + offset)
    if tiling.rounds:
        rows = round_rows(jnp.asarray(row, jnp.float32), element, groups=columns // tiling.block_in)
        row = np.asarray(rows.values, np.float64) * by_column(rows.scales, columns)
    how |= {"activation": jnp.square if gated else None, "out_dtype": jnp.float32, "backend": on(backend)}
    added, got = norm_quant_gemm(x, delta, norm, weight, tiling, **how)
    # Parts are added in another order, so that a sum may round to a neighbour.
    np.testing.assert_allclose(np.asarray(added, np.float32), np.asarray(wanted, np.float32), rtol=2**-7)
    product = row @ wide.swapaxes(-1, -2)
    want = product[0] ** 2 * product[1] if gated else product
    assert error(got, want) < (3 if gated else 1) * 4e-3  # of 16 bits; of a tie that falls to either side


UNSCALED = [  # element, groups, zero points, tiling
    (E4M3, 1, False, replace(SMALL, rounds=True)),
    pytest.param(E4M3, 4, False, replace(SMALL, widens=True), marks=pytest.mark.full),
    ("int4", 4, True, replace(SMALL, min_rows=8)),
]


@backends
@pytest.mark.parametrize(("element", "groups", "zeros", "tiling"), UNSCALED, ids=str)
def test_a_norm_s_scale_may_be_left_to_the_reader_of_parts(backend, element, groups, zeros, tiling):
    """The parts, scaled, are the product of `norm_quant_gemm`, each of its share of the columns."""
    rng = np.random.default_rng()
    weight, wide = weight_of(element, groups, zeros, 100, 512)
    x, norm = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((1, 512), 512))
    delta = jnp.asarray(rng.normal(size=(3, 1, 512)), jnp.float32)
    how = {"eps": 0.5, "backend": on(backend)}
    added, (parts, squares) = unscaled_norm_quant_gemm(x, delta, norm, weight, tiling, **how)
    whole = replace(tiling, splits=1)
    same, want = norm_quant_gemm(x, delta, norm, weight, whole, **how, out_dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(added, np.float32), np.asarray(same, np.float32))
    wanted = np.square(np.asarray(added, np.float64)).reshape(2, -1).sum(1) / 512 + 0.25
    assert error(squares, wanted) < 1e-6
    tie = 2e-2 if tiling.rounds else 5e-3  # numbers between two of 8 bits may fall to either side
    assert error(parts.sum(0) / jnp.sqrt(squares.sum()), np.asarray(want, np.float64)) < tie
    row = np.asarray(added, np.float64) * np.asarray(norm, np.float64)
    assert error(parts[0], row[:, :256] @ wide[:, :256].T) < 5e-2  # of rounding to 8 bits


STREAMED = [  # element, groups, zero points, rows, outputs, columns, splits, overlaps
    (E4M3, 8, False, 16, 128, 1024, 1, False),
    (E4M3, 4, False, 96, 256, 512, 1, True),
    (E4M3, 4, False, 40, 128, 512, 2, True),
    (E4M3, 1, False, 8, 128, 256, 1, False),
    (INT8, 1, False, 160, 256, 1024, 2, False),
    ("int4", 4, True, 144, 128, 512, 4, True),
    ("int4", 2, False, 128, 256, 512, 1, False),
    ("int4", 1, True, 360, 128, 256, 2, True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("element", "groups", "zeros", "rows", "outputs", "columns", "splits", "overlaps"), STREAMED
)
def test_products_of_many_rows(backend, element, groups, zeros, rows, outputs, columns, splits, overlaps):
    if backend == "pallas_interpret" and (element == "int4" or not hasattr(plgpu, "InterpretGPUParams")):
        pytest.skip("JAX's interpreter of Mosaic, from 0.11 on, takes no left operands in registers")
    weight, wide = weight_of(element, groups, zeros, outputs, columns)
    x, row = rows_of(element, groups, rows, columns)
    tiling = replace(deepest(rows, weight, 3, splits, overlaps=overlaps), num_stages=3)
    # The tensor cores of a GPU keep 14 bits of a sum of E4M3 over a few blocks.
    coarse = splits == 1 or (element == E4M3 and backend == "pallas")
    dtype, most = (jnp.bfloat16 if splits == 1 else jnp.float32), (3e-3 if coarse else 1e-5)
    got = streamed_quant_gemm(x, weight, tiling, out_dtype=dtype, backend=on(backend))
    assert got.shape == (splits, rows, outputs)
    assert error(got.astype(jnp.float32).sum(0), row @ wide.T) < most
    first = columns // splits
    assert error(got[0], row[:, :first] @ wide[:, :first].T) < most


@pytest.mark.parametrize("tokens", [8, 16, 40, 264])
def test_scales_of_few_rows_lie_where_they_can_be_copied_to(tokens):
    """A stage's 16 scales were once 64 bytes behind the one before: CUDA_ERROR_MISALIGNED_ADDRESS."""
    for dtype in (jnp.float32, jnp.float16, jnp.uint8):
        assert vector_space(tile_of(tokens), dtype) * jnp.dtype(dtype).itemsize % 128 == 0
        assert vector_space(tile_of(tokens), dtype) >= tile_of(tokens)


@pytest.mark.parametrize(
    ("tokens", "weight", "fault"),
    [
        (100, (E4M3, 1, False, 128, 256), "100 rows cannot be cut"),
        (128, (E4M3, 1, False, 96, 256), "96 outputs are no whole blocks of 128"),
        (128, (INT8, 2, False, 128, 256), "weights of int8 with 2 groups are XLA's"),
        (144, (INT8, 1, False, 128, 256), "144 rows of int8 make tiles of 72"),
        (128, ("int4", 2, False, 128, 384), "groups of 192 columns are no blocks of 128"),
        (128, ("int4", 8, True, 128, 512), "groups of 64 columns are no blocks of 128"),
    ],
)
def test_what_cannot_be_streamed_is_told(tokens, weight, fault):
    assert fault in str(why_not_streamed(tokens, weight_of(*weight)[0]))


@backends
@pytest.mark.parametrize("dtype", [E4M3, INT8])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 256, 1), (5, 384, 3), (3, 200, 1)])
def test_rows_are_rounded_alike(backend, dtype, rows, columns, groups):
    x = np.random.default_rng().normal(size=(rows, columns))
    x[0, : columns // groups] = 0
    x = jnp.asarray(x, jnp.bfloat16)
    got, want = (
        jax.jit(partial(round_rows, dtype=dtype, groups=groups, backend=b))(x) for b in (on(backend), "xla")
    )
    np.testing.assert_allclose(got.scales, want.scales, rtol=1e-6)
    differ = np.asarray(got.values, np.float32) != np.asarray(want.values, np.float32)
    assert differ.mean() < 1e-3  # a division may fall to either side of a tie
    wide = np.asarray(got.values, np.float64) * by_column(got.scales, columns)
    step = 0.51 / 127 if dtype == INT8 else 0.04
    assert np.abs(wide - np.asarray(x, np.float64)).max() <= step * np.abs(np.asarray(x, np.float64)).max()


@backends
@pytest.mark.parametrize("groups", [1, 3])
def test_the_norm_rounds_what_it_gives(backend, groups):
    rng = np.random.default_rng()
    x, weight = (
        jnp.asarray(rng.normal(size=(3, 384)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=384), jnp.bfloat16),
    )
    delta = jnp.asarray(rng.normal(size=(2, 3, 384)), jnp.float32)
    how = {"eps": 1e-5, "backend": on(backend)}
    wanted, normed = add_rms_norm(x, delta, weight, **how)
    added, got = add_rms_norm_quant(x, delta, weight, E4M3, groups=groups, **how)
    np.testing.assert_array_equal(np.asarray(added, np.float32), np.asarray(wanted, np.float32))
    want = round_rows(normed, E4M3, groups=groups)
    np.testing.assert_allclose(got.scales, want.scales, rtol=1e-6)
    assert (np.asarray(got.values, np.float32) != np.asarray(want.values, np.float32)).mean() < 1e-3


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_refused():
    weight, _ = weight_of(E4M3, 1, False, 32, 256)
    x = round_rows(jnp.ones((2, 256)), E4M3)
    call = partial(quant_gemm, out_dtype="float32", backend="xla")
    with pytest.raises(ValueError, match="x is bfloat16 with None groups"):
        call(jnp.ones((2, 256), jnp.bfloat16), weight, SMALL)
    with pytest.raises(ValueError, match="256 columns of a weight"):
        call(round_rows(jnp.ones((2, 128)), E4M3), weight, SMALL)
    with pytest.raises(ValueError, match="256 elements cannot be cut"):
        call(x, weight, Tiling(32, 128, 4, 4, 2))
    with pytest.raises(ValueError, match=r"must be \[2, N, K\]"):
        gated_quant_gemm(x, weight, MANY, activation=jax.nn.silu, out_dtype="float32", backend="xla")
    four, _ = weight_of("int4", 2, False, 32, 256)
    with pytest.raises(ValueError, match="only weights of 8 bits are widened"):
        call(jnp.ones((2, 256), jnp.bfloat16), four, replace(SMALL, rounds=True))
    four, _ = weight_of("int4", 16, False, 32, 256)
    assert "groups that fit 128 columns; there are 16 of 16" in str(why_not_quant(four))
