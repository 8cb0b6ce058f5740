"""One engine under test: started once, warmed up, run over workloads; each run gives one line of figures."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax

from lmdeploy_jax.bench import bandwidth, report
from lmdeploy_jax.bench.run import Run, run
from lmdeploy_jax.bench.workloads import Job
from lmdeploy_jax.cache.kv import page_bytes, unquantised
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.core.compile import CompileCounter
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.mlp_config import MixtureConfig

GIB = 2**30
ALL = 10**9  # sequences, whose tokens choose every expert


class Session:
    """An engine with what its start cost. `bytes_per_second` is the bandwidth that steps are held against.

    Raises ConfigError for several copies of the model.
    """

    def __init__(self, model: str | Path, config: JaxEngineConfig, bytes_per_second: float) -> None:
        if config.dp > 1:
            raise ConfigError(
                f"dp={config.dp}: one engine is measured; measure copies behind `serve`, with bench serve."
            )
        counter = CompileCounter()
        start = time.perf_counter()
        self.engine = Engine(model, config)
        startup = self.engine.startup
        self.startup = {
            "backend": startup.backend,
            "start_s": round(time.perf_counter() - start, 2),
            "weights_gb": round(startup.weight_bytes / 1e9, 3),
            "load_s": round(startup.load_seconds, 2),
            "compile_s": round(startup.compile_seconds, 2),
            "compilations": counter.count,
        }
        self._counter = counter
        self._bandwidth = bytes_per_second

    def throughput(self, jobs: list[Job]) -> dict[str, Any]:
        """All jobs at once."""
        compiled = self._counter.count
        result = run(self.engine, jobs)
        figures = report.summary(jobs, result)
        step = report.step_seconds(jobs, result)
        if step is not None and len(jobs) <= self.engine.max_batch_size:
            figures["step_ms"] = round(1e3 * step, 3)
            figures["bandwidth_share"] = round(self._limit(jobs) / step, 3)
        return figures | self._experts(len(jobs)) | self._machine(compiled)

    def latency(self, jobs: list[Job]) -> dict[str, Any]:
        """One job after the other."""
        compiled = self._counter.count
        runs = [run(self.engine, [job]) for job in jobs]
        together = Run(sum(r.wall for r in runs), [trace for r in runs for trace in r.traces])
        figures = report.summary(jobs, together) | {"between_tokens_ms": report.between_tokens(together)}
        steps = [report.step_seconds([job], r) for job, r in zip(jobs, runs, strict=True)]
        limits = [self._limit([job]) for job in jobs]
        pairs = [(limit, step) for limit, step in zip(limits, steps, strict=True) if step is not None]
        if pairs:
            figures["bandwidth_share"] = round(sum(p[0] for p in pairs) / sum(p[1] for p in pairs), 3)
        return figures | self._experts(1) | self._machine(compiled)

    def _experts(self, sequences: int) -> dict[str, float]:
        """Those of a layer that a decode step reads if every choice is as likely, as the bandwidth limit has
        it; nothing for models without a mixture.
        """
        together = min(sequences, self.engine.max_batch_size)
        mixtures = [x.mlp for x in self.engine.model_config.layers if isinstance(x.mlp, MixtureConfig)]
        return {"experts_if_uniform": round(mixtures[0].experts_touched(together), 1)} if mixtures else {}

    def _limit(self, jobs: list[Job]) -> float:
        """Seconds that the reads of a mean decode step take at full bandwidth."""
        engine = self.engine
        elements = page_bytes(unquantised(engine.facts.cache_layout.paged), "int8")  # a byte each
        itemsize = round(engine.memory.page_bytes * engine.memory.gain / elements)
        contexts = report.mean_contexts(jobs)
        config, weight_itemsize = engine.model_config, self._weight_itemsize(itemsize)
        read = bandwidth.step_bytes(
            config, itemsize, contexts, engine.config.tp, weight_itemsize=weight_itemsize
        )
        return read / self._bandwidth

    def _weight_itemsize(self, itemsize: int) -> float:
        """Mean bytes of an element of the matrices, less than `itemsize` where they are quantised."""
        config = self.engine.model_config
        embedding = 0 if config.tie_embeddings else itemsize * config.vocab_size * config.hidden_size
        matrices = self.engine.startup.weight_bytes - embedding
        return min(itemsize, matrices / bandwidth.matrix_parameters(config, ALL))

    def _machine(self, compiled_before: int) -> dict[str, Any]:
        stats = jax.devices()[0].memory_stats() or {}
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        figures: dict[str, Any] = {
            "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB, 2),
            "compilations_while_serving": self._counter.count - compiled_before,
        }
        if "peak_bytes_in_use" in stats:
            figures["peak_device_gib"] = round(stats["peak_bytes_in_use"] / GIB, 2)
        return figures
