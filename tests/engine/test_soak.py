"""Random requests with random aborts: afterwards nothing is lost, and nothing was compiled on the way."""

import random
import time

import pytest

from lmdeploy_jax.cache.kinds import PagedCache
from lmdeploy_jax.cache.kv import page_bytes
from lmdeploy_jax.engine.core.compile import CompileCounter
from lmdeploy_jax.engine.core.engine import Engine
from tests.engine.harness import Collector, config, submit

REQUESTS = 500


@pytest.fixture(scope="module")
def ahead(llama, compile_cache):
    """An engine as users get it, compiled ahead, with a pool too small for all that runs."""
    engine = opened(llama, compile_cache)
    yield engine
    engine.close()


def opened(llama, compile_cache, tp=1):
    size = page_bytes([PagedCache(kv_heads=2, head_dim=16)] * 2, "float32")
    changes = {"eager_mode": False, "cache_max_entry_count": 11 * size, "max_prefill_token_num": 64}
    return Engine(llama, config(compile_cache, tp=tp, **changes), progress=False)


def wish(rnd: random.Random) -> dict[str, object]:
    """A random combination of what a request may ask for."""
    params: dict[str, object] = {"max_new_tokens": rnd.randrange(1, 60)}
    if rnd.random() < 0.3:
        params |= {"temperature": 1.0, "seed": rnd.randrange(1000), "top_p": rnd.choice([0.5, 1.0])}
    if rnd.random() < 0.1:
        params |= {"repetition_penalty": 1.1, "logprobs": rnd.randrange(5)}
    if rnd.random() < 0.1:
        params |= {"stop_token_ids": frozenset(range(3, 20)), "min_new_tokens": rnd.randrange(5)}
    if rnd.random() < 0.05:
        params |= {"prompt_logprobs": 1}
    if rnd.random() < 0.05:
        params |= {"logits": "generation", "hidden": "all"}
    if rnd.random() < 0.05:
        params |= {"banned_sequences": ((5, 6),)}
    if rnd.random() < 0.1:
        params |= {"n": 2}
    return params


def test_random_requests_and_aborts_leave_nothing_behind(ahead):
    storm(ahead, REQUESTS)


def storm(engine, requests):
    """Ends once nothing is left of the requests. Fails where a page is, or something was compiled."""
    rnd = random.Random(3)
    counter = CompileCounter()
    waiting = []
    for _ in range(requests):
        params = wish(rnd)
        prompt = [rnd.randrange(3, 12)] * rnd.choice([1, 2, 30, 63, 64, 65, 150])
        collector = Collector(int(params.get("n", 1)))
        request = submit(engine, prompt, collector, **params)
        waiting.append(collector)
        if rnd.random() < 0.2:
            engine.abort(request.request_id)
        if rnd.random() < 0.1:
            time.sleep(0.02)
        if rnd.random() < 0.05:
            engine.abort(rnd.choice([request.request_id, 0, 10**9]), index=rnd.choice([0, 1]))
    reasons = [result.reason for collector in waiting for result in collector.wait()]
    assert set(reasons) == {"stop", "length", "abort"}
    assert reasons.count("abort") < len(reasons) / 2
    assert engine.scheduler.preemptions > 0
    while engine.scheduler.has_work:
        time.sleep(0.01)
    engine.scheduler.check_integrity()
    assert engine.scheduler.cache.pool.used == 0
    assert counter.count == 0, "something was compiled while serving"
