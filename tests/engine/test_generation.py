"""What a request can ask for beyond greedy tokens, against transformers and against itself."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from lmdeploy_jax.errors import ContextLengthError, EngineError, RequestError
from tests.engine.conftest import COUNT
from tests.engine.harness import Collector, generate, submit, tokens
from tests.oracle import hf_logits
from tests.patience import PATIENCE

CLOSE = 5e-4  # 1e-4 of the largest logit


@pytest.fixture(scope="module")
def prompt(prompts):
    return prompts[2]


@pytest.fixture(scope="module")
def answer(expected):
    return expected[2]


@pytest.fixture(scope="module")
def all_logits(llama, prompt, answer):
    """Transformers' logits at every position of prompt and answer."""
    return hf_logits(llama, [*prompt, *answer[:-1]])


def one(engine, prompt, **params):
    return generate(engine, [prompt], **params)[0][0]


def log_softmax(logits):
    return torch.log_softmax(torch.tensor(logits), -1).numpy()


def test_a_stop_id_ends_the_answer_and_is_named(engine, prompt, answer):
    stop = answer[10]
    result = one(engine, prompt, stop_token_ids=frozenset([stop]))
    assert result.tokens == answer[: answer.index(stop) + 1]
    assert (result.reason, result.last.stop_token) == ("stop", stop)


def test_length_ends_the_answer(engine, prompt, answer):
    result = one(engine, prompt, max_new_tokens=5)
    assert (result.tokens, result.reason) == (answer[:5], "length")


def test_the_context_ends_the_answer(engine):
    result = one(engine, [5] * 500, max_new_tokens=100)
    assert (len(result.tokens), result.reason) == (engine.session_len - 500, "length")


def test_min_new_tokens_keeps_stop_ids_away(engine, prompt, answer):
    stop = frozenset(answer[:6])
    result = one(engine, prompt, stop_token_ids=stop, min_new_tokens=20, max_new_tokens=40)
    assert len(result.tokens) >= 20
    assert not stop & set(result.tokens[:20])


@pytest.mark.parametrize("least", [1, 2])
def test_the_first_token_is_no_stop_id_where_one_token_is_the_least(engine, prompt, answer, least):
    """Of siblings too, whose histories begin in the step that draws their first tokens."""
    wish = {"stop_token_ids": frozenset([answer[0]]), "logit_bias": ((answer[0], 100.0),)}
    for result in generate(engine, [prompt], min_new_tokens=least, n=2, **wish)[0]:
        assert (result.tokens.index(answer[0]), result.reason) == (least, "stop")


def test_banned_ids_and_biases_change_the_choice(engine, prompt, answer):
    assert answer[0] not in one(engine, prompt, banned_token_ids=(answer[0],)).tokens
    forced = one(engine, prompt, logit_bias=((42, 100.0),), max_new_tokens=4)
    assert forced.tokens == [42] * 4


def test_a_slot_forgets_the_biases_of_its_last_sequence(engine, prompts, expected):
    generate(engine, prompts, logit_bias=((42, 100.0),), max_new_tokens=2)
    assert tokens(engine, prompts, logprobs=1) == expected


def test_a_banned_sequence_is_broken_at_its_last_token(engine, prompt, answer):
    pair = (answer[3], answer[4])
    found = one(engine, prompt, banned_sequences=(pair,)).tokens
    assert found[:4] == answer[:4]
    assert pair not in itertools.pairwise(found)


