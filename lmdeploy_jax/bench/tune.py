"""Which cut of a skinny product is fastest on this GPU, and whether any beats XLA's own product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lmdeploy_jax.bench.device_time import Case, device_seconds, require_gpu
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig
from lmdeploy_jax.models.products import dense_product
from lmdeploy_jax.models.tuning import Kind, Measurement, Tuning
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm
from lmdeploy_jax.pallas_kernels.skinny_gemm import (
    StreamTiling,
    Tiling,
    gated_skinny_gemm,
    norm_skinny_gemm,
    skinny_gemm,
    unscaled_norm_skinny_gemm,
)
from lmdeploy_jax.parallel.collectives import ONE_SHOT_BYTES

TOKENS = (1, 8, 32, 64, 128, 192, 256)
FORMAT = "w16a16"
BEYOND_CACHE = 300 << 20  # bytes of weights that no GPU's cache keeps
PROGRAMS = (60, 1100)  # of a grid worth trying
PART_RATE = 3e12  # bytes a second at which the next kernel reads parts, about
EPS = 1e-5
LINK_RATE = 3e11  # bytes a second between two GPUs, about
SUM_LAUNCH = 2e-6  # seconds of a kernel that adds parts up before devices sum them, outside of a CUDA graph
LAUNCH = 8.5e-7  # seconds that one kernel launch less saves, as whole decode steps show
MOSAIC = 1e-6  # seconds that a call costs in a CUDA graph beyond its kernel, from whole decode steps
BLOCKS = (  # outputs and inner elements of a tile, warps, stages
    (32, 128, 4, 4),
    (64, 64, 4, 4),
    (64, 64, 4, 6),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (128, 64, 8, 4),
)
SPLITS = (1, 2, 3, 4, 5, 7, 8, 9)
NORM_BLOCKS = (  # also for products with a norm: more programs, or more stages
    *BLOCKS,
    (16, 128, 4, 6),
    (16, 256, 4, 5),
    (32, 64, 4, 8),
    (32, 128, 4, 6),
    (32, 128, 4, 8),
    (32, 256, 4, 4),
    (64, 128, 4, 6),
    (64, 256, 4, 3),
    (128, 128, 8, 3),
)
DELTA_PARTS = 4  # parts in which the product before leaves its result, typically
STREAMED = (64, 128)  # outputs of a tile
Candidate = Tiling | StreamTiling | None  # None: XLA's own


@dataclass(frozen=True)
class Shape:
    """A product of a layer, as one device does it. `kind` as in `models.tuning.Measurement`.

    summed: whether its result is summed over devices by XLA, which reads no parts.
    after_norm: whether it reads what a norm gives.
    """

    out: int
    inner: int
    kind: Kind
    summed: bool = False
    after_norm: bool = True

    @property
    def weight(self) -> tuple[int, ...]:
        return (2, self.out, self.inner) if self.product == "gated" else (self.out, self.inner)

    @property
    def product(self) -> Kind:
        """The kind of the product alone."""
        alone: dict[Kind, Kind] = {"norm_parts": "parts", "norm_gated": "gated"}
        return alone.get(self.kind, self.kind)

    @property
    def normed(self) -> bool:
        return self.kind != self.product


def products(config: DecoderConfig, tp: int = 1, *, peers: bool = False) -> dict[str, Shape]:
    """The products of a decode step of layers alike, each with one device's share of the weight; those with a
    norm after the same ones without. `peers`: a kernel sums over devices, see `Tuning.all_reduce`, with the
    norm that follows. Raises ConfigError where the model cannot be cut over `tp` devices.
    """
    layer, hidden, in_kernel = config.layers[0], config.hidden_size, tp > 1 and peers
    summed = tp > 1 and not in_kernel
    if not isinstance(layer.mixer, AttentionConfig):
        kind = layer.mixer or "a layer without attention"
        raise ConfigError(f"the products of {kind} are XLA's: there is nothing to tune for them")
    kv_heads = layer.mixer.held_kv_heads(tp)
    group, kv_heads = layer.mixer.heads // kv_heads, kv_heads // tp
    qkv, heads = (kv_heads * rows * layer.mixer.head_dim for rows in (group + 2, group))
    plain = {
        "qkv": Shape(qkv, hidden, "parts"),
        "o": Shape(hidden, heads, "parts", summed=summed, after_norm=False),
        "head": Shape(-(-config.vocab_size // tp), hidden, "whole", after_norm=False),
    }
    if layer.pre_norm and not in_kernel:
        plain["norm_qkv"] = Shape(qkv, hidden, "norm_parts")
    return plain | _mlp_products(layer, hidden, tp, summed=summed, normed="norm_qkv" in plain)


def _mlp_products(
    layer: LayerConfig, hidden: int, tp: int, *, summed: bool, normed: bool
) -> dict[str, Shape]:
    """Those of a mixture are grouped, and not measured here."""
    if not isinstance(layer.mlp, MlpConfig):
        return {}
    if layer.mlp.width % tp:
        raise ConfigError(
            f"tp={tp} does not divide the MLP's width of {layer.mlp.width}; choose one that does"
        )
    inner = layer.mlp.width // tp
    found = {
        "gate_up": Shape(inner, hidden, "gated"),
        "down": Shape(hidden, inner, "parts", summed=summed, after_norm=False),
    }
    return found | ({"norm_gate_up": Shape(inner, hidden, "norm_gated")} if normed else {})


def tune(shape: Shape, known: Tuning) -> list[Measurement]:
    """The fastest candidate for each number of tokens, in bfloat16. Raises ConfigError where there is no GPU.

    `known` says how a product that follows its norm would be done by itself.
    """
    return fastest(FORMAT, shape, measure(shape, known))


def fastest(name: str, shape: Shape, measured: dict[int, dict[Candidate, float | None]]) -> list[Measurement]:
    """The best of each number of tokens, with a weight in the format `name`."""
    found = []
    for tokens, candidates in measured.items():
        timed = {candidate: seconds for candidate, seconds in candidates.items() if seconds is not None}
        best = min(timed, key=lambda candidate: timed[candidate])
        us, xla_us = (round(1e6 * timed[candidate], 2) for candidate in (best, None))
        found.append(Measurement(name, shape.kind, shape.out, shape.inner, tokens, best, us, xla_us))
    return found


def measure(shape: Shape, known: Tuning) -> dict[int, dict[Candidate, float | None]]:
    """Seconds of each candidate for each number of tokens; None for what does not compile."""
    require_gpu()
    size = 2 * shape.out * shape.inner * (2 if shape.product == "gated" else 1)
    keys = jax.random.split(jax.random.key(0), max(2, -(-BEYOND_CACHE // size)))
    weights = [jax.random.normal(key, shape.weight, jnp.bfloat16) for key in keys]
    each = (1,) if shape.normed else TOKENS
    candidates = [(tokens, candidate) for tokens in each for candidate in [None, *tilings(shape, tokens)]]
    unfused = known.find(FORMAT, shape.product, (shape.out, shape.inner), 1)
    cases = []
    for tokens, candidate in candidates:
        x = jax.random.normal(keys[0], (tokens, shape.inner), jnp.bfloat16)
        cases.append(
            _norm_case(shape, candidate, unfused, x, weights)
            if shape.normed
            else _case(shape, candidate, x, weights)
        )
    measured: dict[int, dict[Candidate, float | None]] = {tokens: {} for tokens in each}
    for (tokens, candidate), seconds in zip(candidates, device_seconds(cases), strict=True):
        if seconds is not None:
            seconds += (
                _extra_norm_seconds(shape, candidate, unfused)
                if shape.normed
                else extra_seconds(shape, candidate, tokens)
            )
        measured[tokens][candidate] = seconds
    return measured


def tilings(shape: Shape, tokens: int) -> Iterator[Tiling | StreamTiling]:
    """Those worth measuring."""
    for block_out, block_in, num_warps, num_stages in NORM_BLOCKS if shape.normed else BLOCKS:
        for splits in SPLITS if shape.product == "parts" else (1,):
            programs = -(-shape.out // block_out) * splits
            crowded = shape.product == "parts" and not PROGRAMS[0] <= programs <= PROGRAMS[1]
            if shape.inner % (splits * block_in) == 0 and not crowded:
                yield Tiling(block_out, block_in, splits, num_warps, num_stages)
    if shape.kind == "gated" and tokens % 8 == 0 and is_hopper():
        cores = getattr(jax.devices()[0], "core_count", 132)
        for block_out in STREAMED:
            tiles = shape.out // block_out
            even = -(-tiles // -(-tiles // cores))  # as few programs as finish in as many rounds
            if shape.out % block_out == 0 and shape.inner % 64 == 0:
                yield from {StreamTiling.deepest(block_out, count, tokens) for count in (cores, even)}


def is_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def _case(shape: Shape, candidate: Candidate, x: jax.Array, weights: list[jax.Array]) -> Case:
    return Case(_function(shape, candidate), [(x, weight) for weight in weights])


def _norm_case(
    shape: Shape, candidate: Candidate, unfused: Candidate, x: jax.Array, weights: list[jax.Array]
) -> Case:
    """Without a tiling the norm is a kernel of its own, and `unfused` is how the product after it is done."""
    delta = jax.random.normal(jax.random.key(1), (DELTA_PARTS, *x.shape), jnp.float32)
    norm = jax.random.normal(jax.random.key(2), x.shape[1:], jnp.bfloat16)
    arguments = [(delta, norm, weight) for weight in weights]
    if candidate is None:
        multiply = _function(shape, unfused)

        def separate(x: jax.Array, delta: jax.Array, norm: jax.Array, weight: jax.Array) -> Any:
            x, normed = add_rms_norm(x, delta, norm, eps=EPS, backend="pallas")
            return x, multiply(normed, weight)

        return Case(separate, arguments, [x.copy()])  # written in place, as in a decode step
    assert isinstance(candidate, Tiling)
    if candidate.splits > 1:
        ways: dict[str, Any] = {"tiling": candidate, "eps": EPS, "backend": "pallas"}
        return Case(partial(unscaled_norm_skinny_gemm, **ways), [(x, *rest) for rest in arguments])
    gated = shape.product == "gated"
    dtype, activation = (x.dtype, jax.nn.silu) if gated else (jnp.float32, None)
    return Case(
        partial(
            norm_skinny_gemm,
            tiling=candidate,
            activation=activation,
            eps=EPS,
            out_dtype=dtype,
            backend="pallas",
        ),
        [(x, *rest) for rest in arguments],
    )


def _function(shape: Shape, candidate: Candidate) -> Callable[..., jax.Array]:
    if shape.product == "gated":
        return _gated(candidate)
    if isinstance(candidate, Tiling):
        return lambda x, weight: skinny_gemm(x, weight, candidate, out_dtype=jnp.float32, backend="pallas")
    dtype = jnp.float32 if shape.product == "whole" else None
    return lambda x, weight: dense_product(x, weight, out_dtype=dtype)


def _gated(candidate: Candidate) -> Callable[..., jax.Array]:
    if candidate is not None:
        return lambda x, w: gated_skinny_gemm(x, w, candidate, activation=jax.nn.silu, backend="pallas")

    def gated(x: jax.Array, weight: jax.Array) -> jax.Array:
        both = dense_product(x, weight)
        return jax.nn.silu(both[:, 0]) * both[:, 1]

    return gated


def extra_seconds(shape: Shape, candidate: Candidate, tokens: int) -> float:
    """Seconds that a candidate costs beside its own kernel: its parts are read by the next kernel or summed
    over devices, its activation is a launch of its own, or Mosaic is called in a CUDA graph.
    """
    mosaic = MOSAIC if isinstance(candidate, StreamTiling) else 0.0
    if shape.product == "gated":
        apart = candidate is None or candidate.splits > 1
        return mosaic + (LAUNCH if apart else 0.0)
    return mosaic + _reading_seconds(shape, candidate, tokens)


def _reading_seconds(shape: Shape, candidate: Candidate, tokens: int) -> float:
    """Of parts, which are f32, instead of one sum of 16 bits."""
    whole = isinstance(candidate, StreamTiling) and candidate.splits == 1
    if shape.product != "parts" or candidate is None or whole:
        return 0.0
    more = tokens * shape.out * (4 * candidate.splits - 2) / PART_RATE  # bytes than those of one sum
    if not shape.summed:
        return more
    size = 4 * candidate.splits * tokens * shape.out
    return size / LINK_RATE if size <= ONE_SHOT_BYTES else more + SUM_LAUNCH


def _extra_norm_seconds(shape: Shape, candidate: Candidate, unfused: Candidate) -> float:
    """The same of a product after its norm, which alone is one launch more."""
    return (
        extra_seconds(shape, unfused, 1) + LAUNCH if candidate is None else extra_seconds(shape, candidate, 1)
    )
