"""Fixed work: the same prompts (token ids) and output lengths for every engine and machine.

`random.Random` is stable across Python versions. Ids lie in [300, 30000): valid for every shape in
`configs/models` and never a special token. For smaller vocabularies they are folded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LOWEST_ID, HIGHEST_ID = 300, 30000
MAX_LEN = 2048  # longest sequence of any workload but the long ones, with room to spare

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
    "long64": Workload(64, 7744, 256),  # sequences of 8,000 tokens: `--session_len 8192`
}


def make(name: str, seed: int = 0, ids_below: int = HIGHEST_ID) -> list[Job]:
    """The requests of workload `name`. Clipped log-normal lengths follow the long tail of real chats.

    ids_below: the vocabulary's size, where it is smaller than the work's.
    """
    work = WORKLOADS[name]
    rng = random.Random(f"{name}/{seed}")
    prompts = _lengths(rng, work.requests, work.prompt, mu=5.3, sigma=1.0)  # median about 200, mean 300
    outputs = _lengths(rng, work.requests, work.output, mu=5.2, sigma=0.8)  # median about 180, mean 220
    return [
        Job([_folded(rng.randrange(LOWEST_ID, HIGHEST_ID), ids_below) for _ in range(length)], output)
        for length, output in zip(prompts, outputs, strict=True)
    ]


def _folded(token: int, ids_below: int) -> int:
    """`token`, or one of a small vocabulary, of which the first 300 are left out while there are others."""
    if ids_below >= HIGHEST_ID:
        return token
    lowest = min(LOWEST_ID, ids_below // 2)
    return lowest + (token - LOWEST_ID) % (ids_below - lowest)


def _lengths(rng: random.Random, count: int, spec: Length, mu: float, sigma: float) -> list[int]:
    if isinstance(spec, int):
        return [spec] * count
    low, high = spec
    return [min(high, max(low, int(rng.lognormvariate(mu, sigma)))) for _ in range(count)]
