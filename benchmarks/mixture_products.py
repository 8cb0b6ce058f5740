"""The kernels of mixtures and of latent attention on a GPU: right, and how fast beside what memory allows.

    python -m benchmarks.mixture_products qwen3-30b-a3b,gpt-oss-20b,deepseek-v2-lite

Each kernel is first held against `xla.py`, all of them before any is timed. Then microseconds by the
profiler, of many choices of experts, so that no weight stays in the cache; beside them the floor, the bytes
that must be read at --bandwidth, and what was expected before measuring. `--tokens` and `--kernels` time some
of it: the kernels of a fused mixture (`fused.*`) stand beside those that they would replace, and `try.*` are
other cuts of the same kernels, for few tokens and for few sequences, and of quantised weights for many
tokens. `--formats` takes weights in these formats, where their groups divide a shape's columns. `--interpret`
runs the checks alone, on a CPU, for shapes cut small.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shared.expert_formats import FORMATS, bytes_of, cuts, draw
from lmdeploy_jax.bench.device_time import Case, device_seconds
from lmdeploy_jax.models.mixture import EXACT_PARTS
from lmdeploy_jax.pallas_kernels.grouped_matmul import (
    aligned,
    chunks,
    fused_experts,
    gated_grouped_matmul,
    group_rows,
    mosaic,
    pallas,
    weighted_grouped_matmul,
    why_not_fused,
)
from lmdeploy_jax.pallas_kernels.grouped_matmul import tile_rows as group_tile_rows
from lmdeploy_jax.pallas_kernels.latent_attention import latent_attention
from lmdeploy_jax.pallas_kernels.latent_attention import pallas as latent_pallas
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles, tile_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from lmdeploy_jax.pallas_kernels.topk_routing import TopK, topk_routing

Weight = jax.Array | Quantised

ROWS = (1, 8, 32, 64, 128, 256, 1024, 8192)
CHOICES = 6  # draws of experts that a time is the mean of
MOST_ERROR = 6e-3  # of sums rounded to 16 bits, as a share of the whole
SHARE, LAUNCH = 0.8, 2.5e-6  # of the bandwidth, and seconds of a launch: guessed before measuring
ARITHMETIC, ARITHMETIC_SHARE = 790e12, 0.4  # operations a second, and what Triton's tiles may get of them
LATENT = {"32 x 1024": [1024] * 32, "128 x 1024": [1024] * 128, "1 x 8000": [8000]}
RANK, ROTATED = 512, 64
KERNELS = ("topk_routing", "group_rows", "gate_up", "down", "latent", "fused", "try")
FEW_TOKENS = 512  # up to which other cuts are tried
CUTS = [pallas.Tuning(*cut) for cut in [(32, 128, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 8, 3)]]
LATENT_CUTS = [
    latent_pallas.Tuning(16, 32, 4, 3, programs, splits)
    for programs, splits in ((132, 32), (264, 128), (396, 64))
]


@dataclass(frozen=True)
class Mixture:
    """A layer's mixture, and the heads of its latent attention, if it has that."""

    experts: int
    choices: int
    hidden: int
    inner: int
    latent_heads: int | None = None
    format: str = "bf16"

    def weights(self) -> tuple[Weight, Weight]:
        keys = jax.random.split(jax.random.key(0), 2)
        both, down = (self.experts, 2, self.inner, self.hidden), (self.experts, self.hidden, self.inner)
        form = FORMATS[self.format]
        return draw(form, keys[0], *both), draw(form, keys[1], *down)

    def has_format(self) -> bool:
        form = FORMATS[self.format]
        return form is None or form.group is None or not (self.hidden % form.group or self.inner % form.group)


SHAPES = {
    "qwen3-30b-a3b": Mixture(128, 8, 2048, 768),
    "gpt-oss-20b": Mixture(32, 4, 2880, 2880),
    "deepseek-v2-lite": Mixture(64, 6, 2048, 1408, latent_heads=16),
    "deepseek-v3-attention": Mixture(8, 2, 256, 128, latent_heads=128),
}


