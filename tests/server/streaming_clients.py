"""Clients that stream chat answers over HTTP, and some of which hang up in the middle of one."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmdeploy_jax import GenerationConfig, Pipeline
from lmdeploy_jax.engine.base import EngineBase
from tests.patience import wait_until
from tests.server.live import LiveServer

TOKENS = 48
HANG_UPS = 0.2  # share of the clients
PROMPTS = [
    f"What is {a} + {a + 7}? Then spell the word {word}." for a in range(10, 26) for word in ("cat", "sun")
]


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    hung_up: int = 0
    tokens: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


def expected(pipe: Pipeline) -> dict[str, str]:
    """The pipeline's answer to each prompt."""
    config = GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True)
    answers = pipe.infer(PROMPTS, config)
    assert isinstance(answers, list)
    return {prompt: answer.text for prompt, answer in zip(PROMPTS, answers, strict=True)}


def clients(port: int, streams: int, seconds: float, texts: Mapping[str, str]) -> Tally:
    """`streams` clients, one request after the other for so many seconds."""
    return asyncio.run(_clients(port, streams, seconds, texts))


async def _clients(port: int, streams: int, seconds: float, texts: Mapping[str, str]) -> Tally:
    tally, begun = Tally(), time.perf_counter()

    async def client(number: int) -> None:
        rnd = random.Random(number)
        while time.perf_counter() - begun < seconds:
            prompt = rnd.choice(list(texts))
            patience = rnd.randrange(TOKENS // 6) if rnd.random() < HANG_UPS else None
            try:
                await _ask(port, prompt, texts[prompt], patience, tally)
            except (OSError, ValueError, AssertionError, EOFError) as error:
                tally.errors.append(f"{prompt!r}: {error!r}"[:300])

    await asyncio.gather(*(client(number) for number in range(streams)))
    tally.seconds = time.perf_counter() - begun
    return tally


async def _ask(port: int, prompt: str, text: str, patience: int | None, tally: Tally) -> None:
    """One streamed answer; with `patience`, the client leaves after so many events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_request(prompt))
        said, events, usage = "", 0, 0
        async for line in reader:
            if events == 0 and line.startswith(b"HTTP/1.1 "):
                assert b" 200 " in line, line
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            if events == patience:
                tally.hung_up += 1
                return
            event, events = json.loads(line[6:]), events + 1
            said += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            usage = (event.get("usage") or {}).get("completion_tokens", usage)
        assert (usage, said) == (TOKENS, text), f"{usage} tokens, {said!r} instead of {text!r}"
        tally.answered += 1
        tally.tokens += usage
    finally:
        writer.close()


def _request(prompt: str) -> bytes:
    asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0}
    streamed = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(asked | streamed).encode()
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode() + body


def leftovers(live: LiveServer, engine: EngineBase) -> int:
    """Pages in use once nothing runs any more."""
    wait_until(lambda: not (live.service.running or engine.stats.running or engine.stats.waiting))
    return engine.stats.pages_used
