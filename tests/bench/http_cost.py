"""What HTTP costs: tokens/s of 64 streams through the server, and of a pipeline over the engine itself.

python -m tests.bench.http_cost [--streams N]

The server is as `serve` runs it, with the engine in a process of its own. The pipeline has its engine in its
own process, which has ended before the server starts: a GPU holds one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from contextlib import closing

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, pipeline
from lmdeploy_jax.engine.frontend import Frontend
from lmdeploy_jax.engine.remote import RemoteEngine
from tests.server.live import serving

ROUNDS = 3
TOKENS = 128


def prompts(count: int) -> list[str]:
    rnd = random.Random(0)
    return [" ".join(rnd.choices(["one", "two", "red", "cat", "sea"], k=12)) for _ in range(count)]


def offline(streams: int) -> list[float]:
    """Tokens a second of the pipeline on the whole work, in each round."""
    config, found = GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True), []
    with pipeline("tiny-chat", engine_config(streams), progress=False) as pipe:
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            answers = pipe.infer(prompts(streams * 4), config)
            assert isinstance(answers, list)
            found.append(sum(a.generate_token_len for a in answers) / (time.perf_counter() - begun))
    return found


def engine_config(streams: int) -> JaxEngineConfig:
    return JaxEngineConfig(max_batch_size=streams)


async def stream(port: int, prompt: str) -> int:
    """One answer, read as raw events; returns how many tokens the server counted."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    tail = b""
    while part := await reader.read(65536):
        tail = (tail + part)[-2048:]
    writer.close()
    assert b"[DONE]" in tail, tail
    return int(tail.rsplit(b'"completion_tokens":', 1)[1].split(b",")[0])


async def online(port: int, streams: int) -> float:
    """Tokens a second of closed-loop clients, `streams` at once."""
    waiting = prompts(streams * 4)

    async def client() -> int:
        total = 0
        while waiting:
            total += await stream(port, waiting.pop())
        return total

    begun = time.perf_counter()
    total = sum(await asyncio.gather(*(client() for _ in range(streams))))
    return total / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    streams = parser.parse_args().streams
    through_pipeline = in_own_process(offline, streams)
    engine = RemoteEngine("tiny-chat", engine_config(streams), progress=False)
    with closing(Frontend.over(engine)) as frontend, serving(frontend) as live:
        port = int(live.url.rsplit(":", 1)[1])
        through_http = in_own_process(run_online, port, streams)
    a, b = statistics.median(through_http), statistics.median(through_pipeline)
    print(json.dumps({"http": round(a), "pipeline": round(b), "share": round(a / b, 3)}))


def in_own_process(work: Callable[..., list[float]], *args: int) -> list[float]:
    """Its result. So the clients take no time of the server's interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def run_online(port: int, streams: int) -> list[float]:
    return [asyncio.run(online(port, streams)) for _ in range(ROUNDS)]


if __name__ == "__main__":
    main()
