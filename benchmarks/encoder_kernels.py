"""The kernels of a tower's layer by candidates, on an H200: python -m benchmarks.encoder_kernels

InternViT-300M's layer (1,024 wide, 16 heads of 64, MLP of 4,096) over tiles of 1,025 patches, bfloat16. Each
candidate is first compared with `xla.py` in float32; then a line gives its relative error, the time of its
kernels by the profiler, and the arithmetic's speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lmdeploy_jax.bench.gpu_trace import traced
from lmdeploy_jax.engine.core.compile import use_cache
from lmdeploy_jax.pallas_kernels.encoder_attention import mosaic, pallas
from lmdeploy_jax.pallas_kernels.encoder_attention import xla as attention_xla
from lmdeploy_jax.pallas_kernels.fused_dense import fused_dense, gelu
from lmdeploy_jax.pallas_kernels.fused_dense import mosaic as dense_mosaic

PATCHES, PADDED, HEADS, SIZE, WIDTH, INNER = 1025, 1032, 16, 64, 1024, 4096
CALLS = 8
ATTENTION = [mosaic.Tuning(*cut) for cut in ((3, 128, 4), (2, 128, 4), (3, 64, 8), (4, 64, 6))]
DENSE = [dense_mosaic.Tuning(*cut) for cut in ((256, 64, 4), (256, 128, 4), (128, 64, 8))]


@dataclass(frozen=True)
class Candidate:
    """A way of doing something, what it is done to, and what should come out."""

    name: str
    call: Callable[..., jax.Array]
    arguments: tuple[jax.Array | None, ...]
    wanted: jax.Array
    flops: float

    def line(self) -> str:
        try:
            run = jax.jit(self.call).lower(*self.arguments).compile()
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


def fc1(rows: int) -> Iterator[Candidate]:
    """A product with its bias and GELU."""
    keys = iter(range(9))
    draw = lambda *shape: jax.random.normal(jax.random.key(next(keys)), shape, "bfloat16")  # noqa: E731
    arguments = draw(rows, WIDTH), draw(INNER, WIDTH) / WIDTH**0.5, draw(INNER)

    def apart(x: Any, weight: Any, bias: Any, activation: Any) -> Any:
        y = jnp.einsum("tk,nk->tn", x, weight) + bias
        return activation(y.astype(jnp.float32)).astype(y.dtype)

    exact = partial(jax.nn.gelu, approximate=False)
    with jax.default_matmul_precision("float32"):
        wide = [part.astype("float32") for part in arguments]
        wanted = jax.jit(partial(fused_dense, activation=exact, backend="xla"))(*wide)
    erf = lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))  # noqa: E731
    ways = [("XLA", partial(apart, activation=gelu)), ("XLA, erf", partial(apart, activation=erf))]
    for cut in DENSE:
        short = f"{cut.outputs} by {cut.stored}, {cut.num_stages} stages"
        ways.append((short, partial(dense_mosaic.fused_dense, activation=gelu, tuning=cut)))
    for way, call in ways:
        yield Candidate(f"fc1, {rows} rows, {way}", call, arguments, wanted, 2.0 * rows * INNER * WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", default="13,1")
    parser.add_argument("--pieces", default="attention,fc1")
    args = parser.parse_args()
    use_cache(None)
    for tiles in map(int, args.tiles.split(",")):
        for piece in args.pieces.split(","):
            for candidate in attention(tiles) if piece == "attention" else fc1(tiles * PADDED):
                print(candidate.line(), flush=True)


if __name__ == "__main__":
    main()
