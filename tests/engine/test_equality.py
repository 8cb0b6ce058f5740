"""The clever paths give the plain path's tokens: chunked, cached, preempted, batched, forked, sharded."""

import json
import subprocess
import sys

import pytest

from lmdeploy_jax.cache.kinds import PagedCache
from lmdeploy_jax.cache.kv import page_bytes
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.engine.core import buckets, setup
from lmdeploy_jax.engine.core.compile import CompileCounter
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.core.steps_gpu import GpuSteps
from tests.devices import virtual_devices
from tests.engine.conftest import COUNT
from tests.engine.harness import Collector, config, generate, submit, tokens
from tests.oracle import hf_greedy
from tests.patience import PATIENCE


def other_engine(folder, compile_cache, **changes) -> Engine:
    return Engine(folder, config(compile_cache, **changes), progress=False)


def test_each_prompt_alone_equals_all_together(engine, prompts, expected):
    assert [tokens(engine, [prompt])[0] for prompt in prompts] == expected


def test_small_chunks_equal_large_ones(llama, compile_cache, prompts, expected):
    engine = other_engine(llama, compile_cache, max_prefill_token_num=16, enable_prefix_caching=False)
    try:
        assert tokens(engine, prompts) == expected
    finally:
        engine.close()


def test_a_prefix_from_the_cache_changes_nothing(engine, llama, prompts, expected):
    tokens(engine, prompts[-1:])
    hit = generate(engine, prompts[-1:])[0][0]
    assert hit.tokens == expected[-1]
    assert hit.last.cached_tokens == 3 * PAGE_SIZE
    partial = [*prompts[-1][:100], 7, 8, 9]
    result = generate(engine, [partial])[0][0]
    assert result.last.cached_tokens == PAGE_SIZE
    assert result.tokens == hf_greedy(llama, partial, COUNT)


def test_pages_of_answers_are_found_again_in_the_next_turn(engine, prompts, expected):
    turn = [*prompts[-1], *expected[-1], 11, 12]
    warm = generate(engine, [turn])[0][0]
    assert warm.last.cached_tokens == 3 * PAGE_SIZE
    again = generate(engine, [turn])[0][0]
    assert again.tokens == warm.tokens


def small_pool(llama, compile_cache, pages: int, **changes) -> Engine:
    """An engine whose KV cache holds `pages` pages and the dump page."""
    size = page_bytes([PagedCache(kv_heads=2, head_dim=16)] * 2, "float32")
    return other_engine(llama, compile_cache, cache_max_entry_count=(pages + 1) * size, **changes)


def test_several_decode_steps_at_once_equal_single_ones(engine, llama, compile_cache, prompts, expected):
    sampled = {"temperature": 0.8, "top_k": 20, "seed": 3, "max_new_tokens": 14}
    stop = frozenset(expected[1][5:6])
    single = tokens(engine, prompts, **sampled), generate(engine, prompts, stop_token_ids=stop)
    several = other_engine(llama, compile_cache, decode_steps=3)
    try:
        assert tokens(several, prompts) == expected
        assert tokens(several, prompts, **sampled) == single[0]
        for got, want in zip(generate(several, prompts, stop_token_ids=stop), single[1], strict=True):
            assert (got[0].tokens, got[0].reason) == (want[0].tokens, want[0].reason)
        assert max(len(out.token_ids) for out in generate(several, prompts[:1])[0][0].outputs) == 3
        for length in (1, 2, 5):
            assert tokens(several, prompts, max_new_tokens=length) == [t[:length] for t in expected]
        longest = tokens(several, [[5] * 500], max_new_tokens=100)[0]  # up to the end of the context
        assert longest == tokens(engine, [[5] * 500], max_new_tokens=100)[0]
        several.scheduler.check_integrity()
    finally:
        several.close()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    plan = buckets.plan
    monkeypatch.setattr(buckets, "plan", lambda platform, *rest: plan("gpu", *rest))
    monkeypatch.setattr(setup, "steps_for", lambda platform: GpuSteps)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_programs_of_a_gpu_give_the_same_tokens(llama, compile_cache, prompts, expected):
    for steps in (1, 4):
        engine = other_engine(llama, compile_cache, decode_steps=steps)
        try:
            assert tokens(engine, prompts) == expected
            hidden = generate(engine, prompts[:1], hidden="generation")[0][0]
            assert hidden.tokens == expected[0]
        finally:
            engine.close()


