"""What every engine owes its users: the real one, one in a process of its own, the scripted one of tests."""

from __future__ import annotations

from functools import partial

import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.base import EngineBase
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.process.remote import RemoteEngine
from lmdeploy_jax.engine.process.replicas import Replicas
from lmdeploy_jax.errors import ContextLengthError, EngineError, RequestError
from lmdeploy_jax.prompt import EncodedPrompt, Span
from tests.engine.harness import Collector, config, generate, submit
from tests.fake_engine import FakeEngine
from tests.patience import wait_until

PROMPT = [5, 77, 130, 9]
ENGINES = ("here", "elsewhere", "scripted", "scripted elsewhere", "scripted twice")


def counting(request, index):
    return (3 + i % 1000 for i in range(10**9))


def scripted(model, config, progress):
    return FakeEngine(TINY_CHAT, counting)


def scripted_copy(rank, model, config, progress):
    return scripted(model, config, progress)


def opened(kind: str, compile_cache) -> EngineBase:
    if kind == "scripted":
        return FakeEngine(TINY_CHAT, counting)
    if kind == "scripted elsewhere":
        return RemoteEngine(TINY_CHAT, progress=False, build=scripted)
    if kind == "scripted twice":
        return Replicas(TINY_CHAT, JaxEngineConfig(dp=2), progress=False, build=scripted_copy)
    return {"here": Engine, "elsewhere": RemoteEngine}[kind](TINY_CHAT, config(compile_cache), progress=False)


@pytest.fixture(scope="module", params=ENGINES)
def any_engine(request, compile_cache):
    engine = opened(request.param, compile_cache)
    yield engine
    engine.close()


def test_a_request_ends_once_with_as_many_tokens_as_it_asked_for(any_engine):
    results = generate(any_engine, [PROMPT, PROMPT[:1]], n=2, max_new_tokens=7, temperature=1.0)
    for result in [each for pair in results for each in pair]:
        assert (result.reason, len(result.tokens), result.last.error) == ("length", 7, None)
        assert all(0 <= token < any_engine.vocab_size for token in result.tokens)
    wait_until(lambda: any_engine.stats.running == any_engine.stats.waiting == 0)


def test_a_stop_id_ends_an_answer_and_is_told(any_engine):
    everything = frozenset(range(any_engine.vocab_size))
    (result,) = generate(any_engine, [PROMPT], stop_token_ids=everything)[0]
    assert result.reason == "stop"
    assert result.tokens == [result.last.stop_token]


def test_log_probabilities_come_one_a_token_and_the_prompts_once(any_engine):
    (result,) = generate(any_engine, [PROMPT], max_new_tokens=3, logprobs=1, prompt_logprobs=0)[0]
    assert sum(len(out.logprobs) for out in result.outputs) == 3
    (told,) = [out.prompt_logprobs for out in result.outputs if out.prompt_logprobs is not None]
    assert told[0] is None
    assert len(told) == len(PROMPT)


def test_what_is_aborted_ends_and_the_rest_goes_on(any_engine):
    one, all_of_them = Collector(2), Collector(2)
    first = submit(any_engine, PROMPT, one, n=2, max_new_tokens=200)
    second = submit(any_engine, PROMPT, all_of_them, n=2, max_new_tokens=200)
    wait_until(lambda: all(result.outputs for result in (*one.results, *all_of_them.results)))
    any_engine.abort(first.request_id, 1)
    any_engine.abort(second.request_id)
    any_engine.abort(second.request_id)
    any_engine.abort(10**9)
    assert one.wait()[0].reason == "length"
    assert one.results[1].reason in ("abort", "length")  # it may have been quicker
    assert {result.reason for result in all_of_them.wait()} <= {"abort", "length"}


