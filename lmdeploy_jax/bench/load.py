"""Load on a running server: the jobs of a workload over HTTP, and when each piece of each answer arrived.

Speaks OpenAI's /v1/completions with token ids as prompts: any server of that protocol can be measured.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from lmdeploy_jax.bench.report import distribution
from lmdeploy_jax.bench.workloads import HIGHEST_ID, Job
from lmdeploy_jax.errors import EngineError

CONNECT_SECONDS = 30


@dataclass(frozen=True)
class Arrivals:
    """When requests are sent. `rate` None: at once, else a Poisson process of so many a second (open loop).
    `concurrency` bounds how many run at a time (closed loop).
    """

    rate: float | None = None
    concurrency: int | None = None
    seed: int = 0

    def times(self, count: int) -> list[float]:
        """Seconds after the start, in rising order."""
        if self.rate is None:
            return [0.0] * count
        rng, now, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            times.append(now)
            now += rng.expovariate(self.rate)
        return times


@dataclass
class Answer:
    """One streamed answer. Times are in seconds after the load began.

    What arrives is kept as it is and read at the very end: a client that is busy reading sees the next bytes
    late, and blames the server.
    """

    sent: float
    arrived: list[tuple[float, bytes]] = field(default_factory=list)
    pieces: list[float] = field(default_factory=list)  # when each piece with text arrived
    tokens: int = 0
    error: str | None = None

    def read(self, expected: int) -> None:
        """Take the events in; an answer of other than `expected` tokens is an error."""
        rest = b""
        for when, data in self.arrived:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line, when)
        self.arrived.clear()
        if self.error is None and self.tokens != expected:
            self.error = f"ended with {self.tokens} of {expected} tokens"

    def _take(self, line: bytes, when: float) -> None:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            return
        event = json.loads(line[6:])
        if event.get("error"):
            self.error = event["error"]["message"]
        if event.get("choices"):
            self.pieces.append(when)
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]


@dataclass(frozen=True)
class Target:
    """A server: base URL without /v1, the model's name there and the API key, where it wants one."""

    url: str
    model: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def run(target: Target, jobs: Sequence[Job], arrivals: Arrivals) -> tuple[float, list[Answer]]:
    """Send every job and wait for the last answer: wall seconds and one `Answer` a job.

    Errors of single requests are noted in their answers. Raises EngineError where no server answers.
    """
    with _no_collector():
        return asyncio.run(_run(target, jobs, arrivals))


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector would stop the clock for up to a tenth of a second, as arrivals pile up."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def model_name(url: str, api_key: str | None = None) -> str:
    """The first model that the server lists. Raises EngineError where there is none."""
    return asyncio.run(_model_name(Target(url, "", api_key)))


def ids_below(target: Target) -> int:
    """A bound below which the server's model knows every token id: the work's own, or the largest of its
    halves that is not refused, since nothing in the protocol tells a vocabulary's size.
    """
    return asyncio.run(_ids_below(target))


def summary(jobs: Sequence[Job], wall: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures of one pass: tokens and requests a second; times in milliseconds, with percentiles."""
    good = [a for a in answers if a.error is None and a.pieces]
    figures: dict[str, Any] = {
        "requests": len(jobs),
        "failed": len(answers) - len(good),
        "in_tok": sum(len(job.prompt) for job in jobs),
        "out_tok": sum(a.tokens for a in good),
        "wall_s": round(wall, 4),
        "requests_s": round(len(good) / wall, 3),
        "out_tok_s": round(sum(a.tokens for a in good) / wall, 1),
    }
    if not good:
        return figures
    figures["ttft_ms"] = distribution([a.pieces[0] - a.sent for a in good])
    spans = [(a.pieces[-1] - a.pieces[0]) / (a.tokens - 1) for a in good if a.tokens > 1]
    gaps = [later - earlier for a in good for earlier, later in zip(a.pieces, a.pieces[1:], strict=False)]
    for name, seconds in (("tpot_ms", spans), ("itl_ms", gaps)):
        if seconds:
            figures[name] = distribution(seconds)
    return figures


async def _ids_below(target: Target) -> int:
    bound = HIGHEST_ID
    async with _session(target) as session:
        while bound > 1:
            answer = await _ask(session, target, Job([bound - 1], 1), time.perf_counter())
            if answer.error is None or not answer.error.startswith("400"):
                return bound
            bound //= 2
    return HIGHEST_ID  # something else is refused: the requests of the work will tell what


async def _run(target: Target, jobs: Sequence[Job], arrivals: Arrivals) -> tuple[float, list[Answer]]:
    gate = asyncio.Semaphore(arrivals.concurrency or max(1, len(jobs)))
    start = time.perf_counter()

    async def one(session: aiohttp.ClientSession, job: Job, due: float) -> Answer:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        async with gate:
            return await _ask(session, target, job, start)

    async with _session(target) as session:
        due = arrivals.times(len(jobs))
        answers = await asyncio.gather(*(one(session, job, at) for job, at in zip(jobs, due, strict=True)))
    wall = time.perf_counter() - start
    for job, answer in zip(jobs, answers, strict=True):
        answer.read(job.output)
    return wall, answers


async def _ask(session: aiohttp.ClientSession, target: Target, job: Job, start: float) -> Answer:
    answer = Answer(time.perf_counter() - start)
    body = {
        "model": target.model,
        "prompt": job.prompt,
        "max_tokens": job.output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with session.post(f"{target.url}/v1/completions", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {await response.text()}"
                return answer
            async for data in response.content.iter_any():
                answer.arrived.append((time.perf_counter() - start, data))
    except aiohttp.ClientConnectorError as error:
        raise EngineError(f"No server answers at {target.url}: {error}") from error
    except (TimeoutError, aiohttp.ClientError) as error:
        answer.error = repr(error)
    return answer


def _session(target: Target) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(timeout=timeout, connector=connector, headers=target.headers)


async def _model_name(target: Target) -> str:
    try:
        async with _session(target) as session, session.get(f"{target.url}/v1/models") as response:
            if response.status != 200:
                raise EngineError(f"{target.url}/v1/models: {response.status}: {await response.text()}")
            models = (await response.json())["data"]
    except aiohttp.ClientConnectorError as error:
        raise EngineError(f"No server answers at {target.url}: {error}") from error
    if not models:
        raise EngineError(f"The server at {target.url} lists no model.")
    return str(models[0]["id"])