@pytest.mark.full
@pytest.mark.usefixtures("as_on_a_gpu")
def test_programs_of_a_gpu_are_compiled_and_warm_before_the_first_request(llama, compile_cache, prompts):
    """All of them: whatever a request asks for, nothing is compiled any more."""
    changes = {"eager_mode": False, "decode_steps": 2, "max_batch_size": 2, "max_prefill_token_num": 32}
    ahead = other_engine(llama, compile_cache, **changes)
    wishes = ({}, {"temperature": 1.0}, {"logprobs": 1}, {"logits": "all"}, {"prompt_logprobs": 1, "n": 2})
    try:
        counter = CompileCounter()
        for wish in wishes:
            assert tokens(ahead, prompts[:2], max_new_tokens=4, **wish)
        assert counter.count == 0
    finally:
        ahead.close()


def test_preempted_sequences_go_on_as_if_nothing_had_happened(llama, compile_cache, prompts, expected):
    engine = small_pool(llama, compile_cache, pages=6, enable_prefix_caching=False)
    try:
        four = [prompt[:63] for prompt in prompts[1:]]
        together = tokens(engine, four, max_new_tokens=90)
        assert engine.scheduler.preemptions > 0
        assert together == [tokens(engine, [prompt], max_new_tokens=90)[0] for prompt in four]
        engine.scheduler.check_integrity()
    finally:
        engine.close()


def test_cached_prefixes_survive_or_leave_but_never_lie(llama, compile_cache, prompts, expected):
    engine = small_pool(llama, compile_cache, pages=6)
    try:
        for _ in range(3):  # the pool holds one long prompt, not all of them: pages are evicted all the time
            assert tokens(engine, prompts) == expected
    finally:
        engine.close()


def test_n_sequences_equal_n_requests(engine, prompts):
    sampled = {"temperature": 1.0, "top_k": 20, "seed": 5, "max_new_tokens": 16}
    for prompt in (prompts[2], prompts[3]):  # on and off a page boundary
        forked = generate(engine, [prompt], n=3, **sampled)[0]
        alone = [tokens(engine, [prompt], **sampled | {"seed": 5 + i})[0] for i in range(3)]
        assert [result.tokens for result in forked] == alone
        assert len({tuple(t) for t in alone}) > 1


def test_a_seed_gives_the_same_tokens_in_any_company(engine, prompts):
    sampled = {"temperature": 0.9, "top_p": 0.9, "seed": 11}
    alone = tokens(engine, prompts[:1], **sampled)
    assert tokens(engine, prompts, **sampled)[:1] == alone
    assert tokens(engine, prompts[:1], **sampled | {"seed": 12}) != alone


def test_strangers_that_come_and_go_change_nothing(engine, prompts, expected):
    """Requests join and are aborted while others run."""
    strangers = [Collector() for _ in range(6)]
    watched = [Collector() for _ in prompts]
    for i, (prompt, collector) in enumerate(zip(prompts, watched, strict=True)):
        request = submit(engine, prompt[::-1], strangers[i], max_new_tokens=200)
        strangers[i]._on_first = lambda r=request: engine.abort(r.request_id)
        submit(engine, prompt, collector)
    assert [collector.wait()[0].tokens for collector in watched] == expected
    for collector in strangers[: len(prompts)]:
        assert collector.wait()[0].reason == "abort"


SHARDED = """
import json, sys
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.core.steps_gpu import GpuSteps
from tests.engine.harness import config, tokens
folder, cache, prompts, tps = json.loads(sys.argv[1])
for tp in tps:
    engine = Engine(folder, config(cache, tp=tp, max_batch_size=4), progress=False)
    print("tokens", json.dumps(tokens(engine, prompts)))
    engine.close()
"""


def test_tensor_parallel_devices_give_the_same_tokens(llama, compile_cache, prompts, expected):
    """tp 2 and 4 on virtual devices; with 2 KV heads, tp 4 keeps two copies of each. The second engine of
    tp 2 has its programs from disk.
    """
    argument = json.dumps([str(llama), str(compile_cache), prompts, [2, 4, 2]])
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, argument],
        env=virtual_devices(4),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("tokens")]
    assert lines == [expected] * 3, done.stderr[-2000:]


def test_the_expected_tokens_say_something(expected):
    """Guards the tests above: constant answers would let them pass by chance."""
    assert all(len(answer) == COUNT for answer in expected)
    assert all(len(set(answer)) > 4 for answer in expected)
