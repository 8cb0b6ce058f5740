"""How much of a decode step the GPU waits for the host: python -m tests.bench.gpu_idle llama3-8b

Times a step of `--requests` sequences as the engine does it, one call a step, and in calls of eight steps
that loop on the device. What the second saves is what the host costs. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.bench import checkpoint, shapes
from lmdeploy_jax.engine.engine import Engine
from lmdeploy_jax.engine.request import Request, SamplingParams, StepOutput

SETTLING = 32  # tokens that every sequence has before the clock starts


class Sequence:
    """A running sequence that remembers when its tokens came."""

    def __init__(self, prompt: list[int], output: int) -> None:
        self.times: list[float] = []
        self.request = Request(prompt, SamplingParams(max_new_tokens=output), self._note)

    def _note(self, out: StepOutput) -> None:
        self.times += [time.perf_counter()] * len(out.token_ids)


def step_seconds(engine: Engine, requests: int, prompt: int, output: int) -> float:
    """Mean seconds a step while all sequences run."""
    rng = random.Random(0)
    sequences = [Sequence([rng.randrange(300, 2000) for _ in range(prompt)], output) for _ in range(requests)]
    for sequence in sequences:
        engine.submit(sequence.request)
    while min(len(sequence.times) for sequence in sequences) < output:
        time.sleep(0.001)
    begin = max(sequence.times[SETTLING] for sequence in sequences)
    end = min(sequence.times[-1] for sequence in sequences)
    return (end - begin) / len([t for t in sequences[0].times if begin < t <= end])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help=f"a checkpoint, or a shape: {', '.join(shapes.names())}")
    parser.add_argument("--checkpoint_dir", default="/tmp/checkpoints")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=225)
    args = parser.parse_args()
    folder = args.model
    if folder in shapes.names():
        folder = checkpoint.make(folder, Path(args.checkpoint_dir))
    found = {}
    for steps in (1, 8):
        settings = {"session_len": 2048, "enable_prefix_caching": False, "eager_mode": True}
        engine = Engine(folder, JaxEngineConfig(decode_steps=steps, **settings), progress=False)
        try:
            work = (args.requests, args.prompt, args.output)
            step_seconds(engine, *work)  # compiles
            found[steps] = min(step_seconds(engine, *work) for _ in range(3))
        finally:
            engine.close()
    figures = {f"step_ms_{steps}": round(1e3 * seconds, 3) for steps, seconds in found.items()}
    idle = max(0.0, 1 - found[8] / found[1])
    print(json.dumps({"model": args.model, "requests": args.requests, **figures, "idle": round(idle, 4)}))


if __name__ == "__main__":
    main()
