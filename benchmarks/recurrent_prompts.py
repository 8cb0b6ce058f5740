"""Prompts of recurrent layers on a GPU: prepared blocks go into the states by XLA's loop, or in one launch.

    python -m benchmarks.recurrent_prompts qwen3-next,nemotron-3-nano

Prints milliseconds a layer for prompts of several lengths, and how far outputs and states of the launch are
from those of the loop. `--cuts` are columns and warps of its programs. `--interpret` only compares, on a CPU,
for shapes cut small.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.recurrent_steps import SHAPES, Shape
from lmdeploy_jax.pallas_kernels import recurrent_blocks
from lmdeploy_jax.pallas_kernels.delta_rule import xla as delta_rule
from lmdeploy_jax.pallas_kernels.spans import Spans
from lmdeploy_jax.pallas_kernels.ssd import xla as ssd
from lmdeploy_jax.pallas_kernels.token_blocks import Advance, in_turn

PROMPTS = ((8192,), (700, 324))
REPEATS = 5


def arrays_of(shape: Shape, tokens: int) -> tuple[jax.Array, ...]:
    """What the op takes before the states, keys of length one."""
    heads, per_head = shape.groups, shape.per_group
    keys = [jax.random.key(seed) for seed in range(5)]
    q, k = (jax.random.normal(key, (tokens, heads, shape.keys)) for key in keys[:2])
    k, q = k / jnp.linalg.norm(k, axis=-1, keepdims=True), q / shape.keys**0.5
    v = jax.random.normal(keys[2], (tokens, heads, per_head, shape.values), "bfloat16")
    decay = jnp.exp(jax.random.normal(keys[3], v.shape[:3]) - 2)
    if shape.delta:
        beta = jax.nn.sigmoid(jax.random.normal(keys[4], v.shape[:3]))
        return q.astype("bfloat16"), k.astype("bfloat16"), v, -decay, beta
    return v, decay, -decay, k.astype("bfloat16"), q.astype("bfloat16")


def layer(shape: Shape, prompts: tuple[int, ...], advance: Advance) -> Callable[..., Any]:
    """States and arrays -> outputs, states; the first prompt begins, others go on."""
    starts = [sum(prompts[:row]) for row in range(len(prompts))]
    slots, fresh = jnp.arange(len(prompts), dtype=jnp.int32), jnp.arange(len(prompts)) == 0
    spans = Spans(slots, jnp.asarray(prompts, jnp.int32), fresh, jnp.asarray(starts, jnp.int32))
    op = delta_rule if shape.delta else ssd
    return jax.jit(lambda states, *arrays: op.packed(*arrays, states, spans, op.step, advance))


def timed(run: Callable[..., Any], *arrays: jax.Array) -> tuple[Any, float]:
    out = jax.block_until_ready(run(*arrays))
    begun = time.perf_counter()
    for _ in range(REPEATS):
        last = run(*arrays)
    jax.block_until_ready(last)
    return out, (time.perf_counter() - begun) / REPEATS


def compare(name: str, shape: Shape, prompts: tuple[int, ...], cuts: list[tuple[int, int]]) -> Iterator[str]:
    states = jax.random.normal(jax.random.key(9), (len(prompts) + 1, *shape.state))
    arrays = arrays_of(shape, sum(prompts))
    want, seconds = timed(layer(shape, prompts, in_turn), states, *arrays)
    yield f"{name} {prompts}, XLA's loop: {1e3 * seconds:.2f} ms"
    interpret = jax.default_backend() != "gpu"
    for cut in cuts:
        recurrent_blocks.COLUMNS, recurrent_blocks.WARPS = cut
        advance = partial(recurrent_blocks.advance_blocks, interpret=interpret)
        got, seconds = timed(layer(shape, prompts, advance), states, *arrays)
        errors = (float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(got, want, strict=True))
        told = " and ".join(f"{error:.1e}" for error in errors)
        yield f"{name} {prompts}, one launch {cut}: {1e3 * seconds:.2f} ms, errors {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shapes", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--cuts", default="32x8,16x4,16x8,32x4")
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    cuts = [tuple(map(int, cut.split("x"))) for cut in args.cuts.split(",")]
    for name in args.shapes.split(","):
        small = {"groups": 2, "per_group": 2, "keys": 16, "values": 16} if args.interpret else {}
        for prompts in ((130, 70),) if args.interpret else PROMPTS:
            for line in compare(name, replace(SHAPES[name], **small), prompts, cuts[:1] if small else cuts):
                print(line, flush=True)


if __name__ == "__main__":
    main()
