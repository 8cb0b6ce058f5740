"""The bandwidth limit of decoding: bytes that a step must read, and how fast the device can read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lmdeploy_jax.models.config import DecoderConfig

COLUMNS = 8192
REPEATS = 5
IN_FLIGHT = 8  # calls at once, so that dispatching them is not part of the time


def matrix_parameters(config: DecoderConfig, sequences: int = 1) -> float:
    """Weights that a decode step of so many sequences reads: all matrices but an untied embedding (read by
    row), and of experts as many as are chosen at random.
    """
    mixers = sum(mixer.weights(config.hidden_size) for mixer in config.mixers)
    rows = sum(layer.mlp.weight_rows(sequences) for layer in config.layers if layer.mlp is not None)
    return mixers + config.hidden_size * (rows + config.vocab_size)


def step_bytes(
    config: DecoderConfig,
    itemsize: int,
    contexts: Sequence[float],
    tp: int = 1,
    *,
    weight_itemsize: float | None = None,
) -> float:
    """Bytes a decode step reads at least: the weights, and what the layers keep of sequences of so
    many tokens.

    itemsize: bytes of an element of either; weight_itemsize: of quantised weights, scales and all.
    """
    cached = sum(
        mixer.read_bytes(float(context), itemsize, tp) for mixer in config.mixers for context in contexts
    )
    return (weight_itemsize or itemsize) * matrix_parameters(config, len(contexts)) + cached


def measure(devices: int = 1) -> float:
    """Bytes a second that `devices` devices read together.

    The faster of two plain JAX programs over an array far larger than any cache of the first device: its
    sum, and its product with a vector. The best of several repetitions counts.
    """
    on_cpu = jax.devices()[0].platform == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    rows = (256 << 20 if on_cpu else 2 << 30) // (COLUMNS * jnp.dtype(dtype).itemsize)
    matrix = jax.block_until_ready(jax.jit(lambda: jnp.ones((rows, COLUMNS), dtype))())
    vector = jnp.ones(COLUMNS, dtype)
    seconds = min(_best(_total, matrix), _best(_product, matrix, vector))
    return devices * matrix.nbytes / seconds


def _total(matrix: jax.Array) -> jax.Array:
    return jnp.sum(matrix, dtype=jnp.float32)


def _product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return matrix @ vector


def _best(function: Callable[..., jax.Array], *args: jax.Array) -> float:
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*args) for _ in range(IN_FLIGHT)])
        seconds.append((time.perf_counter() - start) / IN_FLIGHT)
    return min(seconds)
