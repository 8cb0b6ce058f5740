"""The kernels by themselves on this GPU: time, and the share of the bandwidth or of the arithmetic it has."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.bench.device_time import Case, device_seconds, require_gpu
from lmdeploy_jax.cache.pages import PAGE_SIZE, pages_for
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.config import AttentionConfig, DecoderConfig
from lmdeploy_jax.models.rope import rotation
from lmdeploy_jax.pallas_kernels.kv_formats import KVFormat
from lmdeploy_jax.pallas_kernels.paged_attention import paged_attention
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles, prefill_attention, tile_rows
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages, quantised
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork

DECODE = {
    "256 x 640": [640] * 256,
    "128 x 1-2047": [random.Random(i).randint(1, 2047) for i in range(128)],
    "32 x 640": [640] * 32,
    "8 x 8000": [8000] * 8,
    "1 x 8000": [8000],
}
PREFILL = {"1 x 8192": [8192], "16 x 512": [512] * 16}
QUERY_SETS = 4
MATRIX = 8192  # rows and columns of the product that measures the arithmetic


@dataclass(frozen=True)
class Result:
    """One kernel on one case; `share` is of `limit`, the bytes or operations a second that the GPU has."""

    kernel: str
    case: str
    us: float
    rate: float
    unit: str
    share: float


def measure(config: DecoderConfig, bandwidth: float, backend: str = "pallas") -> Iterator[Result]:
    """bandwidth in bytes a second. Raises ConfigError where there is no GPU."""
    require_gpu()
    mixer = config.layers[0].mixer
    if not isinstance(mixer, AttentionConfig):
        raise ConfigError(
            f"{mixer} is not timed here, only attention with KV heads is: choose a model that has it, or see "
            "`python -m benchmarks.mixture_products` in a checkout"
        )
    bench = Attention(mixer, backend)
    arithmetic = _arithmetic()
    work = mixer.heads * mixer.head_dim
    for case, lengths in DECODE.items():
        size = sum(mixer.read_bytes(length, 2, 1) for length in lengths)
        yield _result("decode attention", case, bench.decode(lengths), size, bandwidth, "TB/s")
    for case, lengths in PREFILL.items():
        operations = sum(2 * n * (n + 1) for n in lengths) * work  # causal
        yield _result("prefill attention", case, bench.prefill(lengths), operations, arithmetic, "TFLOP/s")


def _result(kernel: str, case: str, seconds: float, work: float, limit: float, unit: str) -> Result:
    rate = work / seconds
    return Result(kernel, case, round(1e6 * seconds, 1), round(rate / 1e12, 2), unit, round(rate / limit, 3))


def _arithmetic() -> float:
    """Operations a second of a large bfloat16 product of random values."""
    keys = jax.random.split(jax.random.key(0), 2)
    sides = [jax.random.normal(key, (MATRIX, MATRIX), jnp.bfloat16) for key in keys]
    (seconds,) = device_seconds([Case(jnp.matmul, [tuple(sides)] * 10)])
    assert seconds is not None
    return 2 * MATRIX**3 / seconds


class Attention:
    """A cache of random pages, scattered over sequences as a running engine scatters them."""

    def __init__(self, config: AttentionConfig, backend: str) -> None:
        self.config, self.backend = config, backend
        pages = 1 + max(sum(map(pages_for, lengths)) for lengths in (*DECODE.values(), *PREFILL.values()))
        shape = (pages, config.kv_heads, PAGE_SIZE, config.head_dim)
        drawn = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2)]
        form = config.kv_format
        self.cache: list[Any] = drawn if form is None else [_quantised(x, form) for x in drawn]

    def decode(self, lengths: Sequence[int]) -> float:
        """Seconds of a decode step's attention in one layer, its queries, keys and values made on the way."""
        case = self.decode_case(lengths)
        seconds = _seconds(case)
        self.cache = case.state[:2]
        return seconds

    def decode_case(self, lengths: Sequence[int], attend: Callable[..., Any] = paged_attention) -> Case:
        """What `decode` times; `attend` may stand in the op's place."""
        config, rows = self.config, len(lengths)
        lens, table = jnp.asarray(lengths, jnp.int32), self._table(lengths)
        slots = table[jnp.arange(rows), (lens - 1) // PAGE_SIZE] * PAGE_SIZE + (lens - 1) % PAGE_SIZE
        split_counters = jnp.zeros((rows, config.kv_heads), jnp.int32)
        turn = (None, None) if config.rope is None else rotation(config.rope, lens - 1, lens)
        work = HeadWork(cos=turn[0], sin=turn[1])
        heads = (config.kv_heads, config.group + 2, config.head_dim)

        def decode(k_pages: jax.Array, v_pages: jax.Array, split_counters: jax.Array, qkv: jax.Array) -> Any:
            args = (qkv, k_pages, v_pages, slots, table, lens, split_counters, work)
            options = {"options": config.options, "dtype": jnp.bfloat16, "backend": self.backend}
            out, *written = attend(*args, **options)
            return *written, out

        return Case(decode, [(x,) for x in _random(rows, *heads)], [*self.cache, split_counters])

    def prefill(self, lengths: Sequence[int]) -> float:
        """Seconds of the attention of whole prompts in one layer."""
        counts, rows = np.asarray(lengths), tile_rows(self.backend)
        tokens, zeros = int(counts.sum()), np.zeros_like(counts)
        width = max_tiles(tokens, len(counts), rows)
        starts = np.cumsum(counts) - counts
        tiles = build_tiles(np.arange(len(counts)), starts, counts, zeros, rows, width)
        shape = (tokens, self.config.heads, self.config.head_dim)
        rest = (*self.cache, self._table(lengths), jnp.asarray(tiles))
        function = partial(prefill_attention, options=self.config.options, backend=self.backend)
        return _seconds(Case(function, [(q, *rest) for q in _random(*shape)]))

    def _table(self, lengths: Sequence[int]) -> jax.Array:
        counts = [pages_for(length) for length in lengths]
        order = np.random.default_rng(len(lengths)).permutation(self.cache[0].shape[0] - 1) + 1
        table = np.zeros((len(lengths), max(counts)), np.int32)
        for row, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
            table[row, :count] = order[end - count : end]
        return jnp.asarray(table)


@partial(jax.jit, static_argnums=1)
def _quantised(x: jax.Array, form: KVFormat) -> QuantPages:
    return quantised(x, form)


def _random(*shape: int) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(QUERY_SETS)]


def _seconds(case: Case) -> float:
    (seconds,) = device_seconds([case])
    assert seconds is not None, "an op that the engine compiles must compile here"
    return seconds