def test_repetition_penalty_equals_transformers(engine, llama, prompt):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    want = model.generate(ids, max_new_tokens=24, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
    got = one(engine, prompt, repetition_penalty=1.3, max_new_tokens=24).tokens
    assert got == want[0, len(prompt) :].tolist()


def test_frequency_and_presence_penalties_count_generated_tokens(engine, prompt):
    plain = one(engine, prompt, max_new_tokens=60).tokens
    for name in ("frequency_penalty", "presence_penalty"):
        tamed = one(engine, prompt, max_new_tokens=60, **{name: 2.0}).tokens
        assert len(set(tamed)) > len(set(plain))


def test_logprobs_are_those_of_the_raw_logits(engine, prompt, answer, all_logits):
    result = one(engine, prompt, logprobs=3)
    want = log_softmax(all_logits[len(prompt) - 1 :])
    for i, out in enumerate(result.outputs[:COUNT]):
        (found,) = out.logprobs
        assert found.logprob == pytest.approx(want[i, answer[i]], abs=CLOSE)
        assert list(found.top) == np.argsort(-want[i])[:3].tolist()
        assert list(found.top.values()) == pytest.approx(np.sort(want[i])[::-1][:3], abs=CLOSE)


def test_prompt_logprobs_cover_every_position_but_the_first(engine, prompts, llama):
    long = prompts[-1]  # several chunks
    found = one(engine, long, prompt_logprobs=2, max_new_tokens=1).last.prompt_logprobs
    want = log_softmax(hf_logits(llama, long))
    assert found[0] is None
    assert len(found) == len(long)
    for i, entry in enumerate(found[1:]):
        assert entry.logprob == pytest.approx(want[i, long[i + 1]], abs=CLOSE)
        assert len(entry.top) == 2


@pytest.mark.parametrize("which", ["all", "generation"])
def test_logits_and_hidden_states_are_reported(engine, llama, prompt, all_logits, which):
    result = one(engine, prompt, logits=which, hidden=which)
    logits = np.concatenate([out.logits for out in result.outputs])
    hidden = np.concatenate([out.hidden for out in result.outputs])
    want = all_logits if which == "all" else all_logits[len(prompt) - 1 :]
    assert logits.shape == want.shape
    assert np.abs(logits - want).max() / np.abs(want).max() < 1e-4
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    head = model.lm_head.weight.detach().numpy()
    assert np.abs(hidden @ head.T - want).max() / np.abs(want).max() < 1e-4


def test_a_users_processor_sees_tokens_and_changes_logits(engine, prompt):
    seen = []

    def only_even(ids, logits):
        seen.append(list(ids))
        logits[1::2] = -np.inf
        return logits

    result = one(engine, prompt, logits_processors=(only_even,), max_new_tokens=6)
    assert all(token % 2 == 0 for token in result.tokens)
    assert seen == [[*prompt, *result.tokens[:i]] for i in range(6)]


def test_a_failing_processor_ends_its_own_request_only(engine, prompt, answer):
    def broken(ids, logits):
        raise ZeroDivisionError("mine")

    bad, good = Collector(), Collector()
    submit(engine, prompt, good)
    submit(engine, prompt, bad, logits_processors=(broken,))
    error = bad.wait()[0].last.error
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert "logits processor" in str(error)
    assert "ZeroDivisionError: mine" in str(error)
    assert good.wait()[0].tokens == answer


def test_repeated_ngrams_end_the_answer(engine, prompt):
    result = one(
        engine, prompt, logit_bias=((42, 100.0),), ngram_size=2, ngram_threshold=3, max_new_tokens=50
    )
    assert (result.tokens, result.reason) == ([42] * 4, "stop")


def test_sampling_follows_temperature_and_top_k(engine, prompt, answer):
    nearly_greedy = one(engine, prompt, temperature=1e-4, seed=3)
    assert nearly_greedy.tokens == answer
    assert one(engine, prompt, temperature=2.0, top_k=1, seed=3).tokens == answer
    assert one(engine, prompt, temperature=2.0, seed=3).tokens != answer


def test_mixed_requests_each_get_what_they_asked_for(engine, prompts, expected):
    collectors = [Collector() for _ in range(3)]
    wishes = ({}, {"temperature": 1.0, "seed": 4}, {"repetition_penalty": 1.2, "logprobs": 2})
    for collector, wish in zip(collectors, wishes, strict=True):
        submit(engine, prompts[2], collector, **wish)
    together = [collector.wait()[0].tokens for collector in collectors]
    assert together[0] == expected[2]
    assert together == [tokens(engine, prompts[2:3], **wish)[0] for wish in wishes]


@pytest.mark.parametrize("index", [0, 1, None])
def test_an_early_abort_ends_what_it_names(engine, prompt, answer, index):
    collector = Collector(2)
    request = submit(engine, prompt, collector, n=2)
    engine.abort(request.request_id, index)
    reasons = [result.reason for result in collector.wait()]
    assert "abort" in reasons
    if index == 1:
        assert reasons[1] == "abort"


@pytest.mark.parametrize(
    ("bad", "params", "error", "text"),
    [
        ([], {}, RequestError, "no tokens"),
        ([5] * 512, {}, ContextLengthError, r"length is 512 tokens\. .* 512 tokens,"),
        ([5, 257], {}, RequestError, "257, which is outside the vocabulary of 257"),
        ([-1], {}, RequestError, "-1, which is outside"),
        ([5], {"n": 9}, RequestError, "n=9 .* at most 8"),
    ],
)
def test_what_cannot_be_served_is_refused(engine, bad, params, error, text):
    with pytest.raises(error, match=text):
        submit(engine, bad, lambda out: None, **params)


def test_a_listener_that_fails_disturbs_no_one(engine, prompts, expected):
    def broken(out):
        raise RuntimeError("listener")

    submit(engine, prompts[0], broken, max_new_tokens=3)
    assert tokens(engine, prompts) == expected


def test_a_closed_engine_says_so(llama, compile_cache, prompts):
    from lmdeploy_jax.engine.core.engine import Engine
    from tests.engine.harness import config

    engine = Engine(llama, config(compile_cache), progress=False)
    running = Collector()
    submit(engine, prompts[0], running, max_new_tokens=400)
    engine.close()
    engine.close()
    assert running.wait()[0].reason in ("abort", "length")
    with pytest.raises(EngineError, match="closed"):
        submit(engine, prompts[0], Collector())


def test_an_engine_that_breaks_fails_its_requests_and_hangs_no_one(llama, compile_cache, prompts):
    from lmdeploy_jax.engine.core.engine import Engine
    from tests.engine.harness import config

    engine = Engine(llama, config(compile_cache), progress=False)
    engine._runner.forward = lambda step: 1 / 0
    running = Collector()
    submit(engine, prompts[0], running)
    assert "ZeroDivisionError" in str(running.wait()[0].last.error)
    engine._thread.join(PATIENCE)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        submit(engine, prompts[0], Collector())


FORGETFUL = """
import sys
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.prompt import EncodedPrompt
from tests.engine.harness import Collector, config, submit
engine = Engine(sys.argv[1], config(sys.argv[2]), progress=False)
submit(engine, [5], Collector(), max_new_tokens=400)
"""


def test_a_script_may_end_without_closing(llama, compile_cache):
    command = [sys.executable, "-c", FORGETFUL, str(llama), str(compile_cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
