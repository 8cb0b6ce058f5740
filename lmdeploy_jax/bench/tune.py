"""Which cut of a skinny product is fastest on this GPU, and whether any beats XLA's own product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmdeploy_jax.bench.device_time import Case, device_seconds
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.linear import product
from pallas_kernels.skinny_gemm import Tiling, gated_skinny_gemm, skinny_gemm

BEYOND_CACHE = 300 << 20  # bytes of weights that no GPU's cache keeps
PROGRAMS = (100, 1100)  # of a grid worth trying
PART_RATE = 3e12  # bytes a second at which the next kernel reads parts, about
BLOCKS = (  # outputs and inner elements of a tile, warps, stages
    (32, 128, 4, 4),
    (64, 64, 4, 4),
    (64, 64, 4, 6),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
)
Products = dict[str, "Shape"]


@dataclass(frozen=True)
class Shape:
    """A product of a layer. `kind`: `parts` that the next kernel sums, `gated`, or `whole` (f32)."""

    out: int
    inner: int
    kind: str


def products(config: DecoderConfig) -> Products:
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


def tilings(shape: Shape) -> Iterator[Tiling]:
    """Those worth measuring."""
    for block_out, block_in, num_warps, num_stages in BLOCKS:
        for splits in (1, 2, 4, 7, 8, 14, 16) if shape.kind == "parts" else (1,):
            programs = -(-shape.out // block_out) * splits
            fits = shape.inner % (splits * block_in) == 0
            few = shape.kind == "parts" and not PROGRAMS[0] <= programs <= PROGRAMS[1]
            if fits and not few:
                yield Tiling(block_out, block_in, splits, num_warps, num_stages)


def functions(shape: Shape) -> dict[Tiling | None, Callable[..., jax.Array]]:
    """XLA's product as None, and the kernel with each tiling."""
    return {None: _xla(shape)} | {tiling: _tiled(shape, tiling) for tiling in tilings(shape)}


def _xla(shape: Shape) -> Callable[..., jax.Array]:
    if shape.kind == "gated":

        def gated(x: jax.Array, weight: jax.Array) -> jax.Array:
            both = product(x, weight)
            return jax.nn.silu(both[:, 0]) * both[:, 1]

        return gated
    dtype = jnp.float32 if shape.kind == "whole" else None
    return lambda x, weight: product(x, weight, out_dtype=dtype)


def _tiled(shape: Shape, tiling: Tiling) -> Callable[..., jax.Array]:
    if shape.kind == "gated":
        return lambda x, w: gated_skinny_gemm(x, w, tiling, activation=jax.nn.silu, backend="pallas")
    return lambda x, w: skinny_gemm(x, w, tiling, out_dtype=jnp.float32, backend="pallas")


def measure(shape: Shape, tokens: list[int]) -> dict[int, dict[Tiling | None, float | None]]:
    """Seconds of each way for each number of tokens."""
    dims = (2, shape.out, shape.inner) if shape.kind == "gated" else (shape.out, shape.inner)
    size = 2 * shape.out * shape.inner * (2 if shape.kind == "gated" else 1)
    keys = jax.random.split(jax.random.key(0), max(2, -(-BEYOND_CACHE // size)))
    weights = [jax.random.normal(key, dims, jnp.bfloat16) for key in keys]
    ways = functions(shape)
    cases = []
    for count in tokens:
        x = jax.random.normal(keys[0], (count, shape.inner), jnp.bfloat16)
        arguments = [(x, weight) for weight in weights]
        cases += [Case(function, arguments) for function in ways.values()]
    seconds = iter(device_seconds(cases))
    return {count: {way: _with_parts(next(seconds), way, count, shape) for way in ways} for count in tokens}


def _with_parts(seconds: float | None, way: Tiling | None, tokens: int, shape: Shape) -> float | None:
    """With the time that the next kernel takes to read more than one bfloat16 part."""
    if seconds is None or way is None or shape.kind != "parts":
        return seconds
    return seconds + tokens * shape.out * (4 * way.splits - 2) / PART_RATE
