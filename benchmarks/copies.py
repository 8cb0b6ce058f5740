"""What copies of a model bring: python -m benchmarks.copies llama3-8b --random --dp 2

Runs the requests of mix256 on one engine in a process of its own, then as many times the requests as there
are copies on `--dp` of them, and the plain ones on those: tokens per second of each, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.bench import checkpoint, workloads
from lmdeploy_jax.bench.run import run
from lmdeploy_jax.bench.workloads import Job
from lmdeploy_jax.engine.base import EngineBase
from lmdeploy_jax.engine.process.replicas import open_remote


def jobs_of(copies: int) -> list[Job]:
    """Other requests for each copy: alike in their lengths' distribution, without common prefixes."""
    return [job for seed in range(copies) for job in workloads.make("mix256", seed)]


def measure(model: str | Path, dp: int, works: dict[str, int], reps: int) -> dict[str, float]:
    """The best tokens per second of `reps` runs for each work: a name, and how many times mix256 it is."""
    config = JaxEngineConfig(dp=dp, enable_prefix_caching=False, session_len=workloads.MAX_LEN)
    begun = time.perf_counter()
    engine = open_remote(model, config)
    print(json.dumps({"dp": dp, "start_s": round(time.perf_counter() - begun, 1)}), flush=True)
    try:
        run(engine, jobs_of(dp)[:64])  # a warm-up
        return {name: _best(engine, jobs_of(copies), reps) for name, copies in works.items()}
    finally:
        engine.close()


def _best(engine: EngineBase, jobs: list[Job], reps: int) -> float:
    tokens = sum(job.output for job in jobs)
    return max(tokens / run(engine, jobs).wall for _ in range(reps))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dp", type=int, default=2)
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("/tmp/checkpoints"))
    parser.add_argument("--random", action="store_true", help="weights made on the devices, without files")
    args = parser.parse_args()
    make = checkpoint.make_unwritten if args.random else checkpoint.make
    model = make(args.model, args.checkpoint_dir)
    one = measure(model, 1, {"mix256": 1}, args.reps)["mix256"]
    many = measure(model, args.dp, {"copies": args.dp, "mix256": 1}, args.reps)
    figures = {"one": one, f"dp {args.dp}, {args.dp} times": many["copies"], f"dp {args.dp}": many["mix256"]}
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))
    print(f"ratios: {many['copies'] / one:.3f} with {args.dp} times the requests, {many['mix256'] / one:.3f}")


if __name__ == "__main__":
    main()
