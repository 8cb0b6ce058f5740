"""The kernels of a tower's layer by candidates, on an H200: python -m benchmarks.encoder_kernels

InternViT-300M's layer (1,024 wide, 16 heads of 64, MLP of 4,096) over tiles of 1,025 patches, bfloat16. Each
candidate is first compared with `xla.py` in float32; then a line gives its relative error, the time of its
kernels by the profiler, and the arithmetic's speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lmdeploy_jax.bench.gpu_trace import traced
from lmdeploy_jax.engine.core.compile import use_cache
from lmdeploy_jax.pallas_kernels.encoder_attention import mosaic, pallas
from lmdeploy_jax.pallas_kernels.encoder_attention import xla as attention_xla
from lmdeploy_jax.pallas_kernels.fused_dense import RowNorm, fused_dense, gelu
from lmdeploy_jax.pallas_kernels.fused_dense import mosaic as dense_mosaic

PATCHES, PADDED, HEADS, SIZE, WIDTH, INNER = 1025, 1032, 16, 64, 1024, 4096
CALLS, EPS = 8, 1e-6
ATTENTION = [mosaic.Tuning(*cut) for cut in ((3, 128, 4), (2, 128, 4), (4, 64, 6))]
DENSE = (256, 224, 192, 160, 128)  # outputs of a tile
NO_TRITON = {"xla_gpu_enable_triton_gemm": False}  # so that residuals are cuBLASLt's


@dataclass(frozen=True)
class Shape:
    """A product of the layer, and what is done to its rows before and to its result."""

    outputs: int
    columns: int
    activation: Callable[..., jax.Array] | None = None
    normed: bool = False
    adds: bool = False


PRODUCTS = {
    "qkv": Shape(3 * WIDTH, WIDTH, normed=True),
    "out": Shape(WIDTH, WIDTH, adds=True),
    "fc1": Shape(INNER, WIDTH, gelu),
    "fc1_normed": Shape(INNER, WIDTH, gelu, normed=True),
    "fc2": Shape(WIDTH, INNER, adds=True),
}


@dataclass(frozen=True)
class Candidate:
    """A way of doing something, what it is done to, and what should come out."""

    name: str
    call: Callable[..., jax.Array]
    arguments: tuple[jax.Array | None, ...]
    wanted: jax.Array
    flops: float
    compiler_options: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        try:
            run = jax.jit(self.call).lower(*self.arguments).compile(self.compiler_options)
            got = run(*self.arguments)[:, : self.wanted.shape[1]].astype(jnp.float32)
        except Exception as error:
            return f"{self.name:<64} {error!r:.150}"
        error = float(jnp.linalg.norm(got - self.wanted) / jnp.linalg.norm(self.wanted))
        most = float(jnp.max(jnp.abs(got - self.wanted)) / jnp.max(jnp.abs(self.wanted)))
        with traced() as events:
            for _ in range(CALLS):
                out = run(*self.arguments)
            jax.block_until_ready(out)
        us = sum(event["dur"] for event in events) / CALLS
        rate = self.flops / us / 1e6
        return f"{self.name:<64} error {error:.1e} most {most:.1e} {us:8.1f} us {rate:6.0f} TFLOP/s"


def attention(tiles: int) -> Iterator[Candidate]:
    qkv = jax.random.normal(jax.random.key(0), (tiles, PADDED, 3, HEADS, SIZE), "bfloat16")
    real = qkv[:, :PATCHES]
    each = partial(attention_xla.encoder_attention, segments=None)
    wanted = jnp.concatenate([jax.jit(each)(real[i : i + 1].astype("float32")) for i in range(tiles)])
    flops = 4.0 * tiles * HEADS * PATCHES**2 * SIZE
    name = f"attention, {tiles} tiles, "
    call = partial(pallas.encoder_attention, segments=None, interpret=False)
    yield Candidate(name + "Triton", call, (real,), wanted, flops)
    for cut in ATTENTION:
        call = partial(mosaic.encoder_attention, count=PATCHES, tuning=cut)
        short = f"{cut.groups} x 64, {cut.keys} keys, {cut.num_stages} stages"
        yield Candidate(name + short, call, (qkv,), wanted, flops)


def product(name: str, rows: int) -> Iterator[Candidate]:
    """Of rows with a mean and two channels that stand out."""
    shape, keys = PRODUCTS[name], iter(range(9))
    draw = lambda *dims: jax.random.normal(jax.random.key(next(keys)), dims, "bfloat16")  # noqa: E731
    x = (draw(rows, shape.columns) + 0.5).at[:, jnp.array([5, 77])].multiply(30)
    weight, bias = draw(shape.outputs, shape.columns) / shape.columns**0.5, draw(shape.outputs)
    sums = weight.astype("float32").sum(axis=1) if shape.normed else None
    residual = draw(rows, shape.outputs) if shape.adds else None
    arguments = x, weight, bias, sums, residual

    def call(fuse: Callable[..., jax.Array], activation: Any, **how: Any) -> Callable[..., jax.Array]:
        def run(x: Any, weight: Any, bias: Any, sums: Any, residual: Any) -> jax.Array:
            norm = None if sums is None else RowNorm(EPS, sums)
            return fuse(x, weight, bias, activation=activation, norm=norm, residual=residual, **how)

        return run

    exact = None if shape.activation is None else partial(jax.nn.gelu, approximate=False)
    with jax.default_matmul_precision("float32"):
        wide = [None if part is None else part.astype("float32") for part in arguments]
        wanted = jax.jit(call(fused_dense, exact, backend="xla"))(*wide)
    flops, title = 2.0 * rows * shape.outputs * shape.columns, f"{name}, {rows} rows, "
    for way, options in (("XLA", {}), ("XLA without Triton's products", NO_TRITON)):
        yield Candidate(title + way, call(apart, shape.activation), arguments, wanted, flops, options)
    best = dense_mosaic.fitted(rows, shape.outputs).outputs
    for width in DENSE:
        each = call(dense_mosaic.fused_dense, shape.activation, tuning=dense_mosaic.Tuning(width))
        way = f"{width} outputs" + (", as fitted" if width == best else "")
        yield Candidate(title + way, each, arguments, wanted, flops)


def apart(x: Any, weight: Any, bias: Any, activation: Any, norm: RowNorm | None, residual: Any) -> jax.Array:
    """As the tower's layers do it where nothing is fused."""
    if norm is not None:
        centred = x.astype(jnp.float32) - x.astype(jnp.float32).mean(axis=1, keepdims=True)
        x = (centred * jax.lax.rsqrt((centred**2).mean(axis=1, keepdims=True) + norm.eps)).astype(x.dtype)
    y = jnp.einsum("tk,nk->tn", x, weight) + bias
    y = y if activation is None else activation(y.astype(jnp.float32)).astype(y.dtype)
    return y if residual is None else residual + y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", default="13,1")
    parser.add_argument("--pieces", default="attention,qkv,fc1,fc1_normed,out,fc2")
    args = parser.parse_args()
    use_cache(None)
    for tiles in map(int, args.tiles.split(",")):
        for piece in args.pieces.split(","):
            for candidate in attention(tiles) if piece == "attention" else product(piece, tiles * PADDED):
                print(candidate.line(), flush=True)


if __name__ == "__main__":
    main()
