"""Grouped products: rows in any order, groups without rows, all rows in one."""

from __future__ import annotations

from functools import partial
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.models.formats import E2M1, E4M3, E8M0, FOUR_BITS, INT4, INT8
from lmdeploy_jax.pallas_kernels.grouped_matmul import (
    aligned,
    chunks,
    fused_experts,
    gated_grouped_matmul,
    group_rows,
    grouped_matmul,
    tile_rows,
    weighted_grouped_matmul,
    why_not_fused,
    why_not_widened,
)
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD
from lmdeploy_jax.pallas_kernels.shapes import Quantised

COLUMNS, OUT = 24, 40


@pytest.mark.parametrize(("rows", "experts"), [(1, 4), (517, 3), (40, 128)])
@pytest.mark.parametrize("spread", ["drawn", "one", "last", "in turn"])
def test_each_row_meets_its_own_weight(rows, experts, spread):
    rng = np.random.default_rng(rows)
    chosen = {
        "drawn": rng.integers(0, experts, rows),
        "one": np.full(rows, experts // 2),
        "last": np.full(rows, experts - 1),
        "in turn": np.arange(rows) % experts,
    }[spread].astype(np.int32)
    x, weight = rng.normal(size=(rows, COLUMNS)), rng.normal(size=(experts, OUT, COLUMNS))

    @jax.jit
    def multiply(x, weight, chosen):
        groups = group_rows(chosen, experts)
        product = grouped_matmul(x[groups.source], weight, groups, out_dtype=jnp.float32)
        return groups, product[groups.place]

    groups, product = multiply(x.astype(np.float32), weight.astype(np.float32), chosen)
    np.testing.assert_allclose(product, np.einsum("mk,mnk->mn", x, weight[chosen]), rtol=1e-4, atol=1e-4)
    used = groups.tiles[groups.tiles[:, 2] > 0]
    np.testing.assert_array_equal(np.unique(used[:, 0]), np.unique(chosen))  # no other weight is read
    assert used[:, 2].sum() == rows
    assert used[:, 2].max() <= tile_rows(rows, experts, "xla")
    np.testing.assert_array_equal(groups.group, np.sort(chosen))


BACKENDS = ["pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)]
SHAPES = [
    (1, 4, 3, 24, 40, "float32", "drawn", 2),
    (5, 8, 3, 96, 72, "bfloat16", "one", 2),
    (70, 4, 2, 64, 64, "bfloat16", "drawn", 2),
    (300, 2, 1, 40, 24, "float32", "one", 2),
    (5, 4, 2, 40, 72, "float32", "drawn", 1),
]
"""Tokens, experts, choices of a token, columns and outputs, dtype, how tokens choose, and the products of a
block: 1 where it is not gated.
"""
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def gated(gate: jax.Array, up: jax.Array | None = None) -> jax.Array:
    return jax.nn.silu(gate) if up is None else jax.nn.silu(gate) * up


def chosen_of(tokens: int, experts: int, choices: int, spread: str) -> np.ndarray:
    rng = np.random.default_rng(tokens)
    if spread == "one":  # the same for all, so that some have no rows
        return np.broadcast_to(np.arange(experts)[-choices:], (tokens, choices)).astype(np.int32)
    return np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]).astype(np.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "columns", "outputs", "dtype", "spread", "products"), SHAPES
)
def test_the_kernels_do_what_xla_does(
    tokens, experts, choices, columns, outputs, dtype, spread, products, backend
):
    """With biases, with what stands beside the experts, and with what is no block's multiple."""
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng(0)
    x, gate_up, down = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((tokens, columns), (experts, products, outputs, columns), (experts, columns, outputs))
    )
    biases = rng.normal(size=(experts, products, outputs)).astype(np.float32)
    scales = rng.random(size=(tokens, choices)).astype(np.float32)
    chosen = chosen_of(tokens, experts, choices, spread)

    def run(backend, dtype, chosen, scales, x, gate_up, down, biases):
        groups = group_rows(chosen.reshape(-1), experts, backend=backend)
        how = {"gating": gated, "bias": biases.astype(dtype), "backend": backend}
        inner = gated_grouped_matmul(x.astype(dtype), gate_up.astype(dtype), groups, **how)
        how = {"beside": x.astype(dtype), "out_dtype": jnp.float32, "backend": backend}
        return groups, weighted_grouped_matmul(inner, down.astype(dtype), groups, scales, **how)

    arrays = (chosen, scales, x, gate_up, down, biases)
    (groups, got), (_, want) = (
        jax.jit(run, static_argnums=(0, 1))(each, dtype, *arrays) for each in (backend, "xla")
    )
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < TOLERANCE[dtype]
    _check_groups(groups, chosen.reshape(-1), experts, tile_rows(chosen.size, experts, backend))


