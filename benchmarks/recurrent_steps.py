"""The kernels of recurrent layers for single tokens on a GPU: right, and how fast beside what memory allows.

    python -m benchmarks.recurrent_steps qwen3-next,nemotron-3-nano,granite-4-h-small

Each op is first held against `xla.py`. Then microseconds by the profiler, by the kernels and through XLA, and
beside them the floor: each state is read once and written once, at --bandwidth. `--interpret` runs the checks
alone, on a CPU, for shapes cut small.
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

from lmdeploy_jax.bench.device_time import Case, device_seconds
from lmdeploy_jax.pallas_kernels.delta_rule import delta_rule
from lmdeploy_jax.pallas_kernels.short_conv import short_conv
from lmdeploy_jax.pallas_kernels.spans import Spans, decode_spans
from lmdeploy_jax.pallas_kernels.ssd import ssd

ROWS = (1, 8, 32, 128)
TAPS = 4
MOST_ERROR = 1e-5  # of sums in f32, as a share of the whole
SEEDS = 3


@dataclass(frozen=True)
class Shape:
    """A layer's heads: `groups` share queries and keys, or B and C, of `keys` elements."""

    groups: int
    per_group: int
    keys: int
    values: int
    delta: bool = False

    @property
    def state(self) -> tuple[int, ...]:
        return (self.groups * self.per_group, self.keys, self.values)

    @property
    def channels(self) -> int:
        return 2 * self.keys + self.per_group * self.values


SHAPES = {
    "qwen3-next": Shape(16, 2, 128, 128, delta=True),
    "nemotron-3-nano": Shape(8, 8, 128, 64),
    "granite-4-h-small": Shape(1, 128, 128, 64),
}
Op = Callable[..., tuple[jax.Array, jax.Array]]


def recurrence(shape: Shape, backend: str) -> Op:
    """States, arrays and spans -> states, outputs."""

    def advance(states: jax.Array, q: Any, k: Any, v: Any, numbers: Any, spans: Spans) -> Any:
        decay, other = -jnp.exp(numbers[0]), jax.nn.sigmoid(numbers[1])
        if shape.delta:
            return delta_rule(q, k, v, decay, other, states, spans, backend=backend)[::-1]
        a = jnp.ones(v.shape[1:3], jnp.float32)
        return ssd(v, other, -a, k, q, a, states, spans, backend=backend)[::-1]

    return advance


def convolution(backend: str) -> Op:
    """The same of the layer's short convolution."""

    def advance(states: jax.Array, x: jax.Array, weight: jax.Array, spans: Spans) -> Any:
        return short_conv(x, weight, states, spans, backend=backend)[::-1]

    return advance


def drawn(seed: int, *shapes: tuple[int, ...], dtype: str = "bfloat16") -> Iterator[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return (0.3 * jax.random.normal(key, each, dtype) for key, each in zip(keys, shapes, strict=True))


def cases(shape: Shape, rows: int, backend: str) -> dict[str, Case]:
    """Every other row of slots twice as many as rows, so that a step's states lie apart."""
    slots, lens = jnp.arange(rows, dtype=jnp.int32) * 2, jnp.full(rows, 9, jnp.int32)
    spans = decode_spans(slots, lens)
    heads, conv = (rows, shape.groups), (2 * rows + 1, shape.groups, TAPS - 1, shape.channels)

    def arguments(seed: int) -> tuple[Any, ...]:
        values = (*heads, shape.per_group, shape.values)
        q, k, v = drawn(seed, (*heads, shape.keys), (*heads, shape.keys), values)
        (numbers,) = drawn(seed, (2, *heads, shape.per_group), dtype="float32")
        return q, k / shape.keys**0.5, v, numbers, spans

    x, weight, inputs = drawn(1, (*heads, shape.channels), (shape.groups, shape.channels, TAPS), conv)
    (states,) = drawn(2, (2 * rows + 1, *shape.state), dtype="float32")
    return {
        "recurrence": Case(recurrence(shape, backend), [arguments(i) for i in range(SEEDS)], [states]),
        "convolution": Case(convolution(backend), [(x, weight, spans)] * SEEDS, [inputs]),
    }


def check(name: str, shape: Shape, rows: int, backend: str) -> bool:
    """Whether outputs and states are XLA's."""
    right = True
    for op in ("recurrence", "convolution"):
        got, want = (_run(cases(shape, rows, each)[op]) for each in (backend, "xla"))
        pairs = zip(got, want, strict=True)
        worst = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
        right &= worst < MOST_ERROR
        verdict = "right" if worst < MOST_ERROR else "WRONG"
        print(f"{verdict}: {name}, {op} of {rows} rows, error {worst:.1e}", flush=True)
    return right


def _run(case: Case) -> list[np.ndarray]:
    out = jax.jit(case.function)(*case.state, *case.arguments[0])
    return [np.asarray(each, np.float64) for each in out]


def times(name: str, shape: Shape, bandwidth: float) -> Iterator[str]:
    """A line for each op and number of rows."""
    for rows in ROWS:
        kernels, plain = (cases(shape, rows, backend) for backend in ("pallas", "xla"))
        found = device_seconds([*kernels.values(), *plain.values()])
        for op, ours, xla in zip(kernels, found[:2], found[2:], strict=True):
            (states,) = kernels[op].state
            floor = states.nbytes * rows / len(states) * 2 / bandwidth
            both = ", ".join(f"{what} {_shown(each)}" for what, each in (("kernel", ours), ("xla", xla)))
            yield f"{f'{name} {op}, {rows} rows':50} {both}, floor {1e6 * floor:8.2f}"


def _shown(seconds: float | None) -> str:
    return "does not compile" if seconds is None else f"{1e6 * seconds:9.2f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s")
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    shapes = {name: SHAPES[name] for name in args.shapes.split(",")}
    if args.interpret:
        shapes = {name: replace(shape, keys=12, values=20) for name, shape in shapes.items()}
    how = partial(
        check, rows=3 if args.interpret else 33, backend="pallas_interpret" if args.interpret else "pallas"
    )
    right = [how(name, shape) for name, shape in shapes.items()]
    if args.interpret or not all(right):
        raise SystemExit(not all(right))
    for name, shape in shapes.items():
        for told in times(name, shape, args.bandwidth * 1e12):
            print(told, flush=True)


if __name__ == "__main__":
    main()
