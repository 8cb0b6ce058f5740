"""Copies of the model in processes of their own answer as one engine does, and share the work sensibly."""

from __future__ import annotations

import os
from functools import partial

import psutil
import pytest

from lmdeploy_jax import GenerationConfig, pipeline
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.process.replicas import REQUEST_TOKENS, KnownPrefixes, Replicas
from lmdeploy_jax.errors import EngineError
from lmdeploy_jax.prompt import EncodedPrompt
from tests.engine.harness import Collector, config, generate, submit, tokens
from tests.fake_engine import FakeEngine
from tests.patience import wait_until

FATAL = 999  # a prompt that ends its engine's process
PAGES = 4  # of a prompt
ANSWER = 10**6  # more tokens than a test waits for


def script(rank, request, index):
    if FATAL in request.prompt.ids:
        os._exit(3)
    return (rank for _ in range(10**9))


def copy(rank, model, config, progress):
    """Its answers tell which copy gave them."""
    return FakeEngine(TINY_CHAT, partial(script, rank), session_len=10**7)


def broken(rank, model, config, progress):
    if rank:
        raise EngineError("no memory")
    return copy(rank, model, config, progress)


def opened():
    engine = Replicas(TINY_CHAT, JaxEngineConfig(dp=3), progress=False, build=copy)
    yield engine
    engine.close()
    assert not any(psutil.pid_exists(each._process.pid) for each in engine._engines)


doomed = pytest.fixture(opened)
shared = pytest.fixture(opened, scope="module")


@pytest.fixture
def three(shared):
    """Idle ones, which know prompts of other tests."""
    yield shared
    for engine in shared._engines:
        for request_id in list(engine._live):
            engine.abort(request_id)
    wait_until(lambda: not any(engine.unfinished for engine in shared._engines))


def text(seed, pages=PAGES):
    return [(seed * 7919 + i) % FATAL for i in range(pages * PAGE_SIZE + 1)]


def asked(engine, prompt, **params):
    """The copy that answers, and how to wait for the end of the answer."""
    collector = Collector()
    request = submit(engine, prompt, collector, **({"max_new_tokens": ANSWER} | params))
    wait_until(lambda: collector.results[0].tokens)
    return collector.results[0].tokens[0], request, collector


def test_requests_without_a_common_prefix_are_spread(three):
    assert [asked(three, text(10 + i))[0] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    wait_until(lambda: three.stats.running == 6)
    assert three.max_batch_size == 3 * three._engines[0].max_batch_size


def test_a_conversation_stays_where_its_pages_are(three):
    homes = [asked(three, text(20 + i), max_new_tokens=500)[0] for i in range(3)]
    assert sorted(homes) == [0, 1, 2]
    for turn in (5, 6):
        for i in (2, 0, 1):
            rank, _, collector = asked(three, text(20 + i, turn), max_new_tokens=2)
            assert rank == homes[i]
            collector.wait()


def test_a_prefix_that_all_share_spreads_once_its_copy_has_much_to_do(three):
    ranks = [asked(three, text(30))[0] for _ in range(12)]
    alone = PAGES * PAGE_SIZE // REQUEST_TOKENS
    assert ranks[: alone + 1] == [0] * (alone + 1)
    assert max(map(ranks.count, range(3))) == alone + 1  # and then as many as the first


def test_an_abort_reaches_the_copy_that_runs_it(three):
    _, request, collector = asked(three, text(40))
    three.abort(request.request_id)
    assert collector.wait()[0].reason == "abort"
    wait_until(lambda: three.stats.running == 0)


def test_a_copy_that_ends_takes_only_its_own_requests_along(doomed):
    asked(doomed, text(0))
    rank, _, survivor = asked(doomed, text(1), max_new_tokens=2000)
    (lost,) = generate(doomed, [[FATAL]])[0]
    assert (rank, lost.reason) == (1, "error")
    assert isinstance(lost.last.error, EngineError)
    wait_until(lambda: doomed._engines[2].failure is not None)
    assert doomed.failure is None
    assert doomed.max_batch_size == 2 * doomed.facts.max_batch_size
    assert {asked(doomed, text(2 + i))[0] for i in range(4)} == {0, 1}
    assert survivor.wait()[0].reason == "length"


def test_when_the_last_has_ended_requests_are_refused(doomed):
    for engine in doomed._engines:
        generate(doomed, [[FATAL]])
        wait_until(lambda engine=engine: engine.failure is not None)
    wait_until(lambda: doomed.failure is not None)
    with pytest.raises(EngineError, match="exit code 3"):
        submit(doomed, [5], Collector())


def test_sleeping_is_for_all_of_them(three):
    three.sleep()
    assert three.sleeping
    with pytest.raises(EngineError, match="sleeping"):
        submit(three, [5], Collector())
    three.wake()
    assert not three.sleeping
    assert len(generate(three, [[5]], max_new_tokens=3)[0][0].tokens) == 3


def test_one_that_cannot_start_ends_the_others():
    before = set(psutil.Process().children())
    with pytest.raises(EngineError, match="no memory"):
        Replicas(TINY_CHAT, JaxEngineConfig(dp=2), progress=False, build=broken)
    wait_until(lambda: not {p for p in psutil.Process().children() if p.name().startswith("python")} - before)


def test_pages_given_last_are_forgotten_last_and_the_first_of_a_prompt_after_the_others():
    known = KnownPrefixes(3)
    one, two = (known.hashes(EncodedPrompt(text(i, 2))) for i in (1, 2))
    assert len(one) == 2
    known.add(one)
    assert (known.tokens(one), known.tokens(two)) == (2 * PAGE_SIZE, 0)
    known.add(two)
    assert (known.tokens(one), known.tokens(two)) == (PAGE_SIZE, 2 * PAGE_SIZE)


def test_a_salt_keeps_prefixes_apart_and_no_cache_knows_none():
    known = KnownPrefixes(10)
    known.add(known.hashes(EncodedPrompt(text(1))))
    assert known.tokens(known.hashes(EncodedPrompt(text(1), salt=b"tenant"))) == 0
    assert KnownPrefixes(0).hashes(EncodedPrompt(text(1))) == []


@pytest.mark.full
def test_two_copies_answer_as_one_engine_does(llama, prompts, expected, compile_cache):
    two = Replicas(llama, config(compile_cache, dp=2), progress=False)
    assert tokens(two, prompts[:2], max_new_tokens=len(expected[0])) == expected[:2]
    two.close()


@pytest.mark.full
def test_a_pipeline_has_copies_too(compile_cache):
    with pipeline("tiny-chat", backend_config=config(compile_cache, dp=2)) as two:
        answers = two(["What is 12 + 30?"] * 3, GenerationConfig(max_new_tokens=8))
    assert ["42" in answer.text for answer in answers] == [True] * 3