FORMATS = {  # element, columns that share a scale, dtype of scales, whether there are zero points
    "mxfp4": (E2M1, 32, E8M0, False),
    "awq": (INT4, 64, "float16", True),
    "gptq": (INT4, 128, "float16", False),
    "rows of int4": (INT4, 0, "bfloat16", True),
    "blocks of fp8": (E4M3, 64, "float32", False),
    "rows of fp8": (E4M3, 0, "float32", False),
    "rows of int8": (INT8, 0, "bfloat16", False),
}
KINDS = ["mxfp4", "awq", "blocks of fp8"]
KINDS += [pytest.param(kind, marks=pytest.mark.full) for kind in FORMATS if kind not in KINDS]
QUANTISED = [  # as SHAPES; columns of tiles of 128 and of 64, and outputs that fill no block
    (1, 8, 2, 256, 192, "bfloat16", "drawn", 2),
    pytest.param(40, 4, 2, 192, 256, "float32", "one", 1, marks=pytest.mark.full),
]


def drawn(kind: str, *out: int, columns: int, rng: np.random.Generator) -> Quantised:
    """A weight of such a format."""
    element, width, scale, zeros = FORMATS[kind]
    groups = columns // gcd(width or columns, columns)
    if element in FOUR_BITS:
        values = jnp.asarray(rng.integers(0, 1 << 16, (*out, columns // PER_WORD)), jnp.uint16)
    else:
        values = jnp.asarray(rng.normal(size=(*out, columns)) * 40).astype(element)
    shape = (groups, *out)
    scales = rng.integers(120, 130, shape) if scale == E8M0 else rng.uniform(0.01, 0.1, shape)
    points = jnp.asarray(rng.integers(0, 16, shape), jnp.uint8) if zeros else None
    return Quantised(values, jnp.asarray(scales).astype("uint8" if scale == E8M0 else scale), points)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "columns", "outputs", "dtype", "spread", "products"), QUANTISED
)
def test_weights_of_few_bits_are_multiplied_as_what_they_stand_for(
    tokens, experts, choices, columns, outputs, dtype, spread, products, kind, backend
):
    """One token, whose experts are not sorted, experts that nobody chose, biases."""
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng(0)
    gate_up = drawn(kind, experts, products, outputs, columns=columns, rng=rng)
    down = drawn(kind, experts, columns, columns=outputs, rng=rng)
    assert why_not_widened(gate_up) is None
    chosen = chosen_of(tokens, experts, choices, spread)
    x, scales = rng.normal(size=(tokens, columns)), rng.random(size=(tokens, choices)).astype(np.float32)
    biases = jnp.asarray(rng.normal(size=(experts, products, outputs)), dtype)

    def run(backend, gate_up, down, chosen, x, scales, biases):
        groups = group_rows(chosen.reshape(-1), experts, different=tokens == 1, backend=backend)
        how = {"gating": gated, "bias": biases, "backend": backend}
        inner = gated_grouped_matmul(x.astype(dtype), gate_up, groups, **how)
        how = {"bias": biases.reshape(experts, -1)[:, :1] * jnp.ones((1, columns), dtype), "backend": backend}
        return weighted_grouped_matmul(inner, down, groups, scales, out_dtype=jnp.float32, **how)

    arrays = gate_up, down, chosen, x, scales, biases
    got, want = (jax.jit(partial(run, each))(*arrays) for each in (backend, "xla"))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < TOLERANCE[dtype]


def _check_groups(groups, chosen: np.ndarray, experts: int, height: int) -> None:
    """Each row once, in the order of its group, and each in one tile of that group."""
    source, place, group, tiles = map(np.asarray, groups)
    order = np.argsort(chosen, stable=True)
    np.testing.assert_array_equal(source, order)
    np.testing.assert_array_equal(place[order], np.arange(chosen.size))
    np.testing.assert_array_equal(group, chosen[order])
    covered = [(g, row) for g, first, count in tiles if count for row in range(first, first + count)]
    assert covered == list(zip(chosen[order], range(chosen.size), strict=True))
    assert tiles[:, 2].max() <= height
    assert len(tiles) == min(experts, chosen.size) + (chosen.size // height if chosen.size >= experts else 0)


@pytest.mark.parametrize(
    ("rows", "experts"), [(1, 128), (8, 128), (127, 128), (128, 128), (2500, 7), (40, 3)]
)
def test_rows_are_laid_together_by_the_kernel(rows, experts):
    """Rows of several chunks too, and one group that has all of them."""
    for chosen in (np.random.default_rng(rows).integers(0, experts, rows), np.full(rows, experts - 1)):
        groups = group_rows(jnp.asarray(chosen, jnp.int32), experts, backend="pallas_interpret")
        _check_groups(groups, chosen, experts, tile_rows(rows, experts, "pallas_interpret"))


@pytest.mark.parametrize(("rows", "experts", "height"), [(700, 40, 128), (513, 3, 32)])
def test_many_rows_are_laid_together_by_programs_of_their_own(rows, experts, height):
    """As one program does it, tiles in use first; and so that a tile's rows begin where TMA reads them."""
    for chosen in (np.random.default_rng(rows).integers(0, experts, rows), np.full(rows, experts - 1)):
        found = chunks.group_rows(jnp.asarray(chosen, jnp.int32), experts, height, interpret=True)
        _check_groups(found.groups, chosen, experts, height)
        counts = np.asarray(found.groups.tiles)[:, 2]
        assert (np.flatnonzero(counts) == np.arange(np.count_nonzero(counts))).all()
        aligned = [tile * height + row for tile, count in enumerate(counts) for row in range(count)]
        np.testing.assert_array_equal(np.asarray(found.aligned)[np.argsort(chosen, kind="stable")], aligned)


def test_rows_that_tokens_were_copied_to_add_up_by_token():
    """With columns that no program's block has, and rows that nobody wrote."""
    rng = np.random.default_rng(0)
    x, scales = rng.normal(size=(9, 40)).astype(np.float32), rng.random((9, 3)).astype(np.float32)
    place = rng.permutation(64)[:27].astype(np.int32)
    rows = aligned.spread(jnp.asarray(x), jnp.asarray(place), 64, interpret=True)
    np.testing.assert_array_equal(np.asarray(rows)[place], x.repeat(3, axis=0))
    factors = np.arange(64, dtype=np.float32)[:, None]
    out = aligned.combine(rows * factors, jnp.asarray(place), jnp.asarray(scales), interpret=True)
    want = x * (scales * place.reshape(9, 3)).sum(1, keepdims=True)
    np.testing.assert_allclose(out, want, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "columns", "inner"), [(5, 256, 192), (8, 320, 128)])
@pytest.mark.parametrize("spread", ["drawn", "one"])
def test_a_fused_mixture_is_xlas(experts, columns, inner, spread):
    """Tiles with few rows, groups without any, and sizes that are no blocks' multiples."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a Hopper GPU")
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (300, columns), (experts, 2, inner, columns), (experts, columns, inner)
    arrays = [jax.random.normal(key, shape, "bfloat16") for key, shape in zip(keys, shapes, strict=False)]
    scales = jax.random.uniform(keys[3], (300, 2))
    chosen = jnp.asarray(chosen_of(300, experts, 2, spread))
    got = fused_experts(*arrays, chosen, scales, gating=gated)
    groups = group_rows(chosen.reshape(-1), experts)
    between = gated_grouped_matmul(*arrays[:2], groups, gating=gated, backend="xla")
    how = {"out_dtype": jnp.float32, "backend": "xla"}
    want = weighted_grouped_matmul(between, arrays[2], groups, scales, **how).sum(0)
    assert jnp.linalg.norm(got - want) / jnp.linalg.norm(want) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    ("tokens", "dtype", "biased", "reason"),
    [
        (256, "bfloat16", False, None),
        (255, "bfloat16", False, "510 rows of 8 experts leave tiles mostly empty"),
        (256, "float32", False, "16-bit numbers, not float32"),
        (256, "bfloat16", True, "no biases"),
    ],
)
def test_what_a_fused_mixture_cannot_do_is_said(tokens, dtype, biased, reason):
    found = why_not_fused(tokens, 2, (8, 2, 128, 192), dtype, biased=biased)
    assert found is None if reason is None else reason in found
    if reason and not biased:
        x, down = jnp.zeros((tokens, 192), dtype), jnp.zeros((8, 192, 128), dtype)
        experts, scales = jnp.zeros((tokens, 2), jnp.int32), jnp.zeros((tokens, 2))
        with pytest.raises(ValueError, match="take backend 'pallas'"):
            fused_experts(x, jnp.zeros((8, 2, 128, 192), dtype), down, experts, scales, gating=gated)


def test_weights_that_do_not_fit_are_named():
    groups = group_rows(jnp.zeros(4, jnp.int32), 2)
    with pytest.raises(ValueError, match=r"rows \(3, 8\) fit neither the weights \(2, 5, 8\)"):
        grouped_matmul(jnp.zeros((3, 8)), jnp.zeros((2, 5, 8)), groups, out_dtype=jnp.float32)
