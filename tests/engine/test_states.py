"""Recurrent layers keep a state a slot, and every path still gives transformers' tokens."""

import pytest

from lmdeploy_jax.cache.kinds import StateCache
from lmdeploy_jax.cache.kv import page_bytes, plan_memory
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.errors import ConfigError
from tests.engine.conftest import COUNT
from tests.engine.harness import Collector, generate, submit, tokens
from tests.oracle import hf_greedy, save_checkpoint

OTHERS = [pytest.param(name, marks=pytest.mark.full) for name in ("nemotron_h", "falcon_h1", "lfm2_moe")]


@pytest.fixture(scope="module", params=["qwen3_next", *OTHERS])
def folder(request, tmp_path_factory):
    return save_checkpoint(request.param, tmp_path_factory.mktemp("states") / request.param)


def test_batched_chunked_and_repeated_prompts_are_answered_as_alone(start, folder, prompts, answers):
    engine = start()
    assert tokens(engine, prompts) == answers
    again = generate(engine, prompts[-1:])[0][0]
    assert (again.tokens, again.last.cached_tokens) == (answers[-1], 192)
    for end, cached in ((1, 0), (2, 128)):  # the second to share a begin keeps its state, the third finds it
        prompt = prompts[-1][:130] + prompts[end]
        (result,) = generate(engine, [prompt])[0]
        assert (result.tokens, result.last.cached_tokens) == (hf_greedy(folder, prompt, COUNT), cached)


def test_an_answer_that_stopped_late_leaves_no_state_behind(start, folder, prompts, answers):
    """Steps under way go on beyond a stop; the next turn of the conversation must not see it."""
    engine = start(decode_steps=4)
    stopped = answers[2][20]
    (ended,) = generate(engine, [prompts[2]], stop_token_ids=frozenset({stopped}))
    turn = prompts[2] + ended[0].tokens + prompts[1]
    (result,) = generate(engine, [turn])[0]
    assert (
        result.last.cached_tokens == 0
    )  # the first turn had one full page, whose last token drew the answer
    assert result.tokens == hf_greedy(folder, turn, COUNT)
    (result,) = generate(engine, [turn])[0]
    assert (result.tokens, result.last.cached_tokens) == (hf_greedy(folder, turn, COUNT), 128)


def test_small_chunks_and_several_decode_steps_equal_large_and_single_ones(start, prompts, answers):
    engine = start(max_prefill_token_num=16, decode_steps=3)
    assert tokens(engine, prompts) == answers


def test_preempted_sequences_equal_undisturbed_ones(start, folder, prompts, answers):
    layout = read_config(folder).cache_layout(1, session_len=256, step_tokens=256)
    size = page_bytes(layout.paged, "float32")
    engine = start(cache_max_entry_count=6 * size, session_len=256)
    assert engine.memory.num_pages == 6
    assert tokens(engine, prompts[1:] * 2) == answers[1:] * 2
    assert engine.scheduler.preemptions


def test_forked_sequences_equal_single_ones(start, prompts, answers):
    engine = start()
    for results, answer in zip(generate(engine, prompts, n=3), answers, strict=True):
        assert [result.tokens for result in results] == [answer] * 3


@pytest.mark.full
def test_a_slot_keeps_nothing_of_sequences_that_ended_early(start, prompts, answers):
    """One slot: an abort and a stop leave steps under way behind them, then others begin there."""
    engine = start(max_batch_size=1, decode_steps=4)
    aborted = Collector()
    request = submit(engine, prompts[-1], aborted, max_new_tokens=300)
    stopped = answers[2][2]
    want = answers[2][: answers[2].index(stopped) + 1]
    engine.abort(request.request_id)
    aborted.wait()
    (ended,) = generate(engine, [prompts[2]], stop_token_ids=frozenset({stopped}))
    assert ended[0].tokens == want
    assert tokens(engine, prompts[:2]) == answers[:2]


def test_states_are_new_after_a_sleep(start, prompts, answers):
    engine = start()
    assert tokens(engine, prompts[1:2]) == answers[1:2]
    engine.sleep(1)
    engine.wake()
    assert tokens(engine, prompts[1:2]) == answers[1:2]


def test_the_memory_plan_counts_states(start):
    engine = start(max_batch_size=3)
    each = sum(kind.slot_bytes(4) for kind in engine.facts.cache_layout.states)
    assert StateCache((4, 3, 56), (8, 16, 12)).slot_bytes(4) == 4 * (4 * 3 * 56 + 8 * 16 * 12)
    assert engine.memory.states == 7 * each  # three slots, three states behind prefixes, and nobody's
    assert f"{7 * each * 1e-9:.2f} GB of them for states" in str(engine.memory)
    assert start(max_batch_size=3, enable_prefix_caching=False).memory.states == 4 * each


def test_states_without_room_are_named():
    model = build_config({"architectures": ["Qwen3NextForCausalLM"], "hidden_size": 64, "vocab_size": 99,
                          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                          "intermediate_size": 96}, "config.json")  # fmt: skip
    layout = model.cache_layout(1, session_len=64, step_tokens=64)
    how = {"share": 0.9, "free": 10**6, "reserved": 0, "session_len": 64, "sequences": 8, "on_cpu": False}
    with pytest.raises(ConfigError, match=r"States of 8 sequences take 50\.000 MB\."):
        plan_memory(layout, 1000, states=50_000_000, **how)
