"""The pipeline on the embedded model, with the real engine; transformers is the oracle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, Pipeline, Response, pipeline
from lmdeploy_jax.assets import TINY_CHAT
from tests.patience import PATIENCE

PROMPTS = ["What is 12 + 30?", "Spell candle.", "Name a colour."]
SHORT = GenerationConfig(max_new_tokens=12)
LONG = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Iterator[Pipeline]:
    config = JaxEngineConfig(
        dtype="float32",
        session_len=512,
        max_batch_size=8,
        max_prefill_token_num=96,
        cache_max_entry_count=64e6,
        eager_mode=True,
        compile_cache_dir=str(tmp_path_factory.mktemp("xla")),
    )
    with pipeline("tiny-chat", config, progress=False) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def hf() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(pipe) -> list[Response]:
    return pipe.infer(PROMPTS, GenerationConfig(max_new_tokens=24, logprobs=2, output_logits="generation"))


def test_answers_are_those_of_transformers(answers, hf):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_CHAT)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = hf.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.input_token_len == inputs["input_ids"].shape[1]
        assert answer.text == tokenizer.decode(out, skip_special_tokens=True)


def test_reports_agree_with_the_tokens(answers):
    for answer in answers:
        assert (
            len(answer.token_ids) == len(answer.logprobs) == len(answer.logits) == answer.generate_token_len
        )
        assert answer.logits.argmax(-1).tolist() == answer.token_ids
        best = [max(entry, key=entry.get) for entry in answer.logprobs]
        assert best == answer.token_ids


def test_streams_equal_complete_answers(pipe, answers):
    pieces: list[list[Response]] = [[] for _ in PROMPTS]
    for piece in pipe.stream_infer(PROMPTS, gen_config=GenerationConfig(max_new_tokens=24)):
        pieces[piece.index].append(piece)
    for parts, answer in zip(pieces, answers, strict=True):
        assert "".join(p.text for p in parts) == answer.text
        assert [t for p in parts for t in p.token_ids] == answer.token_ids
        assert parts[-1].finish_reason == answer.finish_reason


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_cuts_the_same_answer(pipe, answers, stream):
    text = answers[0].text
    word = text[len(text) // 2 :][:3]
    config = GenerationConfig(max_new_tokens=24, stop_words=[word])
    parts = list(pipe.stream_infer(PROMPTS[0], gen_config=config, stream_response=stream))
    assert "".join(p.text for p in parts) == text[: text.index(word)]
    assert (parts[-1].finish_reason, parts[-1].stop_match) == ("stop", word)


def test_perplexity_is_that_of_transformers_cold_and_cached(pipe, hf):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 2500, n).tolist() for n in (2, 130, 200)]
    expected = []
    for ids in sequences:
        with torch.no_grad():
            expected.append(hf(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item())
    np.testing.assert_allclose(pipe.get_ppl(sequences), expected, rtol=1e-4)
    np.testing.assert_allclose(pipe.get_ppl(sequences), expected, rtol=1e-4)


def test_prompt_logprobs_agree_with_the_logprobs_of_generation(pipe, answers):
    first = answers[0]
    prompt = pipe.tokenizer.encode(pipe.frontend.template.render([{"role": "user", "content": PROMPTS[0]}]))
    again = pipe.infer(prompt + first.token_ids, GenerationConfig(max_new_tokens=1, prompt_logprobs=0))
    told = [entry[t] for entry, t in zip(first.logprobs, first.token_ids, strict=True)]
    later = [entry[t] for entry, t in zip(again.prompt_logprobs[len(prompt) :], first.token_ids, strict=True)]
    np.testing.assert_allclose(later, told, atol=1e-4)


def test_seeds_decide_and_choices_differ(pipe):
    prompt = np.random.default_rng(1).integers(0, 2500, 20).tolist()  # nonsense: many answers are likely

    def answers(n: int, seed: int | None) -> list[tuple[int, ...]]:
        config = GenerationConfig(
            n=n,
            do_sample=True,
            temperature=2.0,
            top_k=0,
            random_seed=seed,
            max_new_tokens=12,
            ignore_eos=True,
        )
        first = pipe.infer(prompt, config)
        return [tuple(answer.token_ids) for answer in (first, *first.choices)]

    first = answers(3, 7)
    assert first == answers(3, 7)
    assert len({*first, *answers(1, 20), *answers(1, None), *answers(1, None)}) == 6


def test_words_can_be_banned_and_tokens_pushed(pipe, answers):
    first = answers[0].token_ids[0]
    banned = pipe.infer(PROMPTS[0], GenerationConfig(max_new_tokens=8, bad_token_ids=[first]))
    assert first not in banned.token_ids
    pair = pipe.tokenizer.decode(answers[0].token_ids[:3])
    without = pipe.infer(PROMPTS[0], GenerationConfig(max_new_tokens=8, bad_words=[pair.strip()]))
    assert pair.strip() not in without.text
    pushed = pipe.infer(PROMPTS[0], GenerationConfig(max_new_tokens=4, logit_bias={77: 1000.0}))
    assert pushed.token_ids == [77] * 4


def test_stop_ids_wait_for_min_new_tokens(pipe, answers):
    ids = answers[0].token_ids
    stop = GenerationConfig(max_new_tokens=24, stop_token_ids=[ids[0]])
    assert pipe.infer(PROMPTS[0], stop).token_ids == []
    late = GenerationConfig(max_new_tokens=24, stop_token_ids=[ids[0]], min_new_tokens=6)
    answer = pipe.infer(PROMPTS[0], late)
    assert answer.generate_token_len >= 6
    assert ids[0] not in answer.token_ids


def test_a_conversation_reuses_its_past(pipe):
    session = pipe.chat(LONG, gen_config=SHORT)
    assert session.response.cached_tokens == 0
    pipe.chat("And now?", session, SHORT)
    assert len(session.history) == 2
    assert session.response.cached_tokens >= 64
    assert session.response.cached_tokens % 64 == 0


def test_the_context_ends_an_answer(pipe):
    ids = [5] * 500
    answer = pipe.infer(ids, GenerationConfig(max_new_tokens=None, ignore_eos=True))
    assert (answer.finish_reason, answer.generate_token_len) == ("length", 12)
    full = pipe.infer([5] * 512, SHORT)
    assert "maximum context length is 512 tokens. However, your input resulted in 512 " in full.error_message


def test_an_aborted_session_frees_the_engine(pipe):
    session = pipe.session()
    config = GenerationConfig(max_new_tokens=None, ignore_eos=True)
    turn = pipe.chat("Count.", session, config, stream_response=True)
    next(turn)
    session.abort()
    assert list(turn)[-1].finish_reason == "abort"
    assert session.history == []
    assert pipe.infer(PROMPTS[1], SHORT).finish_reason in ("stop", "length")


def test_threads_get_their_own_answers(pipe, answers):
    got: dict[int, str] = {}

    def ask(i: int) -> None:
        config = GenerationConfig(max_new_tokens=24)
        got[i] = pipe.infer(PROMPTS[i % 3], config).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert got == {i: answers[i % 3].text for i in range(9)}


def test_user_processors_see_ids_and_logits(pipe):
    seen: list[int] = []

    def force(ids: list[int], logits: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        forced = np.full_like(logits, -np.inf)
        forced[100 + len(seen)] = 0
        return forced

    answer = pipe.infer(PROMPTS[0], GenerationConfig(max_new_tokens=3, logits_processors=[force]))
    assert answer.token_ids == [101, 102, 103]
    assert np.diff(seen).tolist() == [1, 1]
