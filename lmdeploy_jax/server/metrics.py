"""Prometheus metrics: LMDeploy's, under a prefix of their own, and what was compiled."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CollectorRegistry, Info, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmdeploy_jax.messages import Response
from lmdeploy_jax.server.collectors import Counter, ExpertLoad, Histogram

if TYPE_CHECKING:
    from lmdeploy_jax.engine.base import EngineBase

PREFIX = "lmdeploy_jax:"
LABELS = ("model_name", "engine")


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


_STEP_TOKENS = [1.0 if i < 0 else 8.0 * 2**i for i in range(-1, 12)]
_TTFT = _numbers("0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160")
_BETWEEN = _numbers("0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80")
_LATENCY = _numbers("0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 3840 7680")


def _one_two_five(most: int) -> list[float]:
    """1, 2, 5, 10, 20 … up to `most`."""
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return [float(step) for step in steps if step <= most]


class Metrics:
    """What is counted. One registry an application, so that several can live in one process.

    running: tells how many answers the server has under way.
    """

    def __init__(self, engine: EngineBase, model: str, running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": engine.startup.backend}
        lengths = _one_two_five(engine.session_len)
        self._counters(lengths)
        self.seconds_to_first = self._histogram("time_to_first_token_seconds", "to the first token", _TTFT)
        self.seconds_between = self._histogram("iter_token_latency", "between two pieces", _BETWEEN)
        self.seconds_a_token = self._histogram("time_per_output_token_seconds", "a token, mean", _BETWEEN)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "of a whole request", _LATENCY)
        self.queued = self._histogram("request_queue_time_seconds", "before the first step", _LATENCY)
        self.inference = self._histogram("request_inference_time_seconds", "after the queue", _LATENCY)
        self.prefill = self._histogram("request_prefill_time_seconds", "from queue to first token", _LATENCY)
        self.decode = self._histogram("request_decode_time_seconds", "after the first token", _LATENCY)
        self._info(engine)
        self.registry.register(_Gauges(engine, running, self))
        engine.on_step = self._histogram("iteration_tokens_total", "tokens of a step", _STEP_TOKENS).observe

    def _counters(self, lengths: list[float]) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "prompt tokens")
        self.generation_tokens = self._counter("generation_tokens", "generated tokens")
        self.cached_tokens = self._counter("cached_tokens", "prompt tokens from the prefix cache")
        about = "tokens that an expert had, of requests that report them"
        self.expert_load = ExpertLoad(PREFIX + "expert_tokens", about, self._labels)
        self.registry.register(self.expert_load)
        self.succeeded = 0
        self.failed = 0
        self.received = 0
        self._reasons = prometheus_client.Counter(
            PREFIX + "request_success",
            "answers by how they ended",
            [*LABELS, "finished_reason"],
            registry=self.registry,
        )
        self.prompt_lengths = self._histogram("request_prompt_tokens", "prompt tokens of a request", lengths)
        self.answer_lengths = self._histogram("request_generation_tokens", "tokens of an answer", lengths)
        self.cached_lengths = self._histogram("request_cached_tokens", "cached prompt tokens", lengths)
        ratios = [i / 10 for i in range(11)]
        self.hit_ratios = self._histogram("request_cache_hit_ratio", "share of cached prompt tokens", ratios)

    def _counter(self, name: str, about: str) -> Counter:
        made = Counter(PREFIX + name, about, self._labels)
        self.registry.register(made)
        return made

    def _histogram(self, name: str, about: str, buckets: Iterable[float]) -> Histogram:
        made = Histogram(PREFIX + name, about, self._labels, buckets)
        self.registry.register(made)
        return made

    def _info(self, engine: EngineBase) -> None:
        info = Info(PREFIX + "backend_config", "the engine's configuration", registry=self.registry)
        fields = dataclasses.asdict(engine.config)
        info.info({name: str(value) for name, value in fields.items()} | {"engine": self._labels["engine"]})

    def ended(self, reason: str) -> None:
        """An answer has ended."""
        failed = reason in ("error", "abort")
        self.failed += failed
        self.succeeded += not failed
        self._reasons.labels(**self._labels, finished_reason=reason).inc()

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

    @property
    def labels(self) -> dict[str, str]:
        return self._labels


class RequestMetrics:
    """Watches one generation's pieces."""

    def __init__(self, metrics: Metrics) -> None:
        metrics.received += 1
        self._metrics = metrics
        self._begun = time.perf_counter()
        self._first: dict[tuple[int, int], float] = {}
        self._last: dict[tuple[int, int], tuple[float, int]] = {}

    def observe(self, piece: Response) -> None:
        """A piece has come."""
        now, key = time.perf_counter(), (piece.index, piece.choice)
        metrics = self._metrics
        last, count = self._last.get(key, (0.0, 0))
        if not count:
            self._first[key] = now
            metrics.seconds_to_first.observe(now - self._begun)
            if not piece.choice:
                self._observe_prompt(piece)
        else:
            metrics.seconds_between.observe(now - last)
        metrics.generation_tokens.value += piece.generate_token_len - count
        if piece.routed_experts is not None:
            metrics.expert_load.observe(piece.routed_experts)
        self._last[key] = (now, piece.generate_token_len)
        if piece.finish_reason is not None:
            self._observe_end(piece, now - self._first[key], now)

    def _observe_prompt(self, piece: Response) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.value += piece.input_token_len
        metrics.cached_tokens.value += piece.cached_tokens
        metrics.prompt_lengths.observe(piece.input_token_len)
        metrics.cached_lengths.observe(piece.cached_tokens)
        metrics.hit_ratios.observe(piece.cached_tokens / max(piece.input_token_len, 1))
        metrics.queued.observe(piece.queue_seconds)

    def _observe_end(self, piece: Response, decode: float, now: float) -> None:
        metrics, whole = self._metrics, now - self._begun
        metrics.ended(piece.finish_reason or "")
        metrics.answer_lengths.observe(piece.generate_token_len)
        metrics.end_to_end.observe(whole)
        metrics.inference.observe(max(whole - piece.queue_seconds, 0.0))
        metrics.prefill.observe(max(whole - piece.queue_seconds - decode, 0.0))
        metrics.decode.observe(decode)
        if piece.generate_token_len > 1:
            metrics.seconds_a_token.observe(decode / (piece.generate_token_len - 1))


