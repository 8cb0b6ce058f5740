"""Do new prompts hold running answers up? python -m benchmarks.steady_arrivals llama3-8b --running 1,32,128

Times between the tokens of running sequences, first undisturbed, then while prompts of `--prompt` tokens
arrive every `--every` seconds. Prints one JSON line for each number of running sequences.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from pathlib import Path

from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.bench import checkpoint, shapes
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.request import Request, SamplingParams, StepOutput
from lmdeploy_jax.prompt import EncodedPrompt

SETTLING = 20  # tokens that every running sequence has before anything is timed
Prompt = list[int]


class Runner:
    """A sequence that runs for as long as it may; remembers when its tokens came."""

    def __init__(self, engine: Engine, prompt: Prompt) -> None:
        self.times: list[float] = []
        params = SamplingParams(max_new_tokens=engine.session_len - len(prompt))
        self.request = Request(EncodedPrompt(prompt), params, self._note)
        engine.submit(self.request)

    def _note(self, out: StepOutput) -> None:
        self.times += [time.perf_counter()] * len(out.token_ids)

    def gaps(self, begin: float, end: float) -> list[float]:
        times = [t for t in self.times if begin <= t <= end]
        return [b - a for a, b in itertools.pairwise(times)]


def measure(engine: Engine, running: int, prompt: int, every: float, seconds: float) -> dict[str, float]:
    rng = random.Random(0)

    def draw(length: int) -> Prompt:
        return [rng.randrange(300, 2000) for _ in range(length)]

    runners = [Runner(engine, draw(64)) for _ in range(running)]
    while min(len(runner.times) for runner in runners) < SETTLING:
        time.sleep(0.001)
    quiet_from = time.perf_counter()
    time.sleep(seconds)
    busy_from = time.perf_counter()
    for i in range(int(seconds / every)):
        engine.submit(
            Request(EncodedPrompt(draw(prompt)), SamplingParams(max_new_tokens=1), lambda out: None)
        )
        time.sleep(max(busy_from + (i + 1) * every - time.perf_counter(), 0))
    end = time.perf_counter()
    for runner in runners:
        engine.abort(runner.request.request_id)
    quiet = sorted(gap for runner in runners for gap in runner.gaps(quiet_from, busy_from))
    busy = sorted(gap for runner in runners for gap in runner.gaps(busy_from, end))
    median = statistics.median(quiet)
    return {
        "running": running,
        "quiet_ms": 1e3 * median,
        "mean_ratio": statistics.fmean(busy) / median,
        "p99_ratio": busy[int(0.99 * len(busy))] / median,
        "max_ratio": busy[-1] / median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help=f"a checkpoint, or a shape: {', '.join(shapes.names())}")
    parser.add_argument("--checkpoint_dir", default="/tmp/checkpoints")
    parser.add_argument("--running", default="1,32,128")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--every", type=float, default=0.2, help="seconds")
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    folder = args.model
    if folder in shapes.names():
        folder = checkpoint.make(folder, Path(args.checkpoint_dir))
    config = JaxEngineConfig(session_len=2048, enable_prefix_caching=False)
    engine = Engine(folder, config, progress=False)
    try:
        for running in map(int, args.running.split(",")):
            measure(engine, running, args.prompt, args.every, 0.5)
            found = measure(engine, running, args.prompt, args.every, args.seconds)
            figures = {name: round(value, 2) for name, value in found.items()}
            print(json.dumps({"model": args.model, "prompt": args.prompt, "every_s": args.every} | figures))
    finally:
        engine.close()


if __name__ == "__main__":
    main()
