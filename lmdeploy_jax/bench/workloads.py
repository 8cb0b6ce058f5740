"""Fixed work: the same prompts (token ids) and output lengths for every engine and machine.

`random.Random` is stable across Python versions. Ids lie in [300, 30000): valid for every shape in
`configs/models` and never a special token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LOWEST_ID, HIGHEST_ID = 300, 30000
MAX_LEN = 2048  # longest sequence of any workload, with room to spare

Length = int | tuple[int, int]  # one length, or the bounds of a clipped log-normal


@dataclass(frozen=True)
class Workload:
    """How many requests, and their prompt and output lengths in tokens."""

    requests: int
    prompt: Length
    output: Length


@dataclass(frozen=True)
class Job:
    """One request of a workload."""

    prompt: list[int]
    output: int


WORKLOADS = {
    "b1": Workload(1, 128, 256),
    "b32": Workload(32, 512, 256),
    "b128": Workload(128, 512, 256),
    "mix256": Workload(256, (32, 1024), (32, 512)),
    "smoke": Workload(4, 32, 8),
}


def make(name: str, seed: int = 0) -> list[Job]:
    """The requests of workload `name`. Clipped log-normal lengths follow the long tail of real chats."""
    work = WORKLOADS[name]
    rng = random.Random(f"{name}/{seed}")
    prompts = _lengths(rng, work.requests, work.prompt, mu=5.3, sigma=1.0)  # median about 200, mean 300
    outputs = _lengths(rng, work.requests, work.output, mu=5.2, sigma=0.8)  # median about 180, mean 220
    return [
        Job([rng.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(length)], output)
        for length, output in zip(prompts, outputs, strict=True)
    ]


def _lengths(rng: random.Random, count: int, spec: Length, mu: float, sigma: float) -> list[int]:
    if isinstance(spec, int):
        return [spec] * count
    low, high = spec
    return [min(high, max(low, int(rng.lognormvariate(mu, sigma)))) for _ in range(count)]
