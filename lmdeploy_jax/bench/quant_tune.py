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
    EPS,
    PROGRAMS,
    Candidate,
    Shape,
    extra_seconds,
    fastest,
    is_hopper,
)
from lmdeploy_jax.models.formats import INT4, WeightFormat
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.products import Product, XlaGatedProduct, XlaProduct
from lmdeploy_jax.models.quant_products import (
    RoundedProduct,
    Rows,
    RowsProduct,
    SkinnyQuantGatedProduct,
    SkinnyQuantProduct,
    StreamedQuantProduct,
)
from lmdeploy_jax.models.quantised import hold_quantised
from lmdeploy_jax.models.tuning import Measurement
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm, add_rms_norm_quant
from lmdeploy_jax.pallas_kernels.quant_gemm.streaming import deepest, why_not_streamed
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised as Operand
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling, Tiling

TOKENS = (1, 16, 64)  # of the kernels of few rows
MANY_TOKENS = (128, 256, 1024, 4096)  # of those that stream
EIGHT_BITS = (  # outputs and inner elements of a tile, warps, stages
    (32, 256, 4, 4),
    (64, 128, 4, 4),
    (64, 128, 4, 6),
    (64, 256, 4, 3),
    (64, 256, 4, 4),
    (64, 512, 8, 3),
    (128, 128, 8, 4),
    (128, 256, 8, 3),
)
FOUR_BITS = (
    (32, 128, 2, 4),
    (64, 128, 2, 4),
    (64, 128, 4, 4),
    (64, 256, 2, 3),
    (64, 256, 4, 3),
    (128, 128, 4, 3),
    (128, 128, 4, 4),
)
SPLITS = (1, 2, 4, 8, 16)
QUANTISED = ("qkv", "o", "gate_up", "down")  # of `tune.products`; a head is of 16 bits
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
        """Random activations, rounded as they would be before the product."""
        x = jax.random.normal(jax.random.key(1), (tokens, self.shape.inner), jnp.bfloat16)
        if self.held.activations is None or (candidate is None and not self.held.rounds_activations):
            return x
        return round_rows(x, self.held.activations, groups=self.held.groups)

    def function(self, candidate: Candidate) -> Callable[[Rows, list[jax.Array]], jax.Array]:
        """Of activations and a weight's leaves."""
        graph, state = self._split
        tree, product = jax.tree.structure(state), self._product(candidate)
        return lambda x, leaves: product(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), x)

    def _product(self, candidate: Candidate) -> Callable[..., jax.Array]:
        gated = self.shape.product == "gated"
        if isinstance(candidate, Tiling):
            if gated:
                return SkinnyQuantGatedProduct(jax.nn.silu, candidate, self.backend)
            return SkinnyQuantProduct(candidate, self.backend)
        product: Product | RowsProduct = XlaProduct()
        if isinstance(candidate, StreamTiling):
            product = StreamedQuantProduct(candidate, self.backend)
        elif self.held.rounds_activations:
            product = RoundedProduct()
        return XlaGatedProduct(jax.nn.silu, product) if gated else product


