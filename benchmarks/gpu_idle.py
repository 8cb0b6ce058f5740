"""How much of a decode step the GPU waits for the host: python -m benchmarks.gpu_idle llama3-8b

Times a step of `--requests` sequences as the engine does it, and then the same program over the same inputs,
called again and again by a loop that does nothing else. What the second saves is what the host costs. They
take turns, since a GPU at its power limit slows down as it warms up. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.bench import checkpoint, shapes
from lmdeploy_jax.engine.core.engine import STEPS_IN_FLIGHT, Engine
from lmdeploy_jax.engine.request import Request, SamplingParams, StepOutput
from lmdeploy_jax.prompt import EncodedPrompt

SETTLING = 32  # tokens that every sequence has before the clock starts
TURNS = 5


class Sequence:
    """A running sequence that remembers when its tokens came."""

    def __init__(self, prompt: list[int], output: int) -> None:
        self.times: list[float] = []
        self.request = Request(
            EncodedPrompt(prompt), SamplingParams(max_new_tokens=output), self._note, streams=False
        )

    def _note(self, out: StepOutput) -> None:
        self.times += [time.perf_counter()] * len(out.token_ids)


class Steps:
    """Keeps the inputs of an engine's greedy decode steps, and runs them again without the engine."""

    def __init__(self, engine: Engine, requests: int) -> None:
        self._put = engine._runner.state.put
        self._program = engine._runner._steps._drawing.fit(requests)
        self._inputs: list[np.ndarray] = []
        self._pack = self._program.layout.pack
        self._program.layout.pack = self._keep

    def _keep(self, *args, **kwargs) -> np.ndarray:
        self._inputs.append(self._pack(*args, **kwargs))
        return self._inputs[-1]

    def forget(self) -> None:
        self._inputs.clear()

    def again(self) -> float:
        """Mean seconds a step."""
        flight: list[jax.Array] = []
        begun = time.perf_counter()
        for packed in self._inputs:
            flight.append(self._program(packed=self._put(packed)))
            if len(flight) >= STEPS_IN_FLIGHT:
                np.asarray(flight.pop(0))
        jax.block_until_ready(flight)
        return (time.perf_counter() - begun) / len(self._inputs)


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
    settings = {"session_len": 2048, "enable_prefix_caching": False, "eager_mode": True}
    engine = Engine(folder, JaxEngineConfig(decode_steps=1, **settings), progress=False)
    steps, work = Steps(engine, args.requests), (args.requests, args.prompt, args.output)
    try:
        step_seconds(engine, *work)  # compiles
        turns = []
        for _ in range(TURNS):
            steps.forget()
            turns.append((step_seconds(engine, *work), steps.again()))
    finally:
        engine.close()
    ours, alone = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    figures = {"engine_ms": round(1e3 * ours, 3), "alone_ms": round(1e3 * alone, 3)}
    idle = max(0.0, 1 - alone / ours)
    print(json.dumps({"model": args.model, "requests": args.requests, **figures, "idle": round(idle, 4)}))


if __name__ == "__main__":
    main()
