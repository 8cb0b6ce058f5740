"""Which cut of a skinny product is fastest on this GPU, and whether any beats XLA's own product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmdeploy_jax.bench.device_time import Case, device_seconds, require_gpu
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.linear import product
from lmdeploy_jax.models.tuning import Product
from pallas_kernels.skinny_gemm import StreamTiling, Tiling, gated_skinny_gemm, skinny_gemm

TOKENS = (1, 8, 32, 64, 128, 192, 256)
BEYOND_CACHE = 300 << 20  # bytes of weights that no GPU's cache keeps
PROGRAMS = (60, 1100)  # of a grid worth trying
PART_RATE = 3e12  # bytes a second at which the next kernel reads parts, about
LAUNCH = 5e-7  # seconds that one kernel less is worth
MOSAIC = 3e-6  # what such a call costs in a CUDA graph beyond its kernel; about, by whole decode steps
BLOCKS = (  # outputs and inner elements of a tile, warps, stages
    (32, 128, 4, 4),
    (64, 64, 4, 4),
    (64, 64, 4, 6),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (128, 64, 8, 4),
)
SPLITS = (1, 2, 4, 7, 8)
STREAMED = (64, 128)  # outputs of a tile
Way = Tiling | StreamTiling | None  # None: XLA's own


@dataclass(frozen=True)
class Shape:
    """A product of a layer. `kind` as in `models.tuning.Product`."""

    out: int
    inner: int
    kind: str

    @property
    def weight(self) -> tuple[int, ...]:
        return (2, self.out, self.inner) if self.kind == "gated" else (self.out, self.inner)


def products(config: DecoderConfig) -> dict[str, Shape]:
    """The products of a decode step."""
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": Shape(qkv, hidden, "parts"),
        "o": Shape(hidden, heads, "parts"),
        "gate_up": Shape(inner, hidden, "gated"),
        "down": Shape(hidden, inner, "parts"),
        "head": Shape(config.vocab_size, hidden, "whole"),
    }


def tune(shape: Shape) -> list[Product]:
    """The fastest way for each number of tokens, in bfloat16. Raises ConfigError where there is no GPU."""
    found = []
    for tokens, ways in measure(shape).items():
        known = {way: seconds for way, seconds in ways.items() if seconds is not None}
        best = min(known, key=lambda way: known[way])
        times = [round(1e6 * known[way], 2) for way in (best, None)]
        found.append(Product(shape.kind, shape.out, shape.inner, tokens, best, *times))
    return found


def measure(shape: Shape) -> dict[int, dict[Way, float | None]]:
    """Seconds of each way for each number of tokens; None for what does not compile."""
    require_gpu()
    size = 2 * shape.out * shape.inner * (2 if shape.kind == "gated" else 1)
    keys = jax.random.split(jax.random.key(0), max(2, -(-BEYOND_CACHE // size)))
    weights = [jax.random.normal(key, shape.weight, jnp.bfloat16) for key in keys]
    ways = [(tokens, way) for tokens in TOKENS for way in [None, *tilings(shape, tokens)]]
    cases = []
    for tokens, way in ways:
        x = jax.random.normal(keys[0], (tokens, shape.inner), jnp.bfloat16)
        cases.append(Case(_function(shape, way), [(x, weight) for weight in weights]))
    measured: dict[int, dict[Way, float | None]] = {tokens: {} for tokens in TOKENS}
    for (tokens, way), seconds in zip(ways, device_seconds(cases), strict=True):
        measured[tokens][way] = None if seconds is None else seconds + _beside(shape, way, tokens)
    return measured


def tilings(shape: Shape, tokens: int) -> Iterator[Tiling | StreamTiling]:
    """Those worth measuring."""
    for block_out, block_in, num_warps, num_stages in BLOCKS:
        for splits in SPLITS if shape.kind == "parts" else (1,):
            programs = -(-shape.out // block_out) * splits
            crowded = shape.kind == "parts" and not PROGRAMS[0] <= programs <= PROGRAMS[1]
            if shape.inner % (splits * block_in) == 0 and not crowded:
                yield Tiling(block_out, block_in, splits, num_warps, num_stages)
    if shape.kind == "gated" and tokens % 8 == 0 and _is_hopper():
        cores = getattr(jax.devices()[0], "core_count", 132)
        for block_out in STREAMED:
            tiles = shape.out // block_out
            even = -(-tiles // -(-tiles // cores))  # as few programs as finish in as many rounds
            if shape.out % block_out == 0 and shape.inner % 64 == 0:
                yield from {StreamTiling.deepest(block_out, count, tokens) for count in (cores, even)}


def _is_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def _function(shape: Shape, way: Way) -> Callable[..., jax.Array]:
    if shape.kind == "gated":
        return _gated(way)
    if isinstance(way, Tiling):
        return lambda x, weight: skinny_gemm(x, weight, way, out_dtype=jnp.float32, backend="pallas")
    dtype = jnp.float32 if shape.kind == "whole" else None
    return lambda x, weight: product(x, weight, out_dtype=dtype)


def _gated(way: Way) -> Callable[..., jax.Array]:
    if way is not None:
        return lambda x, w: gated_skinny_gemm(x, w, way, activation=jax.nn.silu, backend="pallas")

    def gated(x: jax.Array, weight: jax.Array) -> jax.Array:
        both = product(x, weight)
        return jax.nn.silu(both[:, 0]) * both[:, 1]

    return gated


def _beside(shape: Shape, way: Way, tokens: int) -> float:
    """Seconds that a way costs elsewhere: parts to be read by the next kernel, one launch more, its kind."""
    if shape.kind == "parts" and isinstance(way, Tiling):
        return tokens * shape.out * (4 * way.splits - 2) / PART_RATE
    if isinstance(way, StreamTiling):
        return MOSAIC
    return LAUNCH if way is None and shape.kind == "gated" else 0.0