def _random(leaf: Any, key: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.uint16:
        return jax.random.bits(key, leaf.shape, jnp.uint16)
    if leaf.dtype == jnp.uint8:
        return jax.random.randint(key, leaf.shape, 7, 10).astype(jnp.uint8)
    if leaf.dtype.itemsize == 1:
        return jnp.clip(jax.random.normal(key, leaf.shape, jnp.bfloat16) * 32, -127, 127).astype(leaf.dtype)
    return (SCALE * jax.random.uniform(key, leaf.shape, jnp.float32, 0.5, 1.5)).astype(leaf.dtype)


def tune(shape: Shape, held: WeightFormat, tokens: Sequence[int] | None = None) -> list[Measurement]:
    """The fastest candidate for each number of tokens (default: all that `tokens_of` has).

    Raises ConfigError where there is no GPU.
    """
    return fastest(held.name, shape, measure(shape, held, tokens_of(held) if tokens is None else tokens))


def tokens_of(held: WeightFormat) -> tuple[int, ...]:
    """Numbers of rows for which there are kernels; many rows of 8 bits with one scale are XLA's."""
    hopper = is_hopper() and jax.__version_info__ >= (0, 11)  # whose Mosaic the kernel is written for
    return TOKENS + MANY_TOKENS if hopper and not held.rounds_activations else TOKENS


def measure(
    shape: Shape, held: WeightFormat, tokens: Sequence[int]
) -> dict[int, dict[Candidate, float | None]]:
    """Seconds of each candidate for each number of tokens; None for what does not compile."""
    require_gpu()
    product = Quantised(shape, held)
    keys = jax.random.split(jax.random.key(0), max(2, -(-BEYOND_CACHE // product.weight_bytes)))
    weights = [product.weight(key) for key in keys]
    tried = [(count, candidate) for count in tokens for candidate in [None, *candidates(product, count)]]
    cases = []
    for count, candidate in tried:
        x = product.rows(count, candidate)
        cases.append(Case(product.function(candidate), [(x, weight) for weight in weights]))
    measured: dict[int, dict[Candidate, float | None]] = {count: {} for count in tokens}
    for (count, candidate), seconds in zip(tried, device_seconds(cases), strict=True):
        extra = extra_seconds(shape, candidate, count)
        measured[count][candidate] = None if seconds is None else seconds + extra
    return measured


def candidates(product: Quantised, tokens: int) -> Iterator[Tiling | StreamTiling]:
    """Those worth measuring."""
    yield from tilings(product) if tokens <= max(TOKENS) else streams(product, tokens)


def streams(product: Quantised, tokens: int) -> Iterator[StreamTiling]:
    """Of many rows."""
    outputs = prod(product.shape.weight[:-1])
    held, columns = product.held, product.shape.inner // product.held.per_value
    values = jax.ShapeDtypeStruct((outputs, columns), held.stored)
    scales = jax.ShapeDtypeStruct((held.groups, outputs), "float32")
    operand = Operand(cast(jax.Array, values), cast(jax.Array, scales))  # nothing but shapes is asked for
    if why_not_streamed(tokens, operand) is None:
        most = deepest(tokens, operand, getattr(jax.devices()[0], "core_count", 132))
        yield from (replace(most, num_stages=stages) for stages in (most.num_stages, most.num_stages - 1))


def tilings(product: Quantised) -> Iterator[Tiling]:
    """Of few rows."""
    shape, held = product.shape, product.held
    for block_out, block_in, num_warps, num_stages in FOUR_BITS if held.element == INT4 else EIGHT_BITS:
        if held.element != INT4 and held.groups > 1 and held.group % block_in:
            continue
        for splits in SPLITS if shape.kind == "parts" else (1,):
            programs = -(-shape.out // block_out) * splits
            crowded = shape.kind == "parts" and not PROGRAMS[0] <= programs <= PROGRAMS[1]
            if shape.inner % (splits * block_in) == 0 and not crowded:
                yield Tiling(block_out, block_in, splits, num_warps, num_stages)


def rounding(hidden: int, kind: str) -> str:
    """The faster backend of rounding what a norm gives, over one row and many. ConfigError without a GPU."""
    keys = jax.random.split(jax.random.key(0), ROUNDED_SETS)
    cases = []
    for fused in (True, False):
        for rows in ROUNDED_ROWS:
            x = jax.random.normal(keys[0], (rows, hidden), jnp.bfloat16)
            deltas = [jax.random.normal(key, x.shape, jnp.bfloat16) for key in keys]
            cases.append(
                Case(_norm(fused, kind), [(delta, jnp.ones(hidden, x.dtype)) for delta in deltas], [x])
            )
    seconds = [inf if time is None else time for time in device_seconds(cases)]
    fused_seconds, separate = sum(seconds[: len(ROUNDED_ROWS)]), sum(seconds[len(ROUNDED_ROWS) :])
    return "pallas" if fused_seconds < separate else "xla"


def _norm(fused: bool, kind: str) -> Callable[..., Any]:
    def norm(x: jax.Array, delta: jax.Array, weight: jax.Array) -> Any:
        if fused:
            return add_rms_norm_quant(x, delta, weight, kind, eps=EPS, backend="pallas")
        x, normed = add_rms_norm(x, delta, weight, eps=EPS, backend="pallas")
        return x, round_rows(normed, kind)

    return norm
