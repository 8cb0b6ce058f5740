"""`serve api_server` as its users start and end it: two processes that come and go together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

import lmdeploy_jax
from tests import patience
from tests.patience import PATIENCE, wait_until

ROOT = Path(lmdeploy_jax.__file__).parent.parent
ASK = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True, "max_tokens": 400, "stream": True}


@contextmanager
def served(cache: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process group of its own, as a terminal gives each command, and its URL."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "lmdeploy_jax", "serve", "api_server", "--eager-mode", *flags]
    place = ["--server-name", "127.0.0.1", "--server-port", str(port), "--compile-cache-dir", str(cache)]
    with subprocess.Popen(
        command + place, cwd=ROOT, text=True, stdout=-1, stderr=-1, start_new_session=True
    ) as server:
        try:
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def serving(server: subprocess.Popen[str], url: str) -> psutil.Process:
    """Waits until it says that it serves, and then it does; the engine's process."""
    assert server.stdout is not None
    assert server.stdout.readline() == f"Serving tiny-chat at {url}\n"
    assert answers(url)
    return next(p for p in psutil.Process(server.pid).children() if "spawn_main" in " ".join(p.cmdline()))


def answers(url: str) -> bool:
    try:
        return patience.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def told(text: str) -> list[str]:
    """What each line begins with: a start tells of its phases, and nothing else is to be told."""
    return [line.split()[0] for line in text.splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("xla")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_group_lets_answers_finish(cache, number, code):
    with served(cache) as (server, url):
        engine = serving(server, url)
        with patience.stream("POST", url + "/v1/chat/completions", json=ASK) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.killpg(server.pid, number)
            rest = "".join(lines)
        assert '"finish_reason":"length"' in rest
        assert rest.endswith("[DONE]")
        assert server.wait(PATIENCE) == code
        assert not engine.is_running()
        assert server.stderr is not None
        assert told(server.stderr.read()) == ["loading", "ready"]


def test_an_engine_that_is_killed_shows_in_health(cache):
    with served(cache) as (server, url):
        engine = serving(server, url)
        with patience.stream("POST", url + "/v1/chat/completions", json=ASK) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine.kill()
            assert '"code":"engine_unavailable"' in "".join(lines)
        health = patience.get(url + "/health")
        assert health.status_code == 503
        assert "signal 9" in health.json()["message"]
        assert patience.post(url + "/v1/chat/completions", json=ASK).status_code == 503
        server.terminate()
        assert server.wait(PATIENCE) == 143


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["/no/such/folder"], 1, "/no/such/folder"),
        (["--tp", "7"], 2, "tp=7 needs as many devices, and there is one"),
        (["--log-level", "loud"], 2, "loud"),
    ],
)
def test_a_start_that_fails_ends_in_one_line(cache, flags, code, text):
    with served(cache, *flags) as (server, _):
        out, err = server.communicate(timeout=PATIENCE)
        assert (server.returncode, out) == (code, "")
        assert err.startswith("lmdeploy_jax: ")
        assert text in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_starts(cache, number, code):
    with served(cache) as (server, _):
        process = psutil.Process(server.pid)
        wait_until(lambda: len(process.children()) == 2)  # Python's resource tracker too
        children = process.children()
        time.sleep(0.3)
        os.killpg(server.pid, number)
        _, err = server.communicate(timeout=PATIENCE)
        assert server.returncode == code
        assert told(err) in ([], ["loading"], ["loading", "ready"])
        assert not psutil.wait_procs(children, timeout=PATIENCE)[1]
