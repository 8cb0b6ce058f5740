"""Programs around the kernels, as shapes only, to lower or compile where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from lmdeploy_jax.pallas_kernels.kv_formats import KVFormat
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.paged_attention import paged_attention
from lmdeploy_jax.pallas_kernels.prefill_attention import max_tiles, prefill_attention, tile_rows
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork, rope_kv_write

SEQUENCES, TABLE_WIDTH, TOKENS, PAGES = 16, 32, 256, 128


@dataclass(frozen=True)
class Model:
    """Shapes of attention in a model, and the options that its kernels are built with."""

    head_dim: int
    heads: int
    kv_heads: int
    dtype: str
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    lookahead: bool = False
    form: KVFormat | None = None

    def __str__(self) -> str:
        return f"{self.form.name if self.form else self.dtype}-{self.head_dim}"

    def options(self) -> dict[str, object]:
        sinks = jnp.zeros(self.heads, jnp.float32) if self.sinks else None
        return {"options": AttentionOptions(0.1, self.window, self.soft_cap), "sinks": sinks}

    def cache(self) -> jax.ShapeDtypeStruct | QuantPages:
        tokens, form = (PAGES, self.kv_heads, PAGE_SIZE), self.form
        if form is None:
            return jax.ShapeDtypeStruct((*tokens, self.head_dim), self.dtype)
        words = jax.ShapeDtypeStruct((*tokens, form.words(self.head_dim)), "uint16")
        return QuantPages(words, jax.ShapeDtypeStruct(tokens, form.scale_dtype), form)


@dataclass(frozen=True)
class Program:
    """A step of `layers` layers over donated caches: call `function(caches, x, *rest)` with `specs`."""

    function: Callable[..., tuple[list, jax.Array]]
    specs: tuple[object, ...]


def decode_step(model: Model, layers: int) -> Program:
    """Decode attention, with what precedes it, layer after layer."""

    def step(caches: list, x: jax.Array, slots: jax.Array, table: jax.Array, lens: jax.Array) -> tuple:
        def attend(qkv: jax.Array, k: jax.Array, v: jax.Array, work: HeadWork) -> tuple:
            zeros = jnp.zeros((SEQUENCES, model.kv_heads), jnp.int32)
            arrays = (qkv, k, v, slots, table, lens, zeros, work)
            return paged_attention(*arrays, **model.options(), dtype=model.dtype, backend="pallas")[:3]

        return _layers(model, caches, x, slots, attend)

    return _program(model, layers, step, SEQUENCES, (_int32(SEQUENCES, TABLE_WIDTH), _int32(SEQUENCES)))


def prefill_step(model: Model, layers: int) -> Program:
    """What precedes attention, and prefill attention, layer after layer."""

    def step(caches: list, x: jax.Array, slots: jax.Array, table: jax.Array, tiles: jax.Array) -> tuple:
        ahead = slots if model.lookahead else None

        def attend(qkv: jax.Array, k: jax.Array, v: jax.Array, work: HeadWork) -> tuple:
            q, k, v = rope_kv_write(qkv, k, v, slots, work, dtype=model.dtype, backend="pallas")
            q = q.reshape(x.shape)
            how = {**model.options(), "lookahead": ahead, "backend": "pallas"}
            return prefill_attention(q, k, v, table, tiles, **how), k, v

        return _layers(model, caches, x, slots, attend)

    width = max_tiles(TOKENS, SEQUENCES, tile_rows("pallas"))
    return _program(model, layers, step, TOKENS, (_int32(SEQUENCES, TABLE_WIDTH), _int32(width, 4)))


@contextmanager
def as_on_h200() -> Iterator[None]:
    """Inside, Pallas lowers its kernels as it would on an H200: from JAX 0.11 on it asks for the device."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def _layers(
    model: Model, caches: list, x: jax.Array, slots: jax.Array, attend: Callable[..., tuple]
) -> tuple[list, jax.Array]:
    group, written = model.heads // model.kv_heads, []
    half = model.head_dim // 2
    norm, angle = jnp.ones(model.head_dim, model.dtype), slots[:, None] * jnp.ones(half)
    for k_pages, v_pages in caches:
        rows = x.reshape(-1, model.kv_heads, group, model.head_dim)
        qkv = jnp.concatenate([rows, rows[:, :, :2]], axis=2) if group > 1 else rows.repeat(3, axis=2)
        work = HeadWork(qkv[0], norm, norm, jnp.cos(angle), jnp.sin(angle))
        out, k_pages, v_pages = attend(qkv, k_pages, v_pages, work)
        x = x + out.reshape(x.shape)
        written.append((k_pages, v_pages))
    return written, x


def _program(
    model: Model, layers: int, step: Callable[..., tuple], rows: int, rest: tuple[object, ...]
) -> Program:
    x = jax.ShapeDtypeStruct((rows, model.heads, model.head_dim), model.dtype)
    return Program(step, ([(model.cache(), model.cache())] * layers, x, _int32(rows), *rest))


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