@pytest.mark.parametrize(
    ("prompt", "params", "error", "name"),
    [
        ([], {}, RequestError, "no tokens"),
        ([5] * 100_000, {}, ContextLengthError, "100000 tokens"),
        ([5, 10**6], {}, RequestError, "The prompt"),
        ([-1], {}, RequestError, "The prompt"),
        (PROMPT, {"n": 10**4}, RequestError, "n=10000"),
        (PROMPT, {"stop_token_ids": frozenset({10**6})}, RequestError, "stop_token_ids"),
        (PROMPT, {"logit_bias": ((-1, 1.0),)}, RequestError, "logit_bias"),
        (PROMPT, {"ngram_size": 2000, "ngram_threshold": 2}, RequestError, "2000"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(any_engine, prompt, params, error, name):
    with pytest.raises(error, match=name):
        submit(any_engine, prompt, Collector(), **params)


@pytest.mark.parametrize("n", [1, 2])
def test_prompts_share_cached_pages_under_the_same_salt(any_engine, n):
    def cached(salt):
        (results,) = generate(any_engine, [EncodedPrompt(ids, salt=salt)], n=n, max_new_tokens=2)
        return {result.last.cached_tokens for result in results}

    ids = [10 + n] * (2 * PAGE_SIZE + 5)
    for salt in (b"", b"tenant 1", b"tenant 2"):
        assert cached(salt) == {0}
        assert cached(salt) == {2 * PAGE_SIZE}


def test_pages_before_a_span_are_shared_whatever_it_holds(any_engine):
    def cached(content, start=PAGE_SIZE + 20):
        prompt = EncodedPrompt(ids, (Span(start, PAGE_SIZE, content),))
        return generate(any_engine, [prompt], max_new_tokens=2)[0][0].last.cached_tokens

    ids = [20] * (4 * PAGE_SIZE + 1)
    assert cached(b"a cat") == 0
    assert cached(b"a cat") == 4 * PAGE_SIZE
    assert cached(b"a dog") == PAGE_SIZE
    assert cached(b"a cat", start=0) == 0
    plain = generate(any_engine, [ids], max_new_tokens=2)[0][0]
    assert plain.last.cached_tokens == PAGE_SIZE


def test_a_prompt_whose_positions_are_reported_is_computed_whole(any_engine):
    for _ in range(2):
        (result,) = generate(any_engine, [[30] * 2 * PAGE_SIZE], max_new_tokens=1, prompt_logprobs=0)[0]
        assert result.last.cached_tokens == 0


def test_a_listener_that_fails_ends_nobody(any_engine):
    def broken(out):
        raise ZeroDivisionError("mine")

    submit(any_engine, PROMPT, broken, max_new_tokens=3)
    assert generate(any_engine, [PROMPT], max_new_tokens=3)[0][0].reason == "length"


def test_an_engine_asleep_refuses_and_wakes(any_engine):
    any_engine.sleep()
    assert any_engine.sleeping
    with pytest.raises(EngineError, match="sleeping"):
        submit(any_engine, PROMPT, Collector())
    any_engine.wake()
    assert not any_engine.sleeping
    assert generate(any_engine, [PROMPT], max_new_tokens=3)[0][0].reason == "length"


def test_a_sleep_or_a_wake_that_is_refused_changes_nothing(any_engine):
    running = Collector()
    submit(any_engine, PROMPT, running, max_new_tokens=100)
    wait_until(lambda: running.results[0].outputs)
    with pytest.raises(RequestError, match="level=3"):
        any_engine.sleep(3)
    assert running.wait()[0].reason == "length"
    any_engine.sleep()
    with pytest.raises(RequestError, match="nonsense"):
        any_engine.wake(["weights", "nonsense"])
    any_engine.wake(["kv_cache"])
    assert any_engine.sleeping
    any_engine.wake()
    assert not any_engine.sleeping


@pytest.mark.parametrize("kind", ENGINES)
def test_closing_ends_what_runs_and_may_be_done_twice(kind, compile_cache):
    engine = opened(kind, compile_cache)
    assert engine.failure is None
    running = Collector()
    submit(engine, PROMPT, running, max_new_tokens=400)
    wait_until(lambda: running.results[0].outputs)
    engine.close()
    assert running.wait()[0].reason in ("abort", "length")
    engine.close()
    assert engine.failure is not None
    for refused in (partial(submit, engine, PROMPT, Collector()), engine.sleep):
        with pytest.raises(EngineError, match="closed"):
            refused()
