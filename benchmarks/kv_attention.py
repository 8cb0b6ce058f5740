"""Attention over quantised caches on a GPU: right, and how fast beside 16 bits.

    python -m benchmarks.kv_attention llama3-8b

The kernels' outputs are first held against `xla.py` on the same cache; some prompts find no room among the
pages that are widened. Then microseconds by the profiler, of each way to hold the cache and each cut of the
work, and how many times as fast it is as 16 bits.
`--interpret` runs the checks alone, on a CPU, for shapes cut small.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.bench import shapes
from lmdeploy_jax.bench.device_time import Case, device_seconds
from lmdeploy_jax.bench.kernels import DECODE, PREFILL, Attention
from lmdeploy_jax.cache.pages import PAGE_SIZE, pages_for
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.models.config import AttentionConfig
from lmdeploy_jax.models.rope import rotation
from lmdeploy_jax.pallas_kernels.kv_formats import KV_FORMATS
from lmdeploy_jax.pallas_kernels.paged_attention import pallas
from lmdeploy_jax.pallas_kernels.paged_attention.pallas import Tuning
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, prefill_attention, tile_rows
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages, dequantised
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork, rope_kv_write

MOST_ERROR = 5e-3  # of bfloat16, as a share of the whole
CUTS = [Tuning(*cut) for cut in itertools.product((128, 256, 512), (2, 4), (3, 5))]
FORMATS = {"bf16": None} | {form.name: form for form in KV_FORMATS.values()}


def cut_as(tuning: Tuning) -> Callable[..., Any]:
    """`paged_attention` of one part, with that cut."""

    def attend(qkv: jax.Array, *arrays: Any, options: Any, dtype: Any, backend: str) -> Any:
        *cache, slots, table, lens, counters, work = arrays
        args = (qkv[None], *cache, slots, table, lens, counters, work, None, options)
        return pallas.paged_attention(
            *args, dtype=dtype, tuning=tuning, interpret=backend == "pallas_interpret"
        )

    return attend


def check(name: str, config: AttentionConfig, backend: str, lengths: Sequence[int], *, prompts: bool) -> bool:
    """Whether what is written, and decode and prefill attention, are what they are through XLA."""
    found: dict[str, list[jax.Array]] = {}
    for each in (backend, "xla"):
        bench = Attention(config, each)
        case, write = bench.decode_case(lengths), write_case(bench, 70)
        *cache, _, out = jax.jit(case.function)(*case.state, *case.arguments[0])
        *written, q = jax.jit(write.function)(*write.state, *write.arguments[0])
        ways = (each, "mosaic") if each == "pallas" else (each,)
        rows = [_plain(pages)[1:3] for pages in written]
        found[each] = [out, q, *rows, *(_prefilled(config, cache, way) for way in ways if prompts)]
    names = ("decode", "queries", "keys", "values", "prefill", "prefill through Mosaic")
    wanted = zip(names, found[backend], [*found["xla"], found["xla"][-1]], strict=False)
    right = [_is_right(f"{op} over {name}", got, want) for op, got, want in wanted]
    return all(right)


def write_case(bench: Attention, tokens: int) -> Case:
    """What precedes the attention of a prompt."""
    config, positions = bench.config, jnp.arange(tokens, dtype=jnp.int32)
    turn = (None, None) if config.rope is None else rotation(config.rope, positions, positions + 1)
    work, slots = HeadWork(cos=turn[0], sin=turn[1]), PAGE_SIZE + positions
    heads = (config.kv_heads, config.group + 2, config.head_dim)

    def write(k_pages: Any, v_pages: Any, qkv: jax.Array) -> Any:
        how = {"dtype": jnp.bfloat16, "backend": bench.backend}
        q, *written = rope_kv_write(qkv, k_pages, v_pages, slots, work, **how)
        return *written, q

    drawn = [jax.random.normal(jax.random.key(i), (tokens, *heads), jnp.bfloat16) for i in range(2)]
    return Case(write, [(qkv,) for qkv in drawn], [*bench.cache])


def _plain(pages: Any) -> jax.Array:
    return dequantised(pages) if isinstance(pages, QuantPages) else pages


def _is_right(name: str, *arrays: jax.Array) -> bool:
    got, want = (np.asarray(x, np.float64) for x in arrays)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    print(f"{'right' if error < MOST_ERROR else 'WRONG'}: {name}, error {error:.1e}", flush=True)
    return error < MOST_ERROR


def _prefilled(config: AttentionConfig, cache: list[Any], backend: str) -> jax.Array:
    """Chunks behind prefixes, and a short one; the last one finds no room where pages are widened."""
    counts, firsts = [150, 3, 30, 30, 30], [70, 0, 200, 200, 200]
    starts = np.cumsum([0, *counts[:-1]])
    tiles = build_tiles(range(5), starts, counts, firsts, tile_rows(backend), 24 * len(counts))
    table = jnp.asarray(np.arange(1, 21, dtype=np.int32).reshape(5, 4))
    q = jax.random.normal(jax.random.key(5), (sum(counts), config.heads, config.head_dim), jnp.bfloat16)
    args = (q, *cache, table, jnp.asarray(tiles))
    how = {"options": config.options, "backend": backend}
    return jax.jit(lambda *args: prefill_attention(*args, **how))(*args)


def decode_times(configs: dict[str, AttentionConfig], names: Sequence[str]) -> Iterator[str]:
    """A line for each case, way to hold the cache and cut."""
    for name in names:
        base, lengths = None, DECODE[name]
        for form, config in configs.items():
            bench = Attention(config, "pallas")
            shipped = bench.decode_case(lengths)
            cuts = _cuts(config, lengths) if form == "int8" else []
            others = [bench.decode_case(lengths, cut_as(cut)) for cut in cuts]
            cases = [shipped, *(replace(case, state=shipped.state) for case in others)]
            size = sum(config.read_bytes(length, 2, 1) for length in lengths)
            for cut, seconds in zip(["shipped", *cuts], device_seconds(cases), strict=True):
                base = base or seconds
                yield f"{f'decode {name}, {form}, {cut}':75} {_rate(seconds, size, base)}"


def _cuts(config: AttentionConfig, lengths: Sequence[int]) -> list[Tuning]:
    """Those that share the work out differently."""
    tiles, width = len(lengths) * config.kv_heads, max(map(pages_for, lengths))
    splits = {
        (pallas.split_count(tiles, width, cut.programs), cut.num_warps, cut.num_stages): cut for cut in CUTS
    }
    return list(splits.values())


def prefill_times(configs: dict[str, AttentionConfig], _: Sequence[str]) -> Iterator[str]:
    """The same of prompts."""
    for name, lengths in PREFILL.items():
        base = None
        for (form, config), backend in itertools.product(configs.items(), ("mosaic", "pallas")):
            seconds = Attention(config, backend).prefill(lengths)
            base = base or seconds
            work = sum(2 * n * (n + 1) for n in lengths) * config.heads * config.head_dim
            yield f"{f'prefill {name}, {form}, {backend}':75} {_rate(seconds, work, base)}"


def write_times(configs: dict[str, AttentionConfig], _: Sequence[str]) -> Iterator[str]:
    """And of what comes before it."""
    base, tokens = None, 8192
    for form, config in configs.items():
        (seconds,) = device_seconds([write_case(Attention(config, "pallas"), tokens)])
        base = base or seconds
        size = tokens * config.kv_heads * (2 * config.group + 4) * config.head_dim * 2
        yield f"{f'write {tokens}, {form}':75} {_rate(seconds, size, base)}"


TIMES = {"write": write_times, "prefill": prefill_times, "decode": decode_times}


def _rate(seconds: float | None, work: float, base: float | None) -> str:
    if seconds is None or base is None:
        return "does not compile"
    return f"{1e6 * seconds:9.1f} us {work / seconds / 1e12:7.2f} T/s {base / seconds:6.2f} times bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help=f"a shape: {', '.join(shapes.names())}")
    parser.add_argument("--cases", default="8 x 8000,64 x 8000,256 x 640")
    parser.add_argument("--formats", default="bf16,int8,fp8_e4m3,int4", help=", ".join(FORMATS))
    parser.add_argument("--times", default=",".join(TIMES), help="what is timed")
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    DECODE.update({"64 x 8000": [8000] * 64, "128 x 640": [640] * 128, "8 x 640": [640] * 8})
    mixer = build_config(shapes.read(args.model), args.model).layers[0].mixer
    if args.interpret:
        DECODE.clear()
        DECODE["small"] = [100, 1, 64]
        PREFILL.clear()
    configs = {name: replace(mixer, kv_format=FORMATS[name]) for name in args.formats.split(",")}
    backend = "pallas_interpret" if args.interpret else "pallas"
    lengths = [100, 1, 64] if args.interpret else [700, 1, 64, 129, 3000, 33]
    prompts = "prefill" in args.times
    right = [check(name, config, backend, lengths, prompts=prompts) for name, config in configs.items()]
    if args.interpret or not all(right):
        raise SystemExit(not all(right))
    for times in args.times.split(","):
        for told in TIMES[times](configs, args.cases.split(",")):
            print(told, flush=True)


if __name__ == "__main__":
    main()
