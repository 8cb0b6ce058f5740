"""Where a step's time goes on a GPU: python -m benchmarks.step_profile llama3-8b --requests 1,32,128

Traces running decode steps with JAX's profiler and prints for each batch size the time a step, the share of
it in which the GPU ran anything, and its kernels by total time: launches and microseconds a step. `--prefill`
does the same for the prompts of that many requests, from the first to the last of them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax

from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.bench import checkpoint, shapes
from lmdeploy_jax.bench.gpu_trace import Event, traced
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.request import Request, SamplingParams, StepOutput
from lmdeploy_jax.prompt import EncodedPrompt

SETTLING = 60  # tokens that every sequence has before the trace begins
TRACED = 0.2  # seconds


class Load:
    """Requests that count their tokens."""

    def __init__(self, engine: Engine, requests: int, prompt: int, output: int) -> None:
        rng, params = random.Random(0), SamplingParams(max_new_tokens=output)
        self.given = [0] * requests
        self._engine = engine
        prompts = [[rng.randrange(300, 2000) for _ in range(prompt)] for _ in range(requests)]
        self._requests = [
            Request(EncodedPrompt(ids), params, self._counter(i)) for i, ids in enumerate(prompts)
        ]

    def _counter(self, index: int) -> Callable[[StepOutput], None]:
        def count(out: StepOutput) -> None:
            self.given[index] += len(out.token_ids)

        return count

    def start(self) -> None:
        for request in self._requests:
            self._engine.submit(request)

    def wait(self, tokens: int) -> None:
        while min(self.given) < tokens:
            time.sleep(0.0005)

    def stop(self) -> None:
        for request in self._requests:
            self._engine.abort(request.request_id)


def trace_decode(engine: Engine, requests: int, prompt: int) -> tuple[list[Event], float]:
    """GPU events of a stretch of decode steps, and the mean seconds of a step in it."""
    load = Load(engine, requests, prompt, engine.session_len - prompt)
    load.start()
    load.wait(SETTLING)
    with traced() as events:
        before, begun = sum(load.given), time.perf_counter()
        time.sleep(TRACED)
        steps, seconds = (sum(load.given) - before) / requests, time.perf_counter() - begun
    load.stop()
    return events, seconds / max(steps, 1)


def trace_prefill(engine: Engine, requests: int, prompt: int) -> tuple[list[Event], float]:
    """GPU events of the prefill of all prompts, and its seconds."""
    load = Load(engine, requests, prompt, 1)
    with traced() as events:
        begun = time.perf_counter()
        load.start()
        load.wait(1)
        seconds = time.perf_counter() - begun
    return events, seconds


def busy(events: list[Event]) -> tuple[float, float]:
    """Seconds in which anything ran, and from the first start to the last end."""
    ran, end = 0.0, events[0]["ts"]
    for event in events:
        stop = event["ts"] + event["dur"]
        ran += max(stop - max(event["ts"], end), 0.0)
        end = max(end, stop)
    return ran / 1e6, (end - events[0]["ts"]) / 1e6


def report(events: list[Event], step: float, rows: int) -> None:
    groups: dict[str, list[float]] = defaultdict(list)
    for event in events:
        groups[event["name"]].append(event["dur"])
    """Prints them; with several GPUs, sums over all of them and the time in which any was busy."""
    ran, span = busy(events)
    steps = span / step
    print(f"{1e3 * step:.3f} ms a step, GPU busy {ran / span:.1%}, {len(events) / steps:.0f} kernels a step")
    for name, times in sorted(groups.items(), key=lambda item: -sum(item[1]))[:rows]:
        count, median = len(times) / steps, sorted(times)[len(times) // 2]
        print(f"{sum(times) / 1e6 / ran:6.1%} {count:7.1f} x {median:8.2f} us  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help=f"a checkpoint, or a shape: {', '.join(shapes.names())}")
    parser.add_argument("--checkpoint_dir", default="/tmp/checkpoints")
    parser.add_argument("--requests", default="1,128")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode_steps", type=int, default=1)
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--max_batch_size", type=int, default=None)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("step_profile reads the trace of an NVIDIA GPU, and JAX sees none here")
    folder = args.model
    if folder in shapes.names():
        folder = checkpoint.make(folder, Path(args.checkpoint_dir))
    config = JaxEngineConfig(
        session_len=2048,
        enable_prefix_caching=False,
        decode_steps=args.decode_steps,
        eager_mode=True,
        tp=args.tp,
        max_batch_size=args.max_batch_size,
    )
    engine = Engine(folder, config, progress=False)
    trace = trace_prefill if args.prefill else trace_decode
    try:
        for requests in map(int, args.requests.split(",")):
            trace(engine, requests, args.prompt)  # compiles
            print(f"{args.model}, {requests} sequences of {args.prompt} tokens:", end=" ")
            report(*trace(engine, requests, args.prompt), args.rows)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
