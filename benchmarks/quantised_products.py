"""Products of few rows with quantised weights on a GPU: right, and how fast beside XLA's and 16 bits.

    python -m benchmarks.quantised_products llama3-8b --formats fp8,smooth_quant,awq,fp8_blocks

First a cut of each of the model's matrices is held against `xla.py`, later the fastest ones are too. The
table has microseconds by the profiler, GB/s of the weight, and what was expected; the cuts go to
--tuning_dir, where the engine looks for them. `--only_times` leaves out what comes before: checks, roundings,
16 bits. `--interpret` runs all of it but the times on a CPU, for tiny shapes.
"""

from __future__ import annotations

import argparse
import itertools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.bench import quant_tune, quantised, shapes, tune
from lmdeploy_jax.bench.device_time import Case, device_seconds
from lmdeploy_jax.bench.quant_tune import TOKENS, Quantised
from lmdeploy_jax.bench.tune import Candidate, Shape
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.engine.core.compile import tuning_dir
from lmdeploy_jax.models import tuning
from lmdeploy_jax.models.formats import E4M3
from lmdeploy_jax.models.products import dense_product
from lmdeploy_jax.models.quant_products import MANY_ROWS
from lmdeploy_jax.models.tuning import Measurement, Tuning
from lmdeploy_jax.pallas_kernels.act_and_mul import act_and_mul_quant
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm_quant
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised as Rounded
from lmdeploy_jax.pallas_kernels.shapes import Unscaled
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling, Tiling

FORMATS = {**quantised.FORMATS, "fp8_blocks": quantised.FP8_BLOCKS}
SIXTEEN_BITS = 2**-7  # the share by which a number's neighbours in bfloat16 differ at most
PARTS_ERROR, ROUNDED_ERROR = 1e-4, 6e-3  # of sums in f32 in another order, and of 16 bits
NORMED_ERROR = 1e-2  # of 16 bits, where `xla.py` norms in f32
EXPECTED = {  # microseconds on an H200 for Llama-3-8B's shapes at `EXPECTED_ROWS`, guessed before measuring
    "fp8": {
        "qkv": (9.5, 9.8, 11.5),
        "o": (7.5, 8, 9.5),
        "gate_up": (31, 31.5, 36),
        "down": (17.5, 18, 22),
        "norm_qkv": (11,),
        "norm_gate_up": (32,),
    },
    "smooth_quant": {
        "qkv": (9, 9.3, 11),
        "o": (7, 7.5, 9),
        "gate_up": (31, 31, 34),
        "down": (17, 17.5, 21),
        "norm_qkv": (10.5,),
        "norm_gate_up": (31,),
    },
    "fp8_blocks": {
        "qkv": (10, 10.5, 14, 16, 16, 45, 180),
        "o": (8, 8.5, 12, 16, 16, 30, 120),
        "gate_up": (32, 33, 45, 34, 62, 210, 830),
        "down": (18, 19, 28, 52, 52, 105, 415),
        "norm_qkv": (12,),
        "norm_gate_up": (37,),
    },
    "awq": {
        "qkv": (9.5, 10, 14, 24, 24, 68, 270),
        "o": (8, 8.5, 11, 24, 24, 46, 180),
        "gate_up": (27, 30, 45, 50, 95, 310, 1230),
        "down": (16, 17, 24, 80, 80, 160, 630),
        "norm_qkv": (11,),
        "norm_gate_up": (30,),
    },
}
ROWS = quant_tune.TOKENS + quant_tune.MANY_TOKENS
EXPECTED_ROWS = (1, 16, 64, 128, 256, 1024, 4096)
SMALL = {1: 2.2, 64: 2.5}  # the same of a rounding, alone or with the norm, by rows


