"""Which cut of a product with a quantised weight is fastest on this GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, prod
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from lmdeploy_jax.bench.device_time import Case, device_seconds, require_gpu
from lmdeploy_jax.bench.tune import (
    BEYOND_CACHE,
    DELTA_PARTS,
    EPS,
    LAUNCH,
    PROGRAMS,
    Candidate,
    Shape,
    extra_seconds,
    fastest,
    is_hopper,
)
from lmdeploy_jax.engine.core.compile import compiler_options
from lmdeploy_jax.models.formats import INT4, INT8, WeightFormat
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.products import Product, XlaGatedProduct, XlaProduct, plan_norm
from lmdeploy_jax.models.quant_products import (
    FusedQuantNorm,
    PartsGatedProduct,
    RoundedProduct,
    Rows,
    RowsProduct,
    SkinnyQuantGatedProduct,
    SkinnyQuantProduct,
    StreamedQuantProduct,
    UnscaledQuantNorm,
)
from lmdeploy_jax.models.quantised import hold_quantised
from lmdeploy_jax.models.tuning import Measurement, Tuning
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm, add_rms_norm_quant
from lmdeploy_jax.pallas_kernels.quant_gemm.streaming import (
    BLOCK_OUT,
    deepest,
    scales_whole_sums,
    tile_of,
    why_not_streamed,
)
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised as Operand
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling, Tiling

TOKENS = (1, 16, 32, 64)  # of the kernels of few rows
MOST_TOKENS = 128  # of those of 8 bits with one scale, beside XLA's own product and those that stream
SCALED_TOKENS = (128, 256)  # of 8 bits with one scale; more rows are XLA's
MANY_TOKENS = (128, 256, 1024, 4096)  # of those that stream
EIGHT_BITS = (  # outputs and inner elements of a tile, warps, stages: those that won somewhere on an H200
    (64, 128, 4, 4),
    (64, 128, 4, 6),
    (128, 128, 8, 4),
    (128, 256, 8, 3),
)
FOUR_BITS = (
    (64, 128, 2, 4),
    (64, 128, 4, 4),
    (128, 128, 4, 3),
)
SPLITS = (4, 8, 16)
GATED_SPLITS = (1, 2, 4)  # of 4 bits, whose programs are few; 8 bits have one split
STREAM_SPLITS = (1, 2, 4, 8)
FEW_ROWS = 8  # of the smallest tile that tensor cores take
QUANTISED = ("qkv", "o", "gate_up", "down", "norm_qkv", "norm_gate_up")  # of `tune.products`, products with
# a norm after those without; a head is of 16 bits, or of those of `HEAD_FORMAT`
HEAD_FORMAT = "w8a8_float8_e4m3fn"
NORM_SPLITS = (1, 4, 8)
NORM_EIGHT_BITS = (  # also for products of one row with a norm, split where the reader applies its scale
    (64, 128, 4, 4),
    (64, 128, 4, 6),
    (64, 256, 4, 4),
    (32, 256, 2, 5),
    (128, 256, 8, 3),
)
NORM_FOUR_BITS = (
    (64, 128, 2, 4),
    (64, 128, 4, 4),
    (32, 128, 2, 6),
    (128, 128, 4, 3),
    (16, 128, 1, 6),
)
SCALE = 1e-2
ROUNDED_ROWS, ROUNDED_SETS = (1, 64, 4096), 4


@dataclass(frozen=True)
class Quantised:
    """A product of `shape` with a weight in the format `held`."""

    shape: Shape
    held: WeightFormat
    backend: str = "pallas"

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        out = self.shape.weight[:-1]
        axes = (None,) * (len(out) + 1)

        def build() -> Linear:
            linear = Linear(out, self.shape.weight[-1:], axes, bias=False, dtype=jnp.dtype("bfloat16"))
            hold_quantised(linear, self.held)
            return linear

        return nnx.split(nnx.eval_shape(build))

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._split[1]))

    def weight(self, key: jax.Array) -> list[jax.Array]:
        """The leaves of a random one."""
        return [_random(leaf, key) for leaf in jax.tree.leaves(self._split[1])]

    def rows(self, tokens: int, candidate: Candidate) -> Rows:
        """Random activations, rounded as they would be by the norm before the product, if there is one."""
        x = jax.random.normal(jax.random.key(1), (tokens, self.shape.inner), jnp.bfloat16)
        if not (self.shape.after_norm and self.reads_rounded(candidate)):
            return x
        assert self.held.activations is not None
        return round_rows(x, self.held.activations, groups=self.held.groups)

    def reads_rounded(self, candidate: Candidate) -> bool:
        """Whether activations are rounded before the kernel that multiplies them."""
        if candidate is None:
            return self.held.rounds_activations
        wide = isinstance(candidate, Tiling) and candidate.reads_wide
        return self.held.activations is not None and not wide

    def more_launches(self, candidate: Candidate) -> int:
        """Kernels beside the product's own that `tune.extra_seconds` knows nothing of: its activations are
        rounded, XLA's sums are scaled, or what is streamed is gated.
        """
        rounds = not self.shape.after_norm and self.reads_rounded(candidate)
        gated = self.shape.product == "gated"
        scaled = candidate is None and self.held.rounds_activations and not gated
        return rounds + scaled + (gated and isinstance(candidate, StreamTiling) and candidate.splits == 1)

    def function(self, candidate: Candidate) -> Callable[[Rows, list[jax.Array]], jax.Array]:
        """Of activations and a weight's leaves."""
        graph, state = self._split
        tree, product = jax.tree.structure(state), self._product(candidate)
        return lambda x, leaves: product(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), x)

    def normed(self, candidate: Tiling | None, known: Tuning) -> Callable[..., Any]:
        """Of x, a delta, a norm's weight and the leaves; None: of several kernels, by the times `known`."""
        graph, state = self._split
        tree, activation = jax.tree.structure(state), jax.nn.silu if self.shape.product == "gated" else None
        kernels = Kernels(self.backend, tuning=known)

        def function(x: jax.Array, delta: jax.Array, weight: jax.Array, leaves: list[jax.Array]) -> Any:
            linear = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
            norm = RMSNorm(x.shape[1], EPS, 0.0, dtype=x.dtype)
            norm.weight[...] = weight
            if candidate is None:
                product = plan_norm(kernels, linear, x, normed=True, activation=activation)
            elif candidate.splits > 1:
                return UnscaledQuantNorm(candidate, self.backend)(linear, x, delta, norm)
            else:
                product = FusedQuantNorm(candidate, self.backend, activation)
            return product(linear, x, delta, norm)

        return function

    def normed_arguments(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [1, K], a delta in parts, a norm's weight."""
        keys, inner = jax.random.split(jax.random.key(1), 3), self.shape.inner
        x = jax.random.normal(keys[0], (1, inner), jnp.bfloat16)
        delta = jax.random.normal(keys[1], (DELTA_PARTS, 1, inner), jnp.float32)
        return x, delta, jax.random.uniform(keys[2], (inner,), jnp.bfloat16, 0.5, 1.5)

    def _product(self, candidate: Candidate) -> Callable[..., jax.Array]:
        gated = self.shape.product == "gated"
        if candidate is None:
            product: Product | RowsProduct = (
                RoundedProduct(backend=self.backend) if self.held.rounds_activations else XlaProduct()
            )
            return XlaGatedProduct(jax.nn.silu, product) if gated else product
        if gated and isinstance(candidate, Tiling) and candidate.splits == 1:
            return SkinnyQuantGatedProduct(jax.nn.silu, candidate, self.backend)
        kernel = (
            SkinnyQuantProduct(candidate, self.backend)
            if isinstance(candidate, Tiling)
            else StreamedQuantProduct(candidate, self.backend)
        )
        if not gated:
            return kernel
        in_parts = candidate.splits > 1
        return PartsGatedProduct(jax.nn.silu, kernel) if in_parts else XlaGatedProduct(jax.nn.silu, kernel)


def _random(leaf: Any, key: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.uint16:
        return jax.random.bits(key, leaf.shape, jnp.uint16)
    if leaf.dtype == jnp.uint8:
        return jax.random.randint(key, leaf.shape, 7, 10).astype(jnp.uint8)
    if leaf.dtype.itemsize == 1:
        return jnp.clip(jax.random.normal(key, leaf.shape, jnp.bfloat16) * 32, -127, 127).astype(leaf.dtype)
    return (SCALE * jax.random.uniform(key, leaf.shape, jnp.float32, 0.5, 1.5)).astype(leaf.dtype)


def tune(shape: Shape, held: WeightFormat, known: Tuning) -> list[Measurement]:
    """The fastest candidate for each number of tokens that `tokens_of` has.

    `known` says how a product that follows its norm would be done by itself. Raises ConfigError where there
    is no GPU.
    """
    if shape.normed:
        return fastest(held.name, shape, measure_normed(shape, held, known))
    return fastest(held.name, shape, measure(shape, held, tokens_of(held)))


def products_of(held: WeightFormat) -> tuple[str, ...]:
    """The names of the products that weights in such a format have."""
    return (*QUANTISED, "head") if held.name == HEAD_FORMAT else QUANTISED


def tokens_of(held: WeightFormat) -> tuple[int, ...]:
    """Numbers of rows for which there are kernels."""
    if held.rounds_activations:
        return TOKENS + SCALED_TOKENS
    return TOKENS + MANY_TOKENS if streamed_here(held) else TOKENS


def streamed_here(held: WeightFormat) -> bool:
    """Whether this GPU, and a JAX whose Mosaic the kernel is written for, stream such weights."""
    known = held.element != INT8 or held.groups == 1
    return is_hopper() and jax.__version_info__ >= (0, 11) and known


def measure(
    shape: Shape, held: WeightFormat, tokens: Sequence[int]
) -> dict[int, dict[Candidate, float | None]]:
    """Seconds of each candidate for each number of tokens; None for what does not compile."""
    require_gpu()
    product = Quantised(shape, held)
    keys = jax.random.split(jax.random.key(0), max(2, -(-BEYOND_CACHE // product.weight_bytes)))
    weights = [product.weight(key) for key in keys]
    tried = [(count, candidate) for count in tokens for candidate in [None, *candidates(product, count)]]
    options = compiler_options("gpu", [held])
    cases = []
    for count, candidate in tried:
        arguments = [(product.rows(count, candidate), weight) for weight in weights]
        cases.append(Case(product.function(candidate), arguments, compiler_options=options))
    measured: dict[int, dict[Candidate, float | None]] = {count: {} for count in tokens}
    for (count, candidate), seconds in zip(tried, device_seconds(cases), strict=True):
        extra = extra_seconds(shape, candidate, count) + LAUNCH * product.more_launches(candidate)
        measured[count][candidate] = None if seconds is None else seconds + extra
    return measured


def measure_normed(
    shape: Shape, held: WeightFormat, known: Tuning
) -> dict[int, dict[Candidate, float | None]]:
    """The same of a product of one row with the norm before it; None: of several kernels."""
    require_gpu()
    product = Quantised(shape, held)
    keys = jax.random.split(jax.random.key(0), max(2, -(-BEYOND_CACHE // product.weight_bytes)))
    weights = [product.weight(key) for key in keys]
    x, *rest = product.normed_arguments()
    alone = replace(shape, kind=shape.product)
    apart = known.without(held.name, shape.kind)
    options = compiler_options("gpu", [held])
    unfused = Case(product.normed(None, apart), [(*rest, weight) for weight in weights], [x.copy()], options)
    cases, tilings = [unfused], list(norm_tilings(product))
    for tiling in tilings:
        arguments = [(x, *rest, weight) for weight in weights]
        cases.append(Case(product.normed(tiling, apart), arguments, compiler_options=options))
    first, *seconds = device_seconds(cases)
    by_itself = known.find(held.name, alone.kind, (shape.out, shape.inner), 1)
    first = None if first is None else first + LAUNCH + extra_seconds(alone, by_itself, 1)
    found: dict[Candidate, float | None] = {None: first}
    for tiling, time in zip(tilings, seconds, strict=True):
        found[tiling] = None if time is None else time + extra_seconds(alone, tiling, 1)
    return {1: found}


def norm_tilings(product: Quantised) -> Iterator[Tiling]:
    """Of one row after a norm; weights of 8 bits are widened, or the row is rounded."""
    words, held = product.held.element == INT4, product.held
    for block_out, block_in, num_warps, num_stages in NORM_FOUR_BITS if words else NORM_EIGHT_BITS:
        if product.shape.inner % block_in or (not words and held.groups > 1 and held.group % block_in):
            continue
        for splits in NORM_SPLITS if product.shape.kind == "norm_parts" else (1,):
            if product.shape.inner % (splits * block_in):
                continue
            tiling = Tiling(block_out, block_in, splits, num_warps, num_stages, FEW_ROWS)
            if words:
                yield tiling
            elif held.activations is not None:
                yield from (replace(tiling, rounds=True), replace(tiling, widens=True))


def candidates(product: Quantised, tokens: int) -> Iterator[Tiling | StreamTiling]:
    """Those worth measuring."""
    alone, most = (
        not product.shape.after_norm,
        MOST_TOKENS if product.held.rounds_activations else max(TOKENS),
    )
    if tokens <= most and not (alone and tokens <= FEW_ROWS):
        yield from tilings(product)
    if tokens <= FEW_ROWS:
        few = [replace(tiling, min_rows=FEW_ROWS) for tiling in tilings(product)]
        yield from few
        if product.held.activations is not None and alone:
            yield from (replace(tiling, **{how: True}) for tiling in few for how in ("rounds", "widens"))
    if streamed_here(product.held) and product.shape.kind != "whole":
        yield from streams(product, tokens)


def streams(product: Quantised, tokens: int) -> Iterator[StreamTiling]:
    """Of as many rows as 8 divides: half of the cores have a tile, or all of them one or two."""
    outputs = prod(product.shape.weight[:-1])
    held, columns = product.held, product.shape.inner // product.held.per_value
    values = jax.ShapeDtypeStruct((outputs, columns), held.stored)
    scales = jax.ShapeDtypeStruct((held.groups, outputs), "float32")
    operand = Operand(cast(jax.Array, values), cast(jax.Array, scales))  # nothing but shapes is asked for
    cores = getattr(jax.devices()[0], "core_count", 132)
    for splits in STREAM_SPLITS:
        tiles = outputs // BLOCK_OUT * (tokens // tile_of(tokens)) * splits
        even = splits == 1 if tiles > 2 * cores else 2 * tiles > cores
        if even and why_not_streamed(tokens, operand, splits) is None:
            yield deepest(tokens, operand, cores, splits)
            if not scales_whole_sums(operand):
                yield deepest(tokens, operand, cores, splits, overlaps=True)


def tilings(product: Quantised) -> Iterator[Tiling]:
    """Of few rows."""
    shape, held = product.shape, product.held
    for block_out, block_in, num_warps, num_stages in FOUR_BITS if held.element == INT4 else EIGHT_BITS:
        if held.element != INT4 and held.groups > 1 and held.group % block_in:
            continue
        for splits in SPLITS if shape.kind == "parts" else GATED_SPLITS if held.element == INT4 else (1,):
            programs = -(-shape.out // block_out) * splits
            crowded = shape.kind == "parts" and not PROGRAMS[0] <= programs <= PROGRAMS[1]
            if shape.inner % (splits * block_in) == 0 and not crowded:
                yield Tiling(block_out, block_in, splits, num_warps, num_stages)


def rounding(hidden: int, kind: str) -> str:
    """The faster backend of rounding what a norm gives, over one row and many. ConfigError without a GPU."""
    keys = jax.random.split(jax.random.key(0), ROUNDED_SETS)

    def case(fused: bool, rows: int) -> Case:
        x = jax.random.normal(keys[0], (rows, hidden), jnp.bfloat16)
        deltas = [jax.random.normal(key, x.shape, jnp.bfloat16) for key in keys]
        return Case(_norm(fused, kind), [(delta, jnp.ones(hidden, x.dtype)) for delta in deltas], [x])

    return faster(case)


def faster(case: Callable[[bool, int], Case]) -> str:
    """The backend of one kernel for all where that takes less than several, over `ROUNDED_ROWS`, or XLA."""
    found = device_seconds([case(fused, rows) for fused in (True, False) for rows in ROUNDED_ROWS])
    seconds = [inf if time is None else time for time in found]
    fused_seconds, separate = sum(seconds[: len(ROUNDED_ROWS)]), sum(seconds[len(ROUNDED_ROWS) :])
    return "pallas" if fused_seconds < separate else "xla"


def _norm(fused: bool, kind: str) -> Callable[..., Any]:
    def norm(x: jax.Array, delta: jax.Array, weight: jax.Array) -> Any:
        if fused:
            return add_rms_norm_quant(x, delta, weight, kind, eps=EPS, backend="pallas")
        x, normed = add_rms_norm(x, delta, weight, eps=EPS, backend="pallas")
        return x, round_rows(normed, kind)

    return norm
