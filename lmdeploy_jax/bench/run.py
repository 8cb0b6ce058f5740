"""Run a workload through the engine, token ids in and out, and note when each token arrived."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from lmdeploy_jax.bench.workloads import Job
from lmdeploy_jax.engine.base import EngineBase
from lmdeploy_jax.engine.request import Request, SamplingParams, StepOutput
from lmdeploy_jax.errors import EngineError
from lmdeploy_jax.prompt import EncodedPrompt


@dataclass
class Trace:
    """When the tokens of one request were delivered, in seconds after the batch was submitted."""

    times: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Run:
    """One pass over a workload: its wall time in seconds and a trace for each job."""

    wall: float
    traces: list[Trace]


class _Recorder:
    """Collects the engine's outputs and tells when the last request has ended."""

    def __init__(self, count: int) -> None:
        self.traces = [Trace() for _ in range(count)]
        self.done = threading.Event()
        self._left = count
        self.start = time.perf_counter()

    def listener(self, index: int) -> _Listener:
        return _Listener(self, self.traces[index])

    def finished(self) -> None:
        self._left -= 1
        if not self._left:
            self.done.set()


@dataclass(frozen=True)
class _Listener:
    recorder: _Recorder
    trace: Trace

    def __call__(self, out: StepOutput) -> None:
        now = time.perf_counter() - self.recorder.start
        self.trace.times.extend([now] * len(out.token_ids))
        if out.finish_reason is not None:
            self.trace.finish_reason, self.trace.error = out.finish_reason, out.error
            self.recorder.finished()


def run(engine: EngineBase, jobs: list[Job]) -> Run:
    """Submit every job at once, greedy and without stop ids, and wait for the last token.

    Raises EngineError where a request did not end with exactly the tokens asked for.
    """
    recorder = _Recorder(len(jobs))
    for i, job in enumerate(jobs):
        params = SamplingParams(max_new_tokens=job.output)
        engine.submit(Request(EncodedPrompt(job.prompt), params, recorder.listener(i), streams=False))
    recorder.done.wait()
    wall = time.perf_counter() - recorder.start
    for i, (job, trace) in enumerate(zip(jobs, recorder.traces, strict=True)):
        if len(trace.times) != job.output:
            raise EngineError(
                f"request {i} ended with {len(trace.times)} of {job.output} tokens "
                f"(finish reason {trace.finish_reason}, error {trace.error!r})"
            )
    return Run(wall, recorder.traces)
