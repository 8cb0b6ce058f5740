"""Requests that nobody should send: the server says what is wrong and answers the next good one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from urllib.parse import urlsplit

import httpx
import pytest

from tests import patience
from tests.fuzz import cases
from tests.patience import PATIENCE, wait_until
from tests.server.live import serving
from tests.server.mutations import broken

AT_ONCE = 32
GOOD = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 4}
STREAM = json.dumps(GOOD | {"max_tokens": 200, "ignore_eos": True, "stream": True})
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def send_all(url: str, count: int) -> Counter[int]:
    rnd, limit, statuses = random.Random(20), asyncio.Semaphore(AT_ONCE), Counter()

    async def send(client: httpx.AsyncClient, path: str, headers: dict, body: bytes) -> None:
        async with limit:
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = await client.post(path, headers=raw, content=body)
            assert answer.status_code < 500, (path, body[:300], answer.text[:300])
            statuses[answer.status_code] += 1

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client, asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(send(client, *broken(rnd)))
    return statuses


def check_unharmed(live, pipe) -> None:
    """A good request is answered; then nothing runs and every page is back."""
    assert patience.post(live.url + "/v1/chat/completions", json=GOOD).status_code == 200
    scheduler = pipe.frontend.engine.scheduler
    wait_until(lambda: not live.service.running and not scheduler.has_work and not scheduler.cache.pool.used)
    scheduler.check_integrity()


@cases(2000)
def test_broken_bodies_are_refused_and_nothing_is_lost(pipe, cases):
    with serving(pipe.frontend, enable_abort_handling=True) as live:
        statuses = asyncio.run(send_all(live.url, cases))
        assert statuses[400] > cases / 4, statuses
        check_unharmed(live, pipe)


TORN = [
    HEAD + "content-length: 100\r\n\r\n{",
    HEAD + 'transfer-encoding: chunked\r\n\r\n5\r\n{"mes',
    HEAD[:40],
    "GARBAGE\r\n\r\n",
    HEAD + "content-length: 2\r\n\r\n{}" * 3,
    HEAD + f"content-length: {len(STREAM)}\r\n\r\n{STREAM}",
    "",
]


def connect(live) -> socket.socket:
    parts = urlsplit(live.url)
    return socket.create_connection((parts.hostname, parts.port))


def read_all(connection: socket.socket, size: int = 4096, pause: float = 0.0) -> bytes:
    parts = []
    while part := connection.recv(size):
        parts.append(part)
        time.sleep(pause)
    return b"".join(parts)


@pytest.mark.parametrize("ending", ["half-closed", "closed", "reset"])
def test_connections_that_break_off_do_no_harm(live, pipe, ending):
    for text in TORN:
        with connect(live) as connection:
            connection.sendall(text.encode())
            if ending == "half-closed":
                connection.shutdown(socket.SHUT_WR)
            if ending == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    check_unharmed(live, pipe)


def test_a_slow_client_is_served(live, pipe):
    text = (HEAD + f"connection: close\r\ncontent-length: {len(STREAM)}\r\n\r\n{STREAM}").encode()
    with connect(live) as connection:
        for i in range(0, len(text), 8):
            connection.sendall(text[i : i + 8])
            time.sleep(0.005)
        answer = read_all(connection, size=64, pause=0.005)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" in answer
    check_unharmed(live, pipe)


def test_a_body_that_does_not_come_is_given_up_on(pipe):
    with (
        serving(pipe.frontend, body_timeout=0.5, max_concurrent_requests=1) as live,
        contextlib.ExitStack() as stack,
    ):
        stalled = [stack.enter_context(connect(live)) for _ in range(20)]
        for connection in stalled:
            connection.sendall((HEAD + "content-length: 100\r\n\r\n{").encode())
        check_unharmed(live, pipe)  # meanwhile
        for connection in stalled:
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"within 0.5 s" in answer
        check_unharmed(live, pipe)
