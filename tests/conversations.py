"""Conversations of many turns at once, and how much of their prompts was found in the cache."""

from __future__ import annotations

import asyncio
import random

import httpx

from lmdeploy_jax.cache.pages import PAGE_SIZE
from tests.patience import PATIENCE

CONVERSATIONS, TURNS = 64, 8
WORDS = ("river", "stone", "cloud", "seven", "green", "paper", "window", "north", "salt", "clock")


async def _converse(client: httpx.AsyncClient, seed: int) -> tuple[int, int]:
    """Tokens of prompts that were cached, and that could have been: the full pages of the prompt before."""
    rnd = random.Random(seed)
    messages: list[dict[str, str]] = []
    cached = reusable = before = 0
    for _ in range(TURNS):
        messages.append({"role": "user", "content": " ".join(rnd.choices(WORDS, k=40))})
        asked = {"model": "tiny-chat", "messages": messages, "max_tokens": 8, "temperature": 0}
        answer = (await client.post("/v1/chat/completions", json=asked)).raise_for_status().json()
        usage, said = answer["usage"], answer["choices"][0]["message"]["content"]
        pages = before // PAGE_SIZE * PAGE_SIZE
        cached += min(usage["prompt_tokens_details"]["cached_tokens"], pages)
        reusable += pages
        before = usage["prompt_tokens"]
        messages.append({"role": "assistant", "content": said or "."})
    return cached, reusable


def share_cached(url: str, conversations: int = CONVERSATIONS) -> float:
    """Of what could have been cached, of so many conversations at once."""

    async def all_at_once() -> list[tuple[int, int]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # which a server may close
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            return await asyncio.gather(*(_converse(client, seed) for seed in range(conversations)))

    cached, reusable = map(sum, zip(*asyncio.run(all_at_once()), strict=True))
    assert reusable > conversations * PAGE_SIZE
    return cached / reusable
