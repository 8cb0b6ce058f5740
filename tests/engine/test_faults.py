"""What goes wrong with one sequence ends that sequence, and no other."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.bench import checkpoint
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.core.sleep import _HostArray
from lmdeploy_jax.engine.request import Request, SamplingParams
from lmdeploy_jax.errors import LogitsError, RequestError
from lmdeploy_jax.prompt import EncodedPrompt
from lmdeploy_jax.sampling.repetition import NgramStop
from tests.engine.harness import Collector, Result, config, generate, submit, tokens
from tests.oracle import save_checkpoint
from tests.patience import PATIENCE

POISON = 250  # a token whose embedding is NaN in the model of these tests
PROMPT = [5, 77, 130, 9, 64, 201]
HEADS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 1.0, "top_k": 20, "seed": 3},
    "full": {"repetition_penalty": 1.1, "logprobs": 2},
}


class Panic(BaseException):
    """As a library written in Rust raises it: no Exception."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    folder = save_checkpoint("llama", tmp_path_factory.mktemp("poisoned") / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=[{}, {"decode_steps": 4}], ids=["single steps", "several steps"])
def fragile(poisoned, compile_cache, request):
    engine = Engine(poisoned, config(compile_cache, **request.param), progress=False)
    yield engine
    engine.close()


def holds_nan(engine: Engine) -> bool:
    return any(
        bool(np.isnan(np.asarray(array)).any()) for array in jax.tree.leaves(engine._runner.state.caches)
    )


def clean(result: Result) -> bool:
    return result.last.error is None and result.reason == "length"


@pytest.mark.parametrize("params", HEADS.values(), ids=HEADS)
def test_nan_ends_its_own_answer_and_is_not_left_in_the_cache(fragile, params):
    wanted = tokens(fragile, [PROMPT], **params)
    long = [POISON, *range(3, 203)]  # several pages, of which the prefix cache would keep some
    good, bad = generate(fragile, [PROMPT, long], **params)
    assert isinstance(bad[0].last.error, LogitsError)
    assert "NaN" in str(bad[0].last.error)
    assert (bad[0].reason, bad[0].tokens) == ("error", [])
    assert good[0].tokens == wanted[0]
    assert tokens(fragile, [PROMPT, long[1:]], **params)[0] == wanted[0]
    assert not holds_nan(fragile)
    fragile.scheduler.check_integrity()


def test_nan_in_mid_answer_keeps_what_came_before(fragile):
    """The poisonous token is drawn once it may be: the next step reads it."""
    late = {"logit_bias": ((POISON, 100.0),), "min_new_tokens": 5, "stop_token_ids": frozenset({2})}
    first, *_ = generate(fragile, [PROMPT], **late)[0]
    assert first.tokens == [POISON]
    assert isinstance(first.last.error, LogitsError)
    assert clean(generate(fragile, [PROMPT])[0][0])


def test_n_answers_to_a_poisonous_prompt_all_end(fragile):
    results = generate(fragile, [[POISON, 4, 5]], n=3, temperature=1.0)[0]
    assert all(isinstance(result.last.error, LogitsError) for result in results)
    fragile.scheduler.check_integrity()


def test_nan_of_a_prompt_that_is_aborted_spoils_no_page(fragile, monkeypatch):
    begun, collector = threading.Event(), Collector()
    monkeypatch.setattr(fragile, "on_step", lambda _: begun.set())
    request = submit(fragile, [POISON, *[5] * 400], collector)
    assert begun.wait(PATIENCE)
    fragile.abort(request.request_id)
    assert collector.wait()[0].reason == "abort"
    assert holds_nan(fragile)
    others = [[token] * 7 * PAGE_SIZE for token in range(6, 16)]  # of more pages than there are
    generate(fragile, others, max_new_tokens=1)
    assert not holds_nan(fragile)


def test_where_every_token_is_ruled_out_the_answer_says_so(engine):
    everything = tuple(range(engine.vocab_size))
    bad, good = generate(engine, [PROMPT], banned_token_ids=everything)[0][0], generate(engine, [PROMPT])
    assert isinstance(bad.last.error, LogitsError)
    assert "ruled out" in str(bad.last.error)
    assert clean(good[0][0])


def test_a_processor_that_returns_nan_is_named(engine):
    def spoiled(ids, logits):
        return logits * np.nan

    (bad,) = generate(engine, [PROMPT], logits_processors=(spoiled,))[0]
    assert "spoiled" in str(bad.last.error)
    assert "NaN" in str(bad.last.error)


