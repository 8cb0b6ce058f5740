"""Replicas of Ray Serve on this machine: conversations stay, and no answer is lost in silence."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import psutil
import pytest

from tests.conversations import share_cached
from tests.engine.harness import config
from tests.patience import PATIENCE, get, wait_until

pytest.importorskip("ray")
pytestmark = pytest.mark.full
URL = "http://127.0.0.1:8000"
BOUND = 10.0  # seconds from a replica's end to the error that tells of it
SIZES = {"max_batch_size": 32, "max_prefill_token_num": 256, "session_len": 1536}


@pytest.fixture(scope="module")
def deploy(tmp_path_factory):
    """Starts two replicas anew; they run already."""
    import ray
    from ray import serve

    from lmdeploy_jax.ray_serve import RayOptions, build_app

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    engine = vars(config(tmp_path_factory.mktemp("programs"), **SIZES))
    options = {"model": "tiny-chat", "engine": engine, "min_replicas": 2, "max_replicas": 2}

    def again(**changes):
        serve.run(build_app(RayOptions(**options | changes)))

    again()
    yield again
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def two(deploy):
    """Their address."""
    return URL


def replicas() -> list[psutil.Process]:
    here = psutil.Process().children(recursive=True)
    return [each for each in here if "Replica:default:Replica" in " ".join(each.cmdline())]


def test_every_route_is_a_replica_s(two):
    assert get(two + "/v1/models").json()["data"][0]["id"] == "tiny-chat"
    assert get(two + "/health").status_code == 200
    assert get(two + "/nothing").status_code == 404
    preflight = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    assert httpx.options(two + "/v1/chat/completions", headers=preflight).status_code == 200


def test_conversations_are_cached(two):
    share = share_cached(two)
    print(f"{share:.1%} of what could be cached was")
    assert share >= 0.95


async def streamed(client: httpx.AsyncClient, number: int) -> list[tuple[float, str]]:
    """When each event of an answer came, and what it was."""
    asked = {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": f"Count to {number}."}],
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": True,
    }
    events = []
    async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append((time.monotonic(), line[6:]))
    return events


def test_replicas_that_are_replaced_finish_their_answers(deploy):
    """As with a new version, or fewer replicas."""

    async def load():
        async with httpx.AsyncClient(base_url=URL, timeout=PATIENCE) as client:
            tasks = [asyncio.create_task(streamed(client, i)) for i in range(8)]
            await asyncio.sleep(1.0)
            await asyncio.to_thread(deploy)
            return await asyncio.gather(*tasks)

    assert [events[-1][1] for events in asyncio.run(load())] == ["[DONE]"] * 8
    assert get(URL + "/health").status_code == 200


async def whole(client: httpx.AsyncClient, number: int) -> int:
    """How many tokens an answer has that comes all at once."""
    asked = {"model": "tiny-chat", "prompt": f"{number}", "max_tokens": 200, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["completion_tokens"]


def test_a_replica_that_is_killed_costs_at_most_one_error_an_answer(two):
    """And none where nothing of the answer had been sent: it is asked for again."""
    killed = 0.0

    async def load():
        nonlocal killed
        async with httpx.AsyncClient(base_url=two, timeout=PATIENCE, limits=httpx.Limits()) as client:
            tasks = [asyncio.create_task(streamed(client, i)) for i in range(20)]
            unsent = [asyncio.create_task(whole(client, i)) for i in range(20)]
            await asyncio.sleep(1.5)
            assert not any(task.done() for task in unsent)
            replicas()[0].kill()
            killed = time.monotonic()
            assert await asyncio.gather(*unsent) == [200] * 20
            return await asyncio.gather(*tasks)

    answers, failed = asyncio.run(load()), 0
    for events in answers:
        *texts, (when, last) = events
        assert all("error" not in json.loads(text) for _, text in texts)
        if last != "[DONE]":
            assert "error" in json.loads(last)
            assert when - killed < BOUND
            failed += 1
    print(f"{failed} of {len(answers)} answers ended in an error")
    wait_until(lambda: len(replicas()) == 2)
    assert get(two + "/v1/models").status_code == 200


def test_replicas_come_with_the_queue(deploy):
    delays = dict.fromkeys(("upscale_delay_s", "downscale_delay_s", "metrics_interval_s"), 1)
    deploy(min_replicas=1, target_ongoing_requests=2, autoscaling=delays | {"look_back_period_s": 2})
    wait_until(lambda: len(replicas()) == 1)

    async def load():
        async with httpx.AsyncClient(base_url=URL, timeout=PATIENCE) as client:
            tasks = [asyncio.create_task(streamed(client, i)) for i in range(8)]
            await asyncio.to_thread(wait_until, lambda: len(replicas()) == 2)
            return await asyncio.gather(*tasks)

    assert [events[-1][1] for events in asyncio.run(load())] == ["[DONE]"] * 8
