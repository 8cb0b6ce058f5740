"""What random forms do to others: python -m benchmarks.forms_load [--cases 2000] [--at-once 4]

Starts a server with the embedded model. Plain requests come one after the other: alone, beside other plain
requests, and beside forms as `tests/server/forms.py` draws them: good ones, whose answers are checked, bad
ones and dear ones. Prints a JSON line: seconds of a plain request (median and 99th percentile), memory of
all processes (MB: before, halfway, at the end), and what the forms were answered with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from typing import Any

import httpx
import psutil
from hypothesis import Phase, given, settings

from tests.fuzz import drawn
from tests.patience import PATIENCE
from tests.server.forms import CASES, Case
from tests.server.test_forms_fuzz import ASK, answered

PLAIN = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 8, "ignore_eos": True}


def drawn_cases(count: int) -> list[Case]:
    found: list[Case] = []

    @settings(drawn(count), phases=[Phase.generate])
    @given(CASES)
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def start() -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lmdeploy_jax", "serve", "api_server", "tiny-chat"]
    process = subprocess.Popen([*command, "--server-name=127.0.0.1", f"--server-port={port}"])
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            if httpx.get(url + "/health", timeout=PATIENCE).status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit(f"the server ended with {process.returncode}")


def memory(process: subprocess.Popen[bytes]) -> int:
    parent = psutil.Process(process.pid)
    return sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]) // 10**6


async def plain(http: httpx.AsyncClient) -> float:
    begun = time.perf_counter()
    answer = await http.post("/v1/chat/completions", json=PLAIN)
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - begun


async def timed(http: httpx.AsyncClient, beside: list[Awaitable[Any]], at_once: int) -> dict[str, float]:
    """How long plain requests take while that happens; 200 of them where nothing does."""
    seconds, waiting, limit = [], len(beside), asyncio.Semaphore(at_once)

    async def run(work: Awaitable[Any]) -> None:
        nonlocal waiting
        async with limit:
            await work
            waiting -= 1

    tasks = [asyncio.create_task(run(work)) for work in beside]
    while waiting or (not beside and len(seconds) < 200):
        seconds.append(await plain(http))
        for task in tasks:
            if task.done():
                task.result()
    await asyncio.gather(*tasks)
    seconds.sort()
    return {
        "median": round(statistics.median(seconds), 4),
        "p99": round(seconds[int(len(seconds) * 0.99)], 4),
    }


async def measure(
    process: subprocess.Popen[bytes], url: str, cases: list[Case], at_once: int
) -> dict[str, Any]:
    told: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:

        async def other() -> None:
            await http.post("/v1/chat/completions", json=ASK)

        await timed(http, [answered(http, case, 0, Counter()) for case in cases[:20]], at_once)
        found: dict[str, Any] = {"alone": await timed(http, [], at_once)}
        found["beside plain"] = await timed(http, [other() for _ in range(100)], at_once)
        sizes, half = [memory(process)], len(cases) // 2
        for name, part in (("beside forms", cases[:half]), ("beside more forms", cases[half:])):
            found[name] = await timed(
                http, [answered(http, case, i, told) for i, case in enumerate(part)], at_once
            )
            sizes.append(memory(process))
    return found | {"memory": sizes, "told": dict(told)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=4)
    args = parser.parse_args()
    cases = drawn_cases(args.cases)
    process, url = start()
    try:
        print(json.dumps(asyncio.run(measure(process, url, cases, args.at_once))))
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
