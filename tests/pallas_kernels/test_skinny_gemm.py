"""Skinny products, every implementation, against numpy in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.skinny_gemm import (
    MAX_TOKENS,
    Tiling,
    gated_skinny_gemm,
    norm_skinny_gemm,
    skinny_gemm,
    unscaled_norm_skinny_gemm,
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
SMALL = [  # tokens, outputs, inner, tiling; outputs that fill no block, tokens that fill no tile
    (1, 96, 256, Tiling(64, 64, 2, 4, 3)),
    (5, 100, 128, Tiling(32, 32, 1, 4, 2)),
    (32, 64, 512, Tiling(64, 64, 4, 4, 3)),
]
LARGE = [(1, 6144, 4096, Tiling(64, 128, 4, 4, 4)), (100, 4096, 14336, Tiling(128, 64, 2, 4, 4))]
CASES = [("xla", *case) for case in SMALL] + [("pallas_interpret", *case) for case in SMALL]
GPU_CASES = [pytest.param("pallas", *case, marks=pytest.mark.gpu) for case in SMALL + LARGE]
parametrize = pytest.mark.parametrize(
    ("backend", "tokens", "outputs", "inner", "tiling"), [*CASES, *GPU_CASES], ids=str
)


def drawn(backend: str, dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng()
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def error(got: jax.Array, want: np.ndarray) -> float:
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def sigmoid_times(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    return jax.nn.silu(x) if isinstance(x, jax.Array) else x / (1 + np.exp(-x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@parametrize
def test_the_parts_sum_to_the_product(backend, tokens, outputs, inner, tiling, dtype):
    x, weight = drawn(backend, dtype, (tokens, inner), (outputs, inner))
    bias = jnp.arange(outputs, dtype=dtype) / outputs
    parts = skinny_gemm(x, weight, tiling, bias=bias, out_dtype=jnp.float32, backend=backend)
    assert parts.shape[0] == tiling.splits
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
    assert error(parts.sum(axis=0), want) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@parametrize
def test_gated(backend, tokens, outputs, inner, tiling, dtype):
    tiling = Tiling(tiling.block_out // 2, tiling.block_in, 1, tiling.num_warps, tiling.num_stages)
    x, weight = drawn(backend, dtype, (tokens, inner), (2, outputs, inner))
    got = gated_skinny_gemm(x, weight, tiling, activation=jax.nn.silu, backend=backend)
    gate, up = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).transpose(0, 2, 1)
    assert got.dtype == x.dtype
    assert error(got, sigmoid_times(gate) * up) < TOLERANCE[dtype]


NORMED = [  # outputs, inner, parts (0: delta is whole), offset, tiling
    (96, 256, 4, 0.0, Tiling(64, 64, 1, 4, 3)),
    (100, 128, 1, 1.0, Tiling(32, 32, 1, 4, 2)),
    (64, 512, 0, 0.0, Tiling(16, 256, 1, 4, 3)),
]
LARGE_NORMED = [
    (6144, 4096, 4, 0.0, Tiling(32, 128, 1, 4, 6)),
    (14336, 4096, 2, 0.0, Tiling(64, 128, 1, 4, 3)),
]
ROUNDS = 16
NORMED_CASES = [("pallas_interpret", *case) for case in NORMED]
NORMED_GPU = [pytest.param("pallas", *case, marks=pytest.mark.gpu) for case in NORMED + LARGE_NORMED]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("backend", "outputs", "inner", "parts", "offset", "tiling"), [*NORMED_CASES, *NORMED_GPU], ids=str
)
def test_with_the_norm_before_it(backend, outputs, inner, parts, offset, tiling, dtype, gated):
    options = {"eps": 1e-5, "offset": offset, "out_dtype": dtype}
    options["activation"] = jax.nn.silu if gated else None
    kernel, plain = (
        jax.jit(partial(norm_skinny_gemm, tiling=tiling, backend=b, **options)) for b in (backend, "xla")
    )
    found = []
    for _ in range(ROUNDS if outputs < 1000 else 1):
        shapes = (1, inner), (inner,), (2, outputs, inner) if gated else (outputs, inner)
        x, norm, weight = drawn(backend, dtype, *shapes)
        (delta,) = drawn(backend, "float32" if parts else dtype, (parts, 1, inner) if parts else (1, inner))
        arrays = (x, delta, norm, (weight / inner**0.5).astype(dtype))
        (added, got), (wanted, separate) = kernel(*arrays), plain(*arrays)
        assert error(added, np.asarray(wanted, np.float64)) < TOLERANCE[dtype]
        row, norm, weight = (np.asarray(array, np.float64) for array in (wanted, norm, arrays[3]))
        want = weight @ (row[0] / np.sqrt((row**2).mean() + 1e-5) * (norm + offset))
        want = sigmoid_times(want[0]) * want[1] if gated else want
        found.append((got[0], separate[0], want))
    got, separate, want = (np.asarray(rows, np.float64) for rows in zip(*found, strict=True))
    # No further from the truth than the separate operations, which round more often; over many rows, since
    # for a single one luck decides.
    assert error(got, want) < 1.2 * error(separate, want) + TOLERANCE["float32"]


@pytest.mark.parametrize(
    "backend", ["xla", "pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)]
)
def test_a_norm_s_scale_may_be_left_to_the_reader_of_parts(backend):
    """Each part is then of a share of the row, squares included."""
    x, norm, weight = drawn(backend, "bfloat16", (1, 256), (256,), (100, 256))
    (delta,) = drawn(backend, "float32", (3, 1, 256))
    how = {"tiling": Tiling(64, 64, 2, 4, 3), "eps": 0.5, "offset": 1.0, "backend": backend}
    added, (parts, squares) = unscaled_norm_skinny_gemm(x, delta, norm, weight, **how)
    row = np.asarray(added, np.float64)
    assert error(added, np.asarray(x, np.float64) + np.asarray(delta, np.float64).sum(0)) < 5e-3
    assert error(squares, (row**2).reshape(2, -1).sum(1) / 256 + 0.25) < TOLERANCE["float32"]
    row = row * (np.asarray(norm, np.float64) + 1)
    want = np.asarray(weight, np.float64) @ row[0] / np.sqrt(float(squares.sum()))
    assert error(parts.sum(0)[0] / jnp.sqrt(squares.sum()), want) < TOLERANCE["bfloat16"]
    assert error(parts[0, 0], np.asarray(weight, np.float64)[:, :128] @ row[0, :128]) < TOLERANCE["bfloat16"]


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_refused():
    x, weight, tiling = jnp.zeros((2, 96)), jnp.zeros((8, 96)), Tiling(64, 64, 1, 4, 2)
    with pytest.raises(ValueError, match="96 elements cannot be cut"):
        skinny_gemm(x, weight, tiling, out_dtype="float32", backend="xla")
    with pytest.raises(ValueError, match="do not fit"):
        skinny_gemm(x, weight[:, 1:], tiling, out_dtype="float32", backend="xla")
    with pytest.raises(ValueError, match=f"1 to {MAX_TOKENS}"):
        skinny_gemm(jnp.zeros((300, 96)), weight, tiling, out_dtype="float32", backend="xla")
    with pytest.raises(ValueError, match="splits is 2"):
        gated_skinny_gemm(
            x,
            weight[None].repeat(2, 0),
            Tiling(32, 16, 2, 4, 2),
            activation=jax.nn.silu,
            backend="pallas_interpret",
        )
    with pytest.raises(ValueError, match=r"x \(2, 96\), delta \(2, 96\) and norm \(96,\) do not fit"):
        norm_skinny_gemm(
            x, x, x[0], weight, Tiling(8, 32, 1, 4, 2), eps=1e-5, out_dtype="float32", backend="xla"
        )
    with pytest.raises(ValueError, match=r"splits, 3, 1"):
        norm_skinny_gemm(
            x[:1], x[:1], x[0], weight, Tiling(8, 32, 3, 4, 2), eps=1e-5, out_dtype="float32", backend="xla"
        )
