"""Kernels that do a decode step's small launches in one, beside those launches: right, and how fast.

    python -m benchmarks.fused_launches deepseek-v2-lite,gpt-oss-20b,qwen3-30b-a3b --tokens 1,32

Each is first held against what it replaces. Then microseconds of kernels alone by the profiler, without what
passes between launches: about one more for each. Routers with the norm before them, and what stands before
latent attention of sequences of --context tokens, timed with that. `--interpret` runs the checks alone, on a
CPU, for shapes cut small.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.mixture_products import SHAPES, Mixture, error
from lmdeploy_jax.bench.device_time import Case, device_seconds
from lmdeploy_jax.models.mlp_config import RouterConfig
from lmdeploy_jax.models.routing import Router
from lmdeploy_jax.pallas_kernels.latent_attention import latent_attention, latent_queries
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork
from lmdeploy_jax.pallas_kernels.topk_routing import TopK, norm_topk_routing

SEEDS = 4  # of inputs that a time is the mean of
MOST_ERROR = 1e-2  # of what is rounded to 16 bits twice, as a share of the whole
NOPE, ROTATED, RANK, VALUES = 128, 64, 512, 128  # of a head, and of latents


@dataclass(frozen=True)
class Ways:
    """Functions of the same arguments, of which the first is what the others would replace."""

    name: str
    functions: dict[str, Callable[..., Any]]
    arguments: list[tuple[Any, ...]]

    def errors(self) -> dict[str, float]:
        want, *found = (jax.jit(function)(*self.arguments[0]) for function in self.functions.values())
        pairs = (zip(jax.tree.leaves(each), jax.tree.leaves(want), strict=True) for each in found)
        most = (max(error(got, wanted) for got, wanted in each) for each in pairs)
        return dict(zip(list(self.functions)[1:], most, strict=True))

    def times(self) -> Iterator[str]:
        cases = [Case(function, self.arguments) for function in self.functions.values()]
        for way, seconds in zip(self.functions, device_seconds(cases, 3), strict=True):
            told = "does not compile" if seconds is None else f"{1e6 * seconds:8.2f} us"
            yield f"{f'{self.name}, {way}':72} {told}"


def normal(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def routing(name: str, shape: Mixture, tokens: int, backend: str) -> Ways:
    config = RouterConfig(shape.experts, shape.choices)
    weight, norm = normal(0, shape.experts, shape.hidden), normal(1, shape.hidden)

    def separate(x: jax.Array, delta: jax.Array, weight: jax.Array) -> Any:
        x, normed = add_rms_norm(x, delta, norm, eps=1e-6, backend=backend)
        router = Router(shape.hidden, config, dtype=jnp.dtype("bfloat16"), backend=backend)
        router.weight[...] = weight
        return x, normed, router(normed).weights

    def fused(x: jax.Array, delta: jax.Array, weight: jax.Array) -> Any:
        options = TopK(shape.choices)
        x, normed, _, weights = norm_topk_routing(
            x, delta, norm, weight, None, options, eps=1e-6, backend=backend
        )
        return x, normed, weights

    drawn = [(normal(s, tokens, shape.hidden), normal(s + 9, tokens, shape.hidden)) for s in range(SEEDS)]
    ways: dict[str, Callable[..., Any]] = {"separate launches": separate, "one launch": fused}
    return Ways(f"{name}, router of {tokens} tokens", ways, [(*each, weight) for each in drawn])


def latents(name: str, heads: int, tokens: int, context: int, backend: str) -> Ways:
    each = -(-context // PAGE_SIZE)
    table = 1 + np.arange(tokens * each, dtype=np.int32).reshape(tokens, each)
    lens, last = np.full(tokens, context, np.int32), table[:, (context - 1) // PAGE_SIZE]
    where = tuple(map(jnp.asarray, (last * PAGE_SIZE + (context - 1) % PAGE_SIZE, table, lens)))
    pages = normal(0, tokens * each + 1, 1, PAGE_SIZE, RANK + ROTATED)
    kv_b, turn = (
        normal(1, heads, NOPE + VALUES, RANK) / 16,
        normal(3, 2, tokens, ROTATED // 2, dtype="float32"),
    )
    work = HeadWork(None, None, normal(2, RANK), *turn)

    def through(made: str, q: jax.Array, latents: jax.Array, kv_b: jax.Array, pages: jax.Array) -> jax.Array:
        queries, latents = latent_queries(q, latents, kv_b, work, backend=made)
        how = {"rank": RANK, "tile_rows": 128, "options": AttentionOptions(0.05), "backend": backend}
        return latent_attention(queries, latents, pages, *where, None, **how)[0]

    shapes = (tokens, heads, NOPE + ROTATED), (tokens, RANK + ROTATED)
    drawn = [tuple(normal(s + i, *shape) for i, shape in enumerate(shapes)) for s in range(SEEDS)]
    ways = {"XLA's launches": partial(through, "xla"), "one launch": partial(through, backend)}
    named = f"{name}, {tokens} x {context} latents"
    return Ways(named, ways, [(*each, kv_b, pages) for each in drawn])


def ways_of(name: str, args: argparse.Namespace) -> Iterator[Ways]:
    shape, backend = SHAPES[name], "pallas_interpret" if args.interpret else "pallas"
    if args.interpret:
        shape = replace(shape, experts=6, choices=2, hidden=384, inner=256)
    for tokens in args.tokens:
        yield routing(name, shape, tokens, backend)
        if shape.latent_heads is not None:
            yield latents(name, shape.latent_heads, tokens, args.context, backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=lambda text: tuple(map(int, text.split(","))), default=(1, 32))
    parser.add_argument("--context", type=int, default=1000, help="tokens of a sequence")
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    ways = [each for name in args.shapes.split(",") for each in ways_of(name, args)]
    wrong = 0
    for each in ways:
        for way, found in each.errors().items():
            wrong += found > MOST_ERROR
            verdict = "right" if found <= MOST_ERROR else "WRONG"
            print(f"{verdict}: {each.name}, {way}, error {found:.1e}", flush=True)
    for told in [] if args.interpret else (line for each in ways for line in each.times()):
        print(told, flush=True)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
