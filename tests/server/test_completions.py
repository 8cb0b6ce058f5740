"""Text completions through OpenAI's client, on the embedded model."""

from __future__ import annotations

import openai
import pytest

from lmdeploy_jax import GenerationConfig
from tests.server.test_chat import MODEL

PROMPTS = ["<|im_start|>user\nSpell cat.<|im_end|>\n<|im_start|>assistant\n", "one two three"]


def complete(client, prompt=PROMPTS[0], **fields):
    return client.completions.create(model=MODEL, prompt=prompt, **({"max_tokens": 12} | fields))


@pytest.fixture(scope="module")
def expected(pipe):
    """What the pipeline makes of the prompts."""
    return pipe.infer(PROMPTS, GenerationConfig(max_new_tokens=12, logprobs=3), do_preprocess=False)


def test_texts_and_tokens_go_on_as_in_the_pipeline(client, pipe, expected):
    texts = [r.text for r in expected]
    ids = [pipe.tokenizer.encode(p) for p in PROMPTS]
    assert complete(client).choices[0].text == texts[0]
    assert complete(client, ids[0]).choices[0].text == texts[0]
    for prompts in (PROMPTS, ids):
        answer = complete(client, prompts)
        assert [(c.index, c.text) for c in answer.choices] == list(enumerate(texts))
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.id.startswith("cmpl-")


def test_streams_of_several_prompts_keep_them_apart(client, expected):
    texts = ["", ""]
    chunks = list(complete(client, PROMPTS, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [r.text for r in expected]
    assert chunks[-1].usage.completion_tokens == sum(r.generate_token_len for r in expected)


def test_n_answers_of_each_prompt_have_their_own_index(client):
    answer = complete(client, PROMPTS, n=2, temperature=1.0, seed=3, max_tokens=6)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    again = complete(client, PROMPTS, n=2, temperature=1.0, seed=3, max_tokens=6)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices]


def test_logprobs_tell_text_and_the_sampled_token(client, pipe, expected):
    told = complete(client, logprobs=3).choices[0].logprobs
    wanted = expected[0]
    assert told.tokens == [pipe.tokenizer.token_text(i) for i in wanted.token_ids]
    assert told.token_logprobs == pytest.approx(
        [entry[i] for i, entry in zip(wanted.token_ids, wanted.logprobs, strict=True)], abs=1e-4
    )
    assert all(
        token in best and 3 <= len(best) <= 4
        for token, best in zip(told.tokens, told.top_logprobs, strict=True)
    )
    assert told.text_offset[:2] == [0, len(told.tokens[0])]


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_echo_scores_the_prompt(client, pipe, max_tokens):
    prompt = PROMPTS[1]
    ids = pipe.tokenizer.encode(prompt)
    (choice,) = complete(client, prompt, echo=True, logprobs=1, max_tokens=max_tokens).choices
    assert choice.text.startswith(prompt)
    assert (choice.text == prompt) == (max_tokens == 0)
    scores = choice.logprobs.token_logprobs
    assert len(scores) == len(ids) + max_tokens
    assert scores[0] is None
    mean = -sum(scores[1 : len(ids)]) / (len(ids) - 1)
    assert mean == pytest.approx(pipe.get_ppl(ids)[0], abs=1e-4)


def test_the_stop_string_that_ended_it_is_reported(client):
    (choice,) = complete(client, stop=["zz", "a-"]).choices
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == "a-"
    assert "a-" not in choice.text
    (kept,) = complete(client, stop="a-", extra_body={"include_stop_str_in_output": True}).choices
    assert kept.text == choice.text + "a-"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_what_cannot_be_done_is_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
def test_one_bad_prompt_of_several_is_an_error(client, stream):
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        complete(client, [[5, 6], [5, 99999]], stream=stream)