@pytest.mark.parametrize("fault", [SystemExit(3), Panic("a panic"), ValueError("a bug")])
@pytest.mark.parametrize("n", [1, 3])
def test_a_slot_that_cannot_be_set_up_fails_its_sequence_only(engine, monkeypatch, fault, n):
    begin, met = engine._runner.begin, threading.Event()

    def broken(sequence):
        if sequence.params.top_k == 77:
            met.set()
            raise fault
        begin(sequence)

    monkeypatch.setattr(engine._runner, "begin", broken)
    bad, good = Collector(n), Collector()
    submit(engine, PROMPT, bad, n=n, top_k=77, temperature=1.0)
    submit(engine, PROMPT, good)
    assert [result.last.error for result in bad.wait()] == [fault] * n
    assert met.is_set()
    assert clean(good.wait()[0])
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_that_cannot_be_taken_in_is_told(engine, monkeypatch, n):
    def broken(self, *sizes):
        raise Panic("no n-grams today")

    monkeypatch.setattr(NgramStop, "feed", broken)
    wrong = generate(engine, [PROMPT], n=n, ngram_size=2, ngram_threshold=2)[0]
    assert all(isinstance(result.last.error, Panic) for result in wrong)

    class BrokenGrammar:
        def matcher(self, stop_ids):
            raise Panic("no matcher today")

    wrong = generate(engine, [PROMPT], n=n, grammar=BrokenGrammar())[0]
    assert all(isinstance(result.last.error, Panic) for result in wrong)
    assert clean(generate(engine, [PROMPT])[0][0])
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("fault", [SystemExit(3), Panic("a panic"), ValueError("a bug")])
def test_a_listener_or_processor_that_breaks_off_ends_nobody_else(engine, fault):
    def broken(*_):
        raise fault

    done = threading.Event()

    def listener(out):
        if out.finish_reason:
            done.set()
        raise fault

    engine.submit(Request(EncodedPrompt(PROMPT), SamplingParams(max_new_tokens=3), listener))
    (bad,) = generate(engine, [PROMPT], logits_processors=(broken,))[0]
    assert bad.last.error.__cause__ is fault
    assert done.wait(PATIENCE)
    assert clean(generate(engine, [PROMPT])[0][0])


@pytest.mark.parametrize(
    "params",
    [
        {"stop_token_ids": frozenset({257})},
        {"banned_token_ids": (3, 257)},
        {"banned_sequences": ((3, 257),)},
        {"logit_bias": ((-1, 1.0),)},
    ],
    ids=lambda params: next(iter(params)),
)
def test_ids_that_the_model_does_not_know_never_reach_the_engine(engine, params):
    with pytest.raises(RequestError, match="outside the vocabulary of 257"):
        submit(engine, PROMPT, Collector(), **params)
    assert clean(generate(engine, [PROMPT])[0][0])


@pytest.mark.parametrize("missing", ["host", "device"])
def test_a_sleep_or_wake_that_finds_no_memory_can_be_made_up_for(engine, monkeypatch, missing):
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    before = tokens(engine, [PROMPT])
    monkeypatch.setattr(engine._sleep_mode, "_reload", fail)  # the weights are in the host's memory
    if missing == "device":
        engine.sleep()
    with monkeypatch.context() as patch:
        patch.setattr(_HostArray, "__init__" if missing == "host" else "put", fail)
        with pytest.raises(MemoryError):
            (engine.sleep if missing == "host" else engine.wake)()
    assert engine.sleeping
    engine.wake()
    assert tokens(engine, [PROMPT]) == before


@pytest.mark.gpu
def test_nan_spoils_no_later_answer_through_any_kernel(tmp_path):
    """Long steps attend through Mosaic, which multiplies what stands behind a sequence's end with zero."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    folder = checkpoint.make("qwen2.5-0.5b", tmp_path)
    (shard,) = folder.glob("*.safetensors")
    weights = load_file(shard)
    weights["model.embed_tokens.weight"][POISON] = np.nan
    save_file(weights, shard, metadata={"format": "pt"})
    small_cache = JaxEngineConfig(
        session_len=4096, max_batch_size=4, cache_max_entry_count=5e7, enable_prefix_caching=False
    )
    engine = Engine(folder, small_cache, progress=False)
    try:
        long = [1000 + i for i in range(2300)]
        wanted = tokens(engine, [long])
        for _ in range(3):  # the pool holds few such prompts: their pages are used again
            (bad,) = generate(engine, [[*long[:50], POISON, *long[50:]]])[0]  # nearly all pages hold NaN
            assert isinstance(bad.last.error, LogitsError)
            assert tokens(engine, [long]) == wanted
            assert not holds_nan(engine)
    finally:
        engine.close()