def check(product: Quantised, measured: Measurement) -> float:
    """The error of the fastest cut, as a share of the product of `xla.py`."""
    leaves, tiling = product.weight(jax.random.key(3)), measured.tiling
    ways, results = (product, Quantised(product.shape, product.held, "xla")), []
    for way in ways:
        if product.shape.normed:
            assert isinstance(tiling, Tiling)
            _, found = jax.jit(way.normed(tiling, tuning.UNTUNED))(*product.normed_arguments(), leaves)
            if isinstance(found, Unscaled):
                found = found.parts.sum(0) / jnp.sqrt(found.mean_squares.sum())
        else:
            found = jax.jit(way.function(tiling))(product.rows(measured.tokens, tiling), leaves)
        results.append(np.asarray(found, np.float64))
    got, want = results
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check_rounding(backend: str, columns: int) -> None:
    """Rounded rows, with and without a norm before, are those of XLA."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (3, columns), "bfloat16"), jnp.ones(columns, "bfloat16")
    delta = jax.random.normal(keys[1], (2, 3, columns))
    for dtype in ("float8_e4m3fn", "int8"):
        for groups in (1, columns // 128):
            how = {"groups": groups, "eps": 1e-5}
            ways = [
                (
                    jax.jit(lambda x, b=b, d=dtype, g=groups: round_rows(x, d, groups=g, backend=b))(x),
                    jax.jit(lambda *a, b=b, d=dtype, how=how: add_rms_norm_quant(*a, d, **how, backend=b)[1])(
                        x, delta, weight
                    ),
                )
                for b in (backend, "xla")
            ]
            for got, want in zip(*ways, strict=True):
                differ = compare_rounded(got, want)
                print(f"rounding to {dtype}, {columns} columns in {groups}: {differ:.2%} of elements differ")


def compare_rounded(got: Rounded, want: Rounded) -> float:
    """The share of elements that differ. Raises AssertionError where they are more than a step apart.

    XLA may leave out the rounding of a norm to 16 bits before the one to 8, so that elements near the middle
    of two steps fall to either, a row's largest element among them.
    """
    np.testing.assert_allclose(got.scales, want.scales, rtol=SIXTEEN_BITS)
    ways = [np.asarray(rows.values, np.float64) for rows in (got, want)]
    width = ways[0].shape[1] // want.scales.shape[0]
    scales = [np.repeat(np.asarray(rows.scales, np.float64).T, width, axis=1) for rows in (got, want)]
    apart = np.abs(ways[0] * scales[0] - ways[1] * scales[1])
    step = np.maximum(*map(step_at, ways)) if want.values.dtype != "int8" else 1.0
    assert (apart <= 1.01 * step * scales[1] + SIXTEEN_BITS * np.abs(ways[1] * scales[1])).all()
    return float((ways[0] != ways[1]).mean())


def step_at(values: np.ndarray) -> np.ndarray:
    """From elements of E4M3 to the next larger ones."""
    _, exponent = np.frexp(values)  # of a mantissa below 1
    return 2.0 ** (np.maximum(exponent, -5) - 4)


def plain_us(shape: Shape) -> dict[int, float]:
    """XLA's product with a weight of 16 bits."""
    size = 2 * shape.out * shape.inner * (2 if shape.kind == "gated" else 1)
    count = max(2, -(-tune.BEYOND_CACHE // size))
    weights = [
        jax.random.normal(key, shape.weight, "bfloat16") for key in jax.random.split(jax.random.key(0), count)
    ]
    x = {tokens: jax.random.normal(jax.random.key(1), (tokens, shape.inner), "bfloat16") for tokens in TOKENS}
    cases = [Case(dense_product, [(x[tokens], weight) for weight in weights]) for tokens in TOKENS]
    return {tokens: 1e6 * (s or 0) for tokens, s in zip(TOKENS, device_seconds(cases), strict=True)}


def small_us(columns: list[int]) -> Iterator[tuple[str, int, int, float]]:
    """The roundings alone, and with the norm."""

    def rounded(x: jax.Array) -> Any:
        return round_rows(x, "float8_e4m3fn", backend="pallas")

    def normed(x: jax.Array, delta: jax.Array, weight: jax.Array) -> Any:
        return add_rms_norm_quant(x, delta, weight, "float8_e4m3fn", eps=1e-5, backend="pallas")

    cases, names = [], []
    for tokens, size in itertools.product(SMALL, columns):
        x, delta = (
            jax.random.normal(jax.random.key(0), (tokens, size), "bfloat16"),
            jnp.zeros((4, tokens, size)),
        )
        names += [("round_rows", tokens, size), ("add_rms_norm_quant", tokens, size)]
        cases += [
            Case(rounded, [(x,)] * 4),
            Case(normed, [(delta, jnp.ones(size, "bfloat16"))] * 4, [x.copy()]),
        ]
    for name, seconds in zip(names, device_seconds(cases), strict=True):
        yield *name, 1e6 * (seconds or 0)


def first_checks(names: list[str], products: dict[str, Shape], backend: str) -> None:
    """Every format with every matrix, in one cut, before anything is timed."""
    for name, (shape_name, shape) in itertools.product(names, products.items()):
        product = Quantised(shape, FORMATS[name].held(shape.inner), backend)
        (cut,) = one_cut(product)
        error = check(product, cut)
        verdict = "right" if error < most(product, cut) else "WRONG"
        print(f"{verdict}: {name} {shape_name}, {cut.tokens} rows, error {error:.1e}", flush=True)


def one_cut(product: Quantised) -> list[Measurement]:
    """A cut that any shape has, untimed, with rows that fill no tile."""
    shape, widens = product.shape, product.shape.normed and product.held.activations is not None
    tiling = Tiling(64, 128, 2 if shape.kind == "parts" else 1, 4, 3, widens=widens)
    tokens = 1 if shape.normed else 3
    return [Measurement(product.held.name, shape.kind, shape.out, shape.inner, tokens, tiling, 1.0, 1.0)]


def measure(
    name: str, shape_name: str, product: Quantised, wanted: list[int], known: Tuning
) -> Iterator[Measurement]:
    """Times, checks and prints a product; gives the fastest right cut for each number of rows."""
    for tokens, timed in times(product, wanted, known):
        while timed:
            (best,) = tune.fastest(product.held.name, product.shape, {tokens: timed})
            error = 0.0 if best.tiling is None else check(product, best)
            print(line(name, shape_name, product, best, error), flush=True)
            if error < most(product, best):
                yield best
                break
            del timed[best.tiling]


def others(known: Tuning, found: list[Measurement]) -> list[Measurement]:
    """What is known of other numbers of rows of the product that was measured."""
    shapes, tokens = {new.shape for new in found}, {new.tokens for new in found}
    return [old for old in known.products if old.shape in shapes and old.tokens not in tokens]


def line(name: str, shape_name: str, product: Quantised, best: Measurement, error: float) -> str:
    rate = product.weight_bytes / best.us / 1e3
    expected = dict(zip(EXPECTED_ROWS, EXPECTED.get(name, {}).get(shape_name, ()), strict=False))
    return (
        f"{'' if error < most(product, best) else 'WRONG: '}{name:12} {shape_name:8} {best.tokens:4} rows: "
        f"{best.us:8.2f} us {rate:6.0f} GB/s, expected {expected.get(best.tokens, '-')}, "
        f"XLA {best.xla_us:8.2f}, error {error:.1e}, {best.tiling}"
    )


def times(
    product: Quantised, wanted: list[int], known: Tuning
) -> Iterator[tuple[int, dict[Candidate, float | None]]]:
    """Seconds of every cut, few rows and many by themselves: what fails with one leaves the other."""
    if product.backend != "pallas":
        (cut,) = one_cut(product)
        yield cut.tokens, {None: 1.0, cut.tiling: 1e-6}
        return
    if product.shape.normed:
        yield from quant_tune.measure_normed(product.shape, product.held, known).items()
        return
    few, many = TOKENS, quant_tune.tokens_of(product.held)[len(TOKENS) :]
    for tokens in ([count for count in counts if count in wanted] for counts in (few, many)):
        try:
            if tokens:
                yield from quant_tune.measure(product.shape, product.held, tokens).items()
        except jax.errors.JaxRuntimeError as error:
            if "CUDA_ERROR" in str(error):  # nothing more will run in this process
                raise SystemExit(f"a kernel broke the device: {str(error)[:500]}") from error
            traceback.print_exc()  # the others are still worth the machine's time


def most(product: Quantised, best: Measurement) -> float:
    """The error that a product may have, as a share of all of it."""
    if product.shape.normed:
        return NORMED_ERROR
    rounds = product.held.activations is not None and not product.shape.after_norm
    streams = isinstance(best.tiling, StreamTiling)
    coarse = product.held.activations == E4M3  # of which Hopper's tensor cores keep 14 bits of a sum
    whole = best.kind != "parts" or (streams and (coarse or best.tiling.splits == 1))
    return ROUNDED_ERROR if rounds or whole else PARTS_ERROR


def small_ops(hidden: int, products: dict[str, Shape]) -> dict[str, str]:
    """The fields of a table for what is rounded between products."""
    found = {"rounding": quant_tune.rounding(hidden, E4M3)}
    if "down" in products:
        found["activation"] = activation_backend(products["down"].inner, E4M3)
    print(f"faster by: {found}", flush=True)
    return found


def activation_backend(width: int, kind: str) -> str:
    """The faster backend of gating the sums of a product of XLA's, and rounding what is gated."""
    keys = jax.random.split(jax.random.key(0), quant_tune.ROUNDED_SETS)

    def case(fused: bool, rows: int) -> Case:
        dtype = jnp.bfloat16 if rows >= MANY_ROWS else jnp.float32
        sums = [jax.random.normal(key, (1, rows, 2, width), dtype) for key in keys]
        scales = jnp.full(rows, quant_tune.SCALE), jnp.full((2, width), quant_tune.SCALE)
        return Case(gating(fused, kind), [(each, *scales) for each in sums])

    return quant_tune.faster(case)


def gating(fused: bool, kind: str) -> Callable[..., Any]:
    def gate(sums: jax.Array, rows: jax.Array, outputs: jax.Array) -> Any:
        if fused:
            how: dict[str, Any] = {"row_scales": rows, "scales": outputs, "backend": "pallas"}
            return act_and_mul_quant(sums, kind, **how, activation=jax.nn.silu, out_dtype=jnp.bfloat16)
        both = (sums[0].astype(jnp.float32) * (rows[:, None, None] * outputs)).astype(jnp.bfloat16)
        return round_rows(jax.nn.silu(both[:, 0]) * both[:, 1], kind, backend="pallas")

    return gate


def print_small(products: dict[str, Shape]) -> None:
    """Prints what roundings and products of 16 bits take."""
    for kernel, tokens, size, us in small_us(sorted({shape.inner for shape in products.values()})):
        print(f"{kernel} [{tokens}, {size}]: {us:.2f} us, expected {SMALL[tokens]}", flush=True)
    for name, shape in products.items():
        times = ", ".join(f"{t} rows {us:.2f} us" for t, us in plain_us(shape).items())
        print(f"16 bits, XLA: {name} {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help=f"a shape: {', '.join(shapes.names())}")
    parser.add_argument("--formats", default="fp8,smooth_quant,awq,fp8_blocks", help=", ".join(FORMATS))
    parser.add_argument("--products", default=",".join(quant_tune.QUANTISED))
    parser.add_argument("--tokens", default=",".join(map(str, ROWS)), help="numbers of rows")
    parser.add_argument("--only_times", action="store_true")
    parser.add_argument("--tuning_dir", type=Path, default=None)
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    backend = "pallas_interpret" if args.interpret else "pallas"
    config = build_config(shapes.read(args.model), args.model)
    products = {k: v for k, v in tune.products(config).items() if k in args.products.split(",")}
    if not args.only_times:
        for columns in sorted({shape.inner for shape in products.values()}):
            check_rounding(backend, columns)
        first_checks(args.formats.split(","), products, backend)
    path = (args.tuning_dir or tuning_dir()) / tuning.file_name(jax.devices()[0].device_kind)
    table = tuning.read(path) if path.exists() else tuning.UNTUNED
    shipped, tokens = tuning.load(jax.devices()[0].device_kind), [int(t) for t in args.tokens.split(",")]
    if not args.interpret and not args.only_times:
        table = replace(table, **small_ops(config.hidden_size, products))
        print_small(products)
    for name, (shape_name, shape) in itertools.product(args.formats.split(","), products.items()):
        product, known = Quantised(shape, FORMATS[name].held(shape.inner), backend), shipped.merged(table)
        found = list(measure(name, shape_name, product, tokens, known))
        table = table.merged(Tuning((*others(known, found), *found)))
        if not args.interpret:
            tuning.write(path, table)
    print(f"kept in {path}" if not args.interpret else "nothing kept")


if __name__ == "__main__":
    main()