class _Gauges(Collector):
    """What is read off the engine at each scrape."""

    def __init__(self, engine: EngineBase, running: Callable[[], int], metrics: Metrics) -> None:
        self._engine = engine
        self._running = running
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for name, about, value in self._values():
            family = GaugeMetricFamily(PREFIX + name, about, labels=LABELS)
            family.add_metric([self._metrics.labels[label] for label in LABELS], value)
            yield family

    def _values(self) -> list[tuple[str, str, float]]:
        engine, metrics = self._engine, self._metrics
        stats, running = engine.stats, self._running()
        used = stats.pages_used / engine.facts.num_pages
        return [
            ("num_requests_succeeded", "answers that ended well", metrics.succeeded),
            ("num_requests_failed", "answers that were aborted or failed", metrics.failed),
            ("num_api_requests_routed", "requests that were taken in", metrics.received),
            ("num_api_requests_waiting", "answers that wait for the engine", running - stats.running),
            ("num_requests_running", "answers in the running batch", stats.running),
            ("num_requests_waiting", "requests in the engine's queue", stats.waiting),
            ("gpu_cache_usage_perc", "share of the KV cache in use", used),
            (
                "prefix_cache_hit_rate",
                "share of prompt tokens from the cache",
                metrics.cached_tokens.value / max(metrics.prompt_tokens.value, 1),
            ),
            ("num_preemptions", "sequences that gave way and were computed again", stats.preemptions),
            ("encoder_cache_queries", "images that prompts had to read", stats.encoder_cache_queries),
            ("encoder_cache_hits", "those that had been encoded already", stats.encoder_cache_hits),
            ("engine_sleeping", "1 while the engine sleeps", engine.sleeping),
            ("compilations", "programs compiled since the server began", stats.compilations),
            ("compile_seconds", "time that took", stats.compile_seconds),
            ("startup_compile_seconds", "time to compile at the start", engine.startup.compile_seconds),
            ("startup_load_seconds", "time to load the weights", engine.startup.load_seconds),
        ]
