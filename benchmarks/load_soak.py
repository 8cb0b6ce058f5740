"""Load with clients that hang up: python -m benchmarks.load_soak [--streams 64] [--seconds 60]

Closed-loop clients stream chat answers from the embedded model; one in five goes away in the middle. Everyone
else must get the pipeline's own text, in order and to its end. The engine runs in a process of its own, as
under `serve`. Prints one JSON line: answers, errors, tokens a second, memory of both processes a third of the
way through and at the end, and pages that did not come back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict

import psutil

from lmdeploy_jax import JaxEngineConfig, Pipeline
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.engine.process.remote import RemoteEngine
from tests.server.live import serving
from tests.server.streaming_clients import clients, expected, leftovers


def memory() -> int:
    """Bytes that this process and the engine's hold."""
    process = psutil.Process()
    engine = next(p for p in process.children() if "spawn_main" in " ".join(p.cmdline()))
    return int(process.memory_info().rss + engine.memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    config = JaxEngineConfig(max_batch_size=args.streams)
    engine = RemoteEngine("tiny-chat", config, progress=False)
    with (
        Pipeline.from_frontend(Frontend.from_engine(engine)) as pipe,
        serving(pipe.frontend) as live,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        port, texts = int(live.url.rsplit(":", 1)[1]), expected(pipe)
        pool.apply(clients, (port, args.streams, 2.0, texts))  # warms up
        found = pool.apply_async(clients, (port, args.streams, args.seconds, texts))
        time.sleep(args.seconds / 3)
        early = memory()
        tally = found.get()
        late = memory()
        figures = asdict(tally) | {
            "seconds": round(tally.seconds, 2),
            "errors": len(tally.errors),
            "first_errors": tally.errors[:3],
            "tokens_s": round(tally.tokens / tally.seconds),
            "memory_mb": [round(early / 1e6), round(late / 1e6)],
            "pages_left": leftovers(live, engine),
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