@dataclass(frozen=True)
class Layer:
    """The ops of a mixture, for a number of tokens. Weights are arguments: constants would be compiled in."""

    shape: Mixture
    tokens: int
    backend: str

    def x(self) -> jax.Array:
        return jax.random.normal(jax.random.key(7), (self.tokens, self.shape.hidden), "bfloat16")

    def logits(self, seed: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (self.tokens, self.shape.experts))

    def route(self, logits: jax.Array) -> Any:
        options = TopK(self.shape.choices, normalise=True)
        return topk_routing(logits, None, options, backend=self.backend)

    def group(self, experts: jax.Array) -> Any:
        return group_rows(experts.reshape(-1), self.shape.experts, backend=self.backend)

    def gate_and_up(self, x: jax.Array, groups: Any, weight: Weight) -> jax.Array:
        return gated_grouped_matmul(x, weight, groups, gating=gated, backend=self.backend)

    def add_up(self, inner: jax.Array, groups: Any, scales: jax.Array, weight: Weight) -> jax.Array:
        dtype = jnp.float32 if self.tokens <= EXACT_PARTS else jnp.bfloat16
        return weighted_grouped_matmul(inner, weight, groups, scales, out_dtype=dtype, backend=self.backend)

    def fused(self, x: jax.Array, logits: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return fused_experts(x, gate_up, down, *self.route(logits), gating=gated).astype(jnp.float32)

    def fuses(self) -> bool:
        """Whether a fused mixture can do it."""
        shape = self.shape
        if shape.format != "bf16":
            return False
        weight = (shape.experts, 2, shape.inner, shape.hidden)
        return not why_not_fused(self.tokens, shape.choices, weight, "bfloat16", biased=False)

    def whole(self, x: jax.Array, logits: jax.Array, gate_up: Weight, down: Weight) -> jax.Array:
        experts, scales = self.route(logits)
        groups = self.group(experts)
        inner = self.gate_and_up(x, groups, gate_up)
        return self.add_up(inner, groups, scales, down).sum(0, dtype=jnp.float32)


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def error(got: jax.Array, want: jax.Array) -> float:
    """As a share of what is wanted."""
    wide = [np.asarray(each, np.float64) for each in (got, want)]
    return float(np.linalg.norm(wide[0] - wide[1]) / np.linalg.norm(wide[1]))


def tell(name: str, found: float) -> bool:
    right = found < MOST_ERROR
    print(f"{'right' if right else 'WRONG'}: {name}, error {found:.1e}", flush=True)
    return right


def check(name: str, shape: Mixture, rows: tuple[int, ...], backend: str) -> bool:
    """Whether a whole mixture is XLA's, and latent attention too."""
    weights, right = shape.weights(), True
    for tokens in rows:
        got, want = (
            jax.jit(layer.whole)(layer.x(), layer.logits(3), *weights)
            for layer in (Layer(shape, tokens, each) for each in (backend, "xla"))
        )
        right &= tell(f"{name}, mixture of {tokens} tokens", error(got, want))
        layer = Layer(shape, tokens, backend)
        if backend == "pallas" and layer.fuses():
            got = jax.jit(layer.fused)(layer.x(), layer.logits(3), *weights)
            right &= tell(f"{name}, fused mixture of {tokens} tokens", error(got, want))
    if shape.latent_heads is not None:
        lengths = [130, 3, 64, 700] if backend == "pallas" else [70, 3]
        for prefill, kind in ((False, "decode"), (True, "prefill")):
            got, want = (Latents(shape.latent_heads, lengths, each).run(prefill) for each in (backend, "xla"))
            right &= tell(f"{name}, latent attention, {kind}", error(got, want))
    return right


class Latents:
    """Sequences of such lengths in a shuffled cache, and latent attention of their last or of all tokens."""

    def __init__(
        self, heads: int, lengths: list[int], backend: str, cut: latent_pallas.Tuning | None = None
    ) -> None:
        self.cut = cut
        self.heads, self.lengths, self.backend = heads, np.asarray(lengths, np.int32), backend
        pages = -(-self.lengths // PAGE_SIZE)
        self.table = np.zeros((len(lengths), pages.max()), np.int32)
        order = np.random.default_rng(0).permutation(pages.sum()).astype(np.int32) + 1
        for row, (count, end) in enumerate(zip(pages, np.cumsum(pages), strict=True)):
            self.table[row, :count] = order[end - count : end]
        shape = (int(pages.sum()) + 1, 1, PAGE_SIZE, RANK + ROTATED)
        self.pages = jax.random.normal(jax.random.key(1), shape, "bfloat16")

    def function(self, prefill: bool) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
        """Pages, queries and latents -> pages, outputs."""
        tiles, rows = None, np.arange(len(self.lengths))
        positions = self.lengths - 1
        if prefill:
            rows = np.repeat(rows, self.lengths)
            starts = np.cumsum(self.lengths) - self.lengths
            positions = np.arange(len(rows)) - starts[rows]
            height = tile_rows(self.backend)
            width = max_tiles(len(rows), len(self.lengths), height)
            first = np.zeros_like(self.lengths)
            tiles = jnp.asarray(build_tiles(range(len(starts)), starts, self.lengths, first, height, width))
        slots = self.table[rows, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        where = tuple(map(jnp.asarray, (slots.astype(np.int32), self.table, self.lengths)))
        how = {"rank": RANK, "options": AttentionOptions(0.05), "tile_rows": tile_rows(self.backend)}

        def attend(pages: jax.Array, q: jax.Array, latents: jax.Array) -> Any:
            if self.cut is not None:
                arrays = (q, latents, pages, *where, RANK, AttentionOptions(0.05))
                return latent_pallas.decode(*arrays, tuning=self.cut, interpret=False)[::-1]
            arguments = (q, latents, pages, *where, tiles)
            return latent_attention(*arguments, **how, backend=self.backend)[::-1]

        shapes = (len(rows), self.heads, RANK + ROTATED), (len(rows), RANK + ROTATED)
        arrays = (jax.random.normal(jax.random.key(i), shape, "bfloat16") for i, shape in enumerate(shapes))
        return attend, tuple(arrays)

    def run(self, prefill: bool) -> jax.Array:
        function, arrays = self.function(prefill)
        return jax.jit(function)(self.pages, *arrays)[1]


def times(name: str, shape: Mixture, args: argparse.Namespace) -> Iterator[str]:
    """A line for each kernel and number of rows."""
    weights = shape.weights()
    for tokens in args.tokens:
        layer = Layer(shape, tokens, "pallas")
        logits = [layer.logits(seed) for seed in range(CHOICES)]
        routes = [layer.route(each) for each in logits]
        touched = float(np.mean([len(np.unique(experts)) for experts, _ in routes]))
        cases = cases_of(layer, logits, routes, weights)
        if layer.fuses() and "fused" in args.kernels:
            cases |= fused_cases(layer, routes, weights)
        if "try" in args.kernels:
            cases |= other_cuts(layer, routes, weights)
        cases = {kernel: case for kernel, case in cases.items() if kernel.split(".")[0] in args.kernels}
        for kernel, seconds in zip(cases, device_seconds(list(cases.values())), strict=True):
            part = {"gate_up": 2, "down": 1}.get(kernel.split(" ")[0].split(".")[-1], 0)
            read = touched * (bytes_of(weights[2 - part]) if part else 0) / shape.experts
            read /= args.bandwidth * 1e12
            work = 2 * tokens * shape.choices * part * shape.hidden * shape.inner / ARITHMETIC
            yield line(f"{name} {kernel}, {tokens} tokens, {touched:.1f} experts", seconds, read, work)


def cases_of(
    layer: Layer, logits: list[jax.Array], routes: list[Any], weights: tuple[Weight, Weight]
) -> dict[str, Case]:
    groups, shape = [layer.group(experts) for experts, _ in routes], layer.shape
    rows = layer.tokens * shape.choices
    x, inner = layer.x(), jax.random.normal(jax.random.key(8), (rows, shape.inner), "bfloat16")
    pairs = zip(groups, routes, strict=True)
    return {
        "topk_routing": Case(layer.route, [(each,) for each in logits]),
        "group_rows": Case(layer.group, [(experts,) for experts, _ in routes]),
        "gate_up": Case(layer.gate_and_up, [(x, each, weights[0]) for each in groups]),
        "down": Case(layer.add_up, [(inner, each, scales, weights[1]) for each, (_, scales) in pairs]),
    }


def fused_cases(layer: Layer, routes: list[Any], weights: tuple[jax.Array, jax.Array]) -> dict[str, Case]:
    """What `fused_experts` is made of, kernel by kernel."""
    shape, x = layer.shape, layer.x()

    def place(experts: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = chunks.group_rows(experts.reshape(-1), shape.experts, mosaic.TILE, interpret=False)
        return found.aligned, found.groups.tiles

    placed = [place(experts) for experts, _ in routes]
    rows = placed[0][1].shape[0] * mosaic.TILE
    wide, inner, out = (
        jax.random.normal(jax.random.key(9), (rows, columns), "bfloat16")
        for columns in (shape.hidden, shape.inner, shape.hidden)
    )
    scales = [scales for _, scales in routes]
    return {
        "fused.place_rows": Case(place, [(experts,) for experts, _ in routes]),
        "fused.spread": Case(
            lambda x, at: aligned.spread(x, at, rows, interpret=False), [(x, at) for at, _ in placed]
        ),
        "fused.gate_up": Case(
            lambda *arrays: mosaic.grouped_matmul(*arrays, gated),
            [(wide, weights[0], tiles) for _, tiles in placed],
        ),
        "fused.down": Case(
            lambda *arrays: mosaic.grouped_matmul(*arrays, None),
            [(inner, weights[1][:, None], tiles) for _, tiles in placed],
        ),
        "fused.combine": Case(
            lambda *arrays: aligned.combine(*arrays, interpret=False),
            [(out, at, each) for (at, _), each in zip(placed, scales, strict=True)],
        ),
    }


def other_cuts(layer: Layer, routes: list[Any], weights: tuple[Weight, Weight]) -> dict[str, Case]:
    """Both products cut otherwise; plain ones of few tokens alone."""
    shape, groups = layer.shape, [layer.group(experts) for experts, _ in routes]
    rows = layer.tokens * shape.choices
    height = group_tile_rows(rows, shape.experts, "pallas")
    inner = jax.random.normal(jax.random.key(8), (rows, shape.inner), "bfloat16")
    cases = {}
    few, plain = layer.tokens <= FEW_TOKENS, shape.format == "bf16"
    for cut in (CUTS if few else []) if plain else cuts(weights[0], few=few):
        how = f"{cut.block_out} x {cut.block_in}, {cut.num_warps} warps, {cut.num_stages} stages"

        def gate_up(x: jax.Array, each: Any, weight: Weight, cut: Any = cut) -> jax.Array:
            arrays = (x, weight, None, each, gated, height)
            return pallas.gated_grouped_matmul(*arrays, tuning=cut, interpret=False)

        def down(inner: jax.Array, each: Any, scales: jax.Array, weight: Weight, cut: Any = cut) -> Any:
            dtype = jnp.float32 if layer.tokens <= EXACT_PARTS else jnp.bfloat16
            arrays = (inner, weight, None, each, scales, None, height, dtype)
            return pallas.weighted_grouped_matmul(*arrays, tuning=cut, interpret=False)

        pairs = list(zip(groups, (scales for _, scales in routes), strict=True))
        cases[f"try.gate_up {how}"] = Case(gate_up, [(layer.x(), each, weights[0]) for each in groups])
        cases[f"try.down {how}"] = Case(down, [(inner, *pair, weights[1]) for pair in pairs])
    return cases


def line(what: str, seconds: float | None, read: float, work: float) -> str:
    """With the floor of what is read and computed, both in seconds."""
    expected = max(read / SHARE, work / ARITHMETIC_SHARE) + LAUNCH
    measured = "does not compile" if seconds is None else f"{1e6 * seconds:9.2f} us"
    return f"{what:84} {measured}, floor {1e6 * max(read, work):8.2f}, expected {1e6 * expected:8.2f}"


def latent_times(name: str, heads: int, args: argparse.Namespace) -> Iterator[str]:
    for case, lengths in LATENT.items():
        for cut in [None, *(LATENT_CUTS if "try" in args.kernels else ())]:
            latents = Latents(heads, lengths, "pallas", cut)
            function, arrays = latents.function(prefill=False)
            (seconds,) = device_seconds([Case(function, [arrays] * 4, [latents.pages])])
            read = 2 * sum(lengths) * (RANK + ROTATED) / args.bandwidth / 1e12
            work = 2 * sum(lengths) * heads * (2 * RANK + ROTATED) / ARITHMETIC
            how = "" if cut is None else f", up to {cut.programs} programs, {cut.splits} of a sequence"
            yield line(f"{name} latent attention, decode, {case}{how}", seconds, read, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--tokens", type=_numbers, default=ROWS, help="that are timed, as in 1,32")
    parser.add_argument("--checked", type=_numbers, default=(1, 33, 300, 2000), help="tokens of the checks")
    parser.add_argument("--kernels", type=_kernels, default=KERNELS, help=f"some of {', '.join(KERNELS)}")
    parser.add_argument("--formats", type=_formats, default=("bf16",), help=f"some of {', '.join(FORMATS)}")
    args = parser.parse_args()
    shapes = dict(shapes_of(args.shapes.split(","), args.formats, small=args.interpret))
    backend, rows = ("pallas_interpret", (1, 20)) if args.interpret else ("pallas", args.checked)
    right = [check(name, shape, rows, backend) for name, shape in shapes.items()]
    if args.interpret or not all(right):
        raise SystemExit(not all(right))
    for name, shape in shapes.items():
        latent = shape.latent_heads if "latent" in args.kernels else None
        attention = () if latent is None else latent_times(name, latent, args)
        for told in itertools.chain(times(name, shape, args), attention):
            print(told, flush=True)


def shapes_of(names: list[str], formats: tuple[str, ...], *, small: bool) -> Iterator[tuple[str, Mixture]]:
    """Each in each format that it has."""
    for name, form in itertools.product(names, formats):
        cut = {"experts": 6, "choices": 2, "hidden": 384, "inner": 256} if small else {}
        shape = replace(SHAPES[name], format=form, **cut)
        if form != "bf16":
            yield from [(f"{name} {form}", replace(shape, latent_heads=None))] if shape.has_format() else ()
        else:
            yield name, replace(shape, hidden=96, inner=72) if small else shape


def _formats(text: str) -> tuple[str, ...]:
    return _known(text, tuple(FORMATS))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _kernels(text: str) -> tuple[str, ...]:
    return _known(text, KERNELS)


def _known(text: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(choices):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(choices)}")
    return names


if __name__ == "__main__":
    main()
