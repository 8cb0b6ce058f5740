"""From traces to the figures of a benchmark line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lmdeploy_jax.bench.run import Run
from lmdeploy_jax.bench.workloads import Job


def summary(jobs: list[Job], result: Run) -> dict[str, Any]:
    """Throughput (tokens a second), and times to first token and per output token (milliseconds)."""
    prompt_tokens, output_tokens = sum(len(job.prompt) for job in jobs), sum(job.output for job in jobs)
    figures = {
        "requests": len(jobs),
        "in_tok": prompt_tokens,
        "out_tok": output_tokens,
        "wall_s": round(result.wall, 4),
        "out_tok_s": round(output_tokens / result.wall, 1),
        "total_tok_s": round((prompt_tokens + output_tokens) / result.wall, 1),
        "ttft_ms": distribution([trace.times[0] for trace in result.traces]),
    }
    spans = [(t.times[-1] - t.times[0]) / (len(t.times) - 1) for t in result.traces if len(t.times) > 1]
    if spans:
        figures["tpot_ms"] = distribution(spans)
    return figures


def between_tokens(result: Run) -> dict[str, float]:
    """The distribution of the time between one token and the next of the same request, in milliseconds."""
    gaps = [b - a for t in result.traces for a, b in zip(t.times, t.times[1:], strict=False)]
    return distribution(gaps)


def step_seconds(jobs: list[Job], result: Run) -> float | None:
    """Mean time of a decode step where all requests run in lockstep once the last prompt is in; else None."""
    lengths = {job.output for job in jobs}
    if len(lengths) != 1 or lengths == {1}:
        return None
    first = max(trace.times[0] for trace in result.traces)
    last = max(trace.times[-1] for trace in result.traces)
    return (last - first) / (lengths.pop() - 1)


def mean_contexts(jobs: list[Job]) -> list[float]:
    """Tokens of each request, averaged over its decode steps."""
    return [len(job.prompt) + job.output / 2 for job in jobs]


def distribution(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds."""
    ordered = sorted(seconds)
    figures = {"mean": statistics.fmean(ordered)}
    for percent in (50, 90, 99, 100):
        figures[f"p{percent}" if percent < 100 else "max"] = ordered[
            round(percent / 100 * (len(ordered) - 1))
        ]
    return {name: round(1e3 * value, 3) for name, value in figures.items()}
