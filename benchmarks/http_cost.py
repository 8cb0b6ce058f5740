"""What HTTP costs: tokens/s of 64 streams through the server, and of a pipeline over the engine itself.

python -m benchmarks.http_cost [--streams N] [--rounds N]

The server is as `serve` runs it, with the engine in a process of its own; the pipeline and the clients have
theirs. Pipeline and HTTP take turns, so that a noisy machine is noisy for both; who waits for a turn sleeps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, pipeline
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.engine.process.remote import RemoteEngine
from tests.server.live import serving

TOKENS = 128


def prompts(count: int) -> list[str]:
    rnd = random.Random(0)
    return [" ".join(rnd.choices(["one", "two", "red", "cat", "sea"], k=12)) for _ in range(count)]


def offline(connection: Connection, streams: int) -> None:
    """A pipeline's process: each message asks for the tokens a second of the whole work."""
    config = GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True)
    with pipeline("tiny-chat", engine_config(streams), progress=False) as pipe:
        pipe.infer(prompts(streams), config)
        connection.send(None)
        while connection.recv():
            begun = time.perf_counter()
            answers = pipe.infer(prompts(streams * 4), config)
            assert isinstance(answers, list)
            connection.send(sum(a.generate_token_len for a in answers) / (time.perf_counter() - begun))


def over_http(connection: Connection, port: int, streams: int) -> None:
    """The clients' process: they take no time of the server's interpreter."""
    asyncio.run(online(port, streams))
    connection.send(None)
    while connection.recv():
        connection.send(asyncio.run(online(port, streams)))


def engine_config(streams: int) -> JaxEngineConfig:
    return JaxEngineConfig(max_batch_size=streams, cache_max_entry_count=0.3)  # two fit on a GPU


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


@contextmanager
def process(work: Callable[..., None], *args: int) -> Iterator[Connection]:
    """A process that has said that it is ready."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    started = context.Process(target=work, args=(its, *args), daemon=True)
    started.start()
    ours.recv()
    yield ours
    ours.send(False)
    started.join()


def turn(connection: Connection) -> float:
    connection.send(True)
    return connection.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    streams = args.streams
    engine = RemoteEngine("tiny-chat", engine_config(streams), progress=False)
    with closing(Frontend.from_engine(engine)) as frontend, serving(frontend) as live:
        port = int(live.url.rsplit(":", 1)[1])
        with process(offline, streams) as pipe, process(over_http, port, streams) as http:
            pairs = [(turn(http), turn(pipe)) for _ in range(args.rounds)]
    shares = [a / b for a, b in pairs]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    found = {"http": round(a), "pipeline": round(b), "share": round(statistics.median(shares), 3)}
    print(json.dumps({**found, "shares": [round(share, 3) for share in sorted(shares)]}))


if __name__ == "__main__":
    main()
