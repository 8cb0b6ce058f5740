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
from collections.abc import Sequence
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


class Arrival:
    """A prompt of which one token is wanted; `first`: seconds until it came."""

    def __init__(self, engine: Engine, prompt: EncodedPrompt) -> None:
        self.first: float | None = None
        self._begun = time.perf_counter()
        engine.submit(Request(prompt, SamplingParams(max_new_tokens=1), self._note))

    def _note(self, out: StepOutput) -> None:
        if self.first is None:
            self.first = time.perf_counter() - self._begun


def drawn(rng: random.Random, length: int) -> Prompt:
    return [rng.randrange(300, 500) for _ in range(length)]


def measure(
    engine: Engine, running: int, arriving: Sequence[EncodedPrompt], every: float, quiet_seconds: float
) -> dict[str, float]:
    """The prompts come one after the other, in intervals of `every` seconds."""
    rng = random.Random(0)
    runners = [Runner(engine, drawn(rng, 64)) for _ in range(running)]
    while min(len(runner.times) for runner in runners) < SETTLING:
        time.sleep(0.001)
    quiet_from = time.perf_counter()
    time.sleep(quiet_seconds)
    busy_from, arrivals = time.perf_counter(), []
    for i, prompt in enumerate(arriving):
        arrivals.append(Arrival(engine, prompt))
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
        "first_ms": 1e3 * statistics.median(each.first or every for each in arrivals),
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
            for seconds in (0.5, args.seconds):
                count = int(seconds / args.every)
                prompts = [EncodedPrompt(drawn(random.Random(i + 1), args.prompt)) for i in range(count)]
                found = measure(engine, running, prompts, args.every, seconds)
            figures = {name: round(value, 2) for name, value in found.items()}
            print(json.dumps({"model": args.model, "prompt": args.prompt, "every_s": args.every} | figures))
    finally:
        engine.close()


if __name__ == "__main__":
    main()
