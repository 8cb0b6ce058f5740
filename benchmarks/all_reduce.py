"""Sums over GPUs by the project's kernel, beside XLA's: python -m benchmarks.all_reduce

First what a chain of sums gives, bit by bit, on all devices and again and again, with devices that come late;
then microseconds a sum with its residual addition and norm, within one CUDA graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmdeploy_jax.pallas_kernels.all_reduce_norm import all_reduce_add_rms_norm
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm
from lmdeploy_jax.parallel.collectives import TensorParallel
from lmdeploy_jax.parallel.mesh import make_mesh
from lmdeploy_jax.parallel.peers import PeerMemory

CHAIN = 64  # sums in a program, as many as a step of 32 layers has
KINDS = 4  # different arrays that are summed by turns
EVERYWHERE, CUT = PartitionSpec(), PartitionSpec("tp")


@cache
def chain(mesh: Mesh, how: str, skewed: bool = False) -> Callable[..., Any]:
    """x [T, E] of every device after CHAIN sums -> [n, T, E], and of the last norm, as `how` does them."""
    collectives = TensorParallel()

    def one(x: Array, parts: Array, weight: Array, peers: Array) -> tuple[Array, Array]:
        if how == "peers":
            options: dict[str, Any] = {"axis": "tp", "eps": 1e-5, "backend": "pallas"}
            return all_reduce_add_rms_norm(x, parts, weight, peers, **options)
        if how == "xla":  # as a step does without peers
            total = collectives.all_reduce(parts, x.dtype)
            return add_rms_norm(x, total, weight, eps=1e-5, backend="pallas")
        options = {"axis": "tp", "eps": 1e-5, "backend": "xla"}
        return all_reduce_add_rms_norm(x, parts, weight, peers, **options)

    def local(
        x: Array, kinds: tuple[Array, ...], weight: Array, peers: Array, late: Array
    ) -> tuple[Array, Array]:
        x = x + busy(late[0], x.dtype) if skewed else x
        normed = x
        for i in range(CHAIN):
            # XLA would add up all kinds at once, before the chain.
            x, parts = lax.optimization_barrier((x, kinds[i % KINDS][0]))
            x, normed = one(x, parts, weight, peers)
        return x[None], normed[None]

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(EVERYWHERE, CUT, EVERYWHERE, CUT, CUT),
        out_specs=(CUT, CUT),
        check_vma=False,
    )
    return jax.jit(mapped)


def busy(rounds: Array, dtype: jnp.dtype) -> Array:
    """Zero, after as many rounds of work."""
    work = lax.fori_loop(0, rounds, lambda _, x: jnp.sin(x) * 0.5, jnp.ones((1 << 12,), jnp.float32))
    return jnp.where(work.sum() > 1e9, 1, 0).astype(dtype)


class Case:
    """Rows of `size` elements in so many parts, on the mesh's devices."""

    def __init__(self, mesh: Mesh, rows: int, size: int, splits: int, memory: PeerMemory) -> None:
        random, count = np.random.default_rng(rows), mesh.shape["tp"]
        dtype = jnp.float32 if splits > 1 else jnp.bfloat16
        self.mesh, self.name, self.cut = mesh, f"{rows} rows, {splits} parts", NamedSharding(mesh, CUT)
        everywhere = NamedSharding(mesh, EVERYWHERE)
        shape = (count, splits, rows, size)  # of small integers, so that no rounding hides what is wrong
        half = [random.integers(-1, 2, shape).astype(np.float32) for _ in range(KINDS // 2)]
        parts = [*half, *(-part for part in half)]
        self.kinds = tuple(jax.device_put(part.astype(dtype), self.cut) for part in parts)
        self.x = jax.device_put(jnp.asarray(random.integers(-9, 9, (rows, size)), jnp.bfloat16), everywhere)
        self.weight = jax.device_put(jnp.ones((size,), jnp.bfloat16), everywhere)
        self.table = memory.table

    def arguments(self, late: Any = 0) -> tuple[Any, ...]:
        rounds = np.broadcast_to(np.asarray(late, np.int32), (self.mesh.shape["tp"],))
        return self.x, self.kinds, self.weight, self.table, jax.device_put(rounds, self.cut)


def check(case: Case, runs: int, skew: int) -> str:
    """Every run gives the same bits on every device, those of XLA's sum."""
    random, oracle = np.random.default_rng(1), chain(case.mesh, "oracle")
    peers = chain(case.mesh, "peers", skew > 0)
    want, wanted_norm = (np.asarray(a, np.float32) for a in oracle(*case.arguments()))
    got, norm = (np.asarray(a) for a in peers(*case.arguments()))
    assert (got == got[:1]).all(), f"{case.name}: devices differ"
    assert (norm == norm[:1]).all(), f"{case.name}: devices' norms differ"
    off = np.abs(got.astype(np.float32) - want).max()
    assert off == 0, f"{case.name}: off by {off}"
    norm_off = np.abs(norm.astype(np.float32) - wanted_norm).max()
    assert norm_off < 0.05, f"{case.name}: the norm is off by {norm_off}"
    alike = jax.jit(lambda a, b: (a == b).all((1, 2)))  # which needs no other device
    first, same = peers(*case.arguments())[0], []
    for _ in range(runs):
        late = random.integers(0, skew, case.mesh.shape["tp"]) if skew else 0
        same.append(alike(peers(*case.arguments(late))[0], first))
    assert np.all(jax.device_get(same)), f"{case.name}: runs differ"
    return (
        f"{case.name}: {(runs + 2) * CHAIN} sums right and alike on all devices; norms within {norm_off:.3g}"
    )


def microseconds(case: Case, how: str, runs: int = 30) -> float:
    """A sum of the chain; the shortest of three tries."""
    call, arguments = chain(case.mesh, how), case.arguments()
    jax.block_until_ready(call(*arguments))
    tries = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(runs):
            out = call(*arguments)
        jax.block_until_ready(out)
        tries.append((time.perf_counter() - begun) / runs / CHAIN * 1e6)
    return min(tries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--runs", type=int, default=1600, help="of a chain, with random skew")
    options = parser.parse_args()
    mesh = make_mesh(options.tp)
    memory = PeerMemory.allocate(mesh, options.size, jnp.bfloat16)
    make = partial(Case, mesh, size=options.size, memory=memory)
    case = make(options.rows[0], splits=4)
    say(check(case, options.runs, 100))
    for rows in options.rows:
        case = make(rows, splits=4 if rows <= 32 else 1)
        say(check(case, 20, 0))
        times = [microseconds(case, how) for how in ("peers", "xla")]
        say(f"{case.name}, {rows * options.size * 2 >> 10} KiB: {times[0]:.2f} us, XLA's {times[1]:.2f}")
    case = make(options.rows[0], splits=4)
    late = [0, 100_000] + [0] * (options.tp - 2)
    begun = time.perf_counter()
    jax.block_until_ready(chain(mesh, "peers", True)(*case.arguments(late)))
    say(f"a device that was {time.perf_counter() - begun:.1f} s late was waited for")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
