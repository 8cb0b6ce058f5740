"""Where a decode step's time goes on a GPU: python -m tests.bench.step_profile llama3-8b --requests 1,32,128

Traces running decode steps with JAX's profiler and prints for each batch size the time a step, the share of it
in which the GPU ran anything, and its kernels by total time: launches and microseconds a step.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.bench import checkpoint, shapes
from lmdeploy_jax.engine.engine import Engine
from lmdeploy_jax.engine.request import Request, SamplingParams, StepOutput

SETTLING = 60  # tokens that every sequence has before the trace begins
TRACED = 0.2  # seconds
Event = dict[str, Any]


def gpu_events(folder: Path) -> list[Event]:
    """The complete events on the GPU's streams, of the one trace below `folder`."""
    [path] = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = {(e["pid"], e.get("tid"), e["name"]): e["args"].get("name", "") for e in events if e["ph"] == "M"}
    gpus = {pid for (pid, _, kind), name in named.items() if kind == "process_name" and "GPU" in name}
    streams = {
        (pid, tid)
        for (pid, tid, kind), name in named.items()
        if kind == "thread_name" and pid in gpus and name.startswith("Stream")
    }
    return [e for e in events if e["ph"] == "X" and (e["pid"], e.get("tid")) in streams]


def busy(events: list[Event]) -> tuple[float, float]:
    """Microseconds in which anything ran, and from the first start to the last end."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    ran, end = 0.0, spans[0][0]
    for begin, stop in spans:
        ran += max(stop - max(begin, end), 0.0)
        end = max(end, stop)
    return ran, end - spans[0][0]


def trace(engine: Engine, requests: int, prompt: int) -> tuple[list[Event], float]:
    """GPU events of a stretch of decode steps, and the mean seconds of a step in it."""
    rng = random.Random(0)
    given = [0] * requests

    def counter(index: int) -> Callable[[StepOutput], None]:
        def count(out: StepOutput) -> None:
            given[index] += len(out.token_ids)

        return count

    params = SamplingParams(max_new_tokens=engine.session_len - prompt)
    work = [
        Request([rng.randrange(300, 2000) for _ in range(prompt)], params, counter(i)) for i in range(requests)
    ]
    for request in work:
        engine.submit(request)
    while min(given) < SETTLING:
        time.sleep(0.001)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            before, begun = sum(given), time.perf_counter()
            time.sleep(TRACED)
            steps, seconds = (sum(given) - before) / requests, time.perf_counter() - begun
        for request in work:
            engine.abort(request.request_id)
        return gpu_events(Path(folder)), seconds / max(steps, 1)


def report(events: list[Event], step: float, rows: int) -> None:
    groups: dict[str, list[float]] = defaultdict(list)
    for event in events:
        groups[event["name"]].append(event["dur"])
    ran, span = busy(events)
    steps = span / 1e6 / step
    print(f"{1e3 * step:.3f} ms a step, GPU busy {ran / span:.1%}, {len(events) / steps:.0f} kernels a step")
    for name, times in sorted(groups.items(), key=lambda item: -sum(item[1]))[:rows]:
        count, median = len(times) / steps, sorted(times)[len(times) // 2]
        print(f"{sum(times) / ran:6.1%} {count:7.1f} x {median:8.2f} us  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help=f"a checkpoint, or a shape: {', '.join(shapes.names())}")
    parser.add_argument("--checkpoint_dir", default="/tmp/checkpoints")
    parser.add_argument("--requests", default="1,128")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode_steps", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("step_profile reads the trace of an NVIDIA GPU, and JAX sees none here")
    folder = args.model
    if folder in shapes.names():
        folder = checkpoint.make(folder, Path(args.checkpoint_dir))
    config = JaxEngineConfig(
        session_len=2048, enable_prefix_caching=False, decode_steps=args.decode_steps, eager_mode=True
    )
    engine = Engine(folder, config, progress=False)
    try:
        for requests in map(int, args.requests.split(",")):
            trace(engine, requests, args.prompt)  # compiles
            print(f"{args.model}, {requests} sequences of {args.prompt} tokens:", end=" ")
            report(*trace(engine, requests, args.prompt), args.rows)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
