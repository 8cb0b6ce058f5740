"""A prompt of one 20 MB string is refused on every route, and meanwhile the server answers everybody else."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import orjson
import pytest

LIMIT = 64 << 20
TEXT = "What is 12 + 30? Grüße aus Köln! " * 600_000  # 20 MB
QUIET = 200  # looks at /health before the first request
ALLOWED = 0.05  # seconds
TRIES = 3  # what else the machine does may hold up one look, the server would hold up one each time
ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}]},
    "/v1/completions": {"prompt": TEXT},
    "/generate": {"prompt": TEXT},
    "/v1/encode": {"input": TEXT},
    "/v1/embeddings": {"input": TEXT},
    "/v1/messages": {"max_tokens": 5, "messages": [{"role": "user", "content": TEXT}]},
    "/v1/responses": {"input": TEXT},
}


@contextmanager
def served() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server in processes of its own, as users start it; its process and port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = ["-m", "lmdeploy_jax", "serve", "api_server", "tiny-chat", "--eager-mode"]
    command += ["--server-name", "127.0.0.1", "--server-port", str(port), "--max-body-size", str(LIMIT)]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
        try:
            while not listening(port):
                assert process.poll() is None, "the server did not start"
                time.sleep(0.1)
            yield process, port
        finally:
            process.terminate()


def listening(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Watch:
    """Looks at /health again and again over one connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def look(self) -> float:
        begun = time.perf_counter()
        self._connection.request("GET", "/health")
        answer = self._connection.getresponse()
        answer.read()
        assert answer.status == 200
        return time.perf_counter() - begun


def post(port: int, path: str, body: bytes, answers: list[tuple[int, str]]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.putrequest("POST", path)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(len(body)))
    connection.endheaders()
    connection.send(body)  # apart from the head: to join them would hold up whoever looks at /health
    answer = connection.getresponse()
    answers.append((answer.status, answer.read().decode()))


def peak_memory(process: subprocess.Popen[bytes]) -> int:
    """MB that the HTTP process has held at most."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) // 1024


def parsing_time(body: bytes) -> float:
    begun = time.perf_counter()
    orjson.loads(body)
    return time.perf_counter() - begun


@pytest.mark.parametrize("path", [path for path in ROUTES if path != "/v1/encode"])
def test_a_text_that_cannot_fit_is_refused(live, path):
    content = json.loads(json.dumps(ROUTES[path], ensure_ascii=False).replace(TEXT, TEXT[:300_000]))
    answer = httpx.post(live.url + path, json=content)
    assert answer.status_code == 400
    assert "more than 512 tokens" in answer.text


def test_more_than_the_context_can_be_counted(live):
    answer = httpx.post(live.url + "/v1/encode", json={"input": TEXT[:100_000]}).json()
    assert answer["length"] == len(answer["input_ids"]) > 10_000
    body = ROUTES["/v1/messages"] | {"messages": [{"role": "user", "content": TEXT[:100_000]}]}
    counted = httpx.post(live.url + "/v1/messages/count_tokens", json=body).json()
    assert counted["input_tokens"] > answer["length"]


def refused(watch: Watch, port: int, path: str, body: bytes) -> float:
    """The longest look at /health while a request is refused, in seconds."""
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=post, args=(port, path, body, answers))
    thread.start()
    looks = [watch.look()]
    while thread.is_alive():
        time.sleep(0.001)
        looks.append(watch.look())
    ((status, answer),) = answers
    assert status == 400
    assert "context_length_exceeded" in answer
    return max(looks)


@pytest.mark.full
def test_health_is_answered_while_a_long_prompt_is_refused():
    with served() as (process, port):
        watch = Watch(port)
        for _ in range(QUIET):
            watch.look()
        quiet = max(watch.look() for _ in range(QUIET))
        before = peak_memory(process)
        for path, content in ROUTES.items():
            body = json.dumps(content, ensure_ascii=False).encode()
            for _ in range(TRIES):
                longest = refused(watch, port, path, body)
                allowed = max(ALLOWED, 3 * quiet, 2 * parsing_time(body))  # a busy machine is slow here too
                if longest < allowed:
                    break
            memory = peak_memory(process)
            print(f"{path}: {longest * 1000:.1f} ms of {allowed * 1000:.1f}, {before} to {memory} MB")
            assert longest < allowed, path
            assert memory < before + 12 * len(body) / 1e6, path
