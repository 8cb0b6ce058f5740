"""Requests that nobody should send: the server says what is wrong and answers the next good one."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter
from urllib.parse import urlsplit

import httpx

from tests.server.live import serving, wait_until
from tests.server.mutations import broken

COUNT, AT_ONCE, PATIENCE = 2000, 32, 60.0
GOOD = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 4}
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def send_all(url: str) -> Counter[int]:
    rnd, limit, statuses = random.Random(20), asyncio.Semaphore(AT_ONCE), Counter()

    async def send(client: httpx.AsyncClient, path: str, headers: dict, body: bytes) -> None:
        async with limit:
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = await client.post(path, headers=raw, content=body)
            assert answer.status_code < 500, (path, body[:300], answer.text[:300])
            statuses[answer.status_code] += 1

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client, asyncio.TaskGroup() as group:
        for _ in range(COUNT):
            group.create_task(send(client, *broken(rnd)))
    return statuses


def check_unharmed(live, pipe) -> None:
    """Nothing runs, every page is back, and a good request is answered."""
    scheduler = pipe.frontend.engine.scheduler
    wait_until(lambda: not live.service.running and not scheduler.has_work and not scheduler.cache.pool.used)
    scheduler.check_integrity()
    assert httpx.post(live.url + "/v1/chat/completions", json=GOOD, timeout=PATIENCE).status_code == 200


def test_broken_bodies_are_refused_and_nothing_is_lost(pipe):
    with serving(pipe.frontend, enable_abort_handling=True) as live:
        statuses = asyncio.run(send_all(live.url))
        assert statuses[400] > COUNT / 4, statuses
        check_unharmed(live, pipe)


def test_connections_that_break_off_do_no_harm(live, pipe):
    parts = urlsplit(live.url)
    for text in (
        HEAD + "content-length: 100\r\n\r\n{",
        HEAD + 'transfer-encoding: chunked\r\n\r\n5\r\n{"mes',
        HEAD[:40],
        "GARBAGE\r\n\r\n",
        HEAD + "content-length: 2\r\n\r\n{}" * 3,
        "",
    ):
        for half_close in (True, False):
            with socket.create_connection((parts.hostname, parts.port), timeout=5) as connection:
                connection.sendall(text.encode())
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
    check_unharmed(live, pipe)
