"""What a person sees who uses the pipeline for the first time, or by mistake."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest

from lmdeploy_jax import GenerationConfig, Response, arguments
from tests.scripted import RAW, echo, opener


@pytest.fixture
def opened():
    with opener() as opened:
        yield opened


@pytest.fixture
def said(caplog):
    """The warnings in the log so far, one text each."""
    caplog.set_level(logging.WARNING, "lmdeploy_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def test_each_failed_prompt_is_logged_once(opened, said):
    pipe, _ = opened(echo, session_len=40)
    answers = pipe.infer(["good", [{"role": "wizard", "content": "hi"}], "one two " * 60], **RAW)
    assert [answer.text == "" for answer in answers] == [False, True, True]
    assert said() == [f"prompt {i} failed: {answers[i].error_message}" for i in (1, 2)]


@pytest.mark.parametrize("config", [{"stop_token_ids": [99999]}, {"logit_bias": {99999: 1.0}}])
def test_a_setting_that_cannot_be_served_is_logged(opened, said, config):
    pipe, _ = opened(echo)
    answer = pipe.infer("hi", GenerationConfig(**config), **RAW)
    assert said() == [f"prompt 0 failed: {answer.error_message}"]
    list(pipe.stream_infer("hi", gen_config=GenerationConfig(**config)))
    pipe.chat("hi", gen_config=GenerationConfig(**config))

    async def listen():
        return [piece async for piece in pipe.async_stream("hi", GenerationConfig(**config))]

    asyncio.run(listen())
    assert len(said()) == 4
    assert len(set(said())) == 1


def test_an_answer_that_fails_in_the_engine_is_logged_once_with_n_answers(opened, said):
    def script(request, index):
        if index == 1:
            raise RuntimeError("lost")
        yield from echo(request, index)

    pipe, _ = opened(script)
    answer = pipe.infer("hi", GenerationConfig(n=2), **RAW)
    assert [answer.finish_reason, answer.choices[0].finish_reason] == ["stop", "error"]
    assert [text for text in said() if text.startswith("prompt 0 failed:") and "lost" in text] == said()
    assert len(said()) == 1


def test_sampling_fields_without_do_sample_are_told_of_once(opened, said):
    arguments._warn_of_greedy.cache_clear()
    pipe, _ = opened(echo)
    hot = GenerationConfig(temperature=1.5, top_p=0.5)
    for _ in range(3):
        pipe.infer(["a", "b"], [hot, hot])
        pipe.chat("a", gen_config=hot)
    (text,) = said()
    assert text.startswith("temperature, top_p of GenerationConfig: no effect, since do_sample is off")


def test_greedy_and_sampling_configs_are_not_told_of(opened, said):
    arguments._warn_of_greedy.cache_clear()
    pipe, _ = opened(echo)
    for fields in ({}, {"temperature": 0}, {"do_sample": True, "temperature": 1.5}):
        pipe.infer("a", GenerationConfig(**fields))
    assert said() == []


@pytest.mark.parametrize("prompt", [5, None, [], ["hi"], [3], {1, 2}, object()])
def test_what_is_no_turn_is_told_at_the_door(opened, prompt):
    pipe, engine = opened(echo)
    with pytest.raises(ValueError, match="A turn is a text, a pair of a text and an image"):
        pipe.chat(prompt)
    assert not engine.seen


def test_what_is_no_session_is_told_at_the_door(opened):
    pipe, engine = opened(echo)
    with pytest.raises(TypeError, match="session must be a Session"):
        pipe.chat("hi", "x")
    with pytest.raises(TypeError, match="gen_config must be a GenerationConfig"):
        pipe.chat("hi", gen_config={"n": 1})
    with pytest.raises(TypeError, match="gen_config must be a GenerationConfig"):
        asyncio.run(anext(pipe.async_stream("hi", {"n": 1})))
    assert not engine.seen


@pytest.mark.parametrize("name", ["do_preprocess", "use_tqdm", "stream_response"])
def test_a_text_is_no_switch(opened, name):
    pipe, engine = opened(echo)
    call = pipe.stream_infer if name == "stream_response" else pipe.infer
    with pytest.raises(TypeError, match=f"{name}='no' is a text: give True or False"):
        call("hi", **{name: "no"})
    assert not engine.seen


def test_a_session_shows_its_turns_and_its_answer(opened):
    pipe, _ = opened(lambda request, index: [])
    session = pipe.session()
    assert repr(session) == f"<Session {session.session_id}: 0 turns>"
    session.history.append(("hi", "hello " * 30))
    session.response = Response("hello " * 30, 60, 3, "stop")
    assert repr(session).startswith(f"<Session {session.session_id}: 1 turns, answer 'hello hello")
    assert len(repr(session)) < 120


def test_a_response_shows_the_fields_that_say_something():
    assert repr(Response("hi", 2, 3)) == "Response(text='hi', generate_token_len=2, input_token_len=3)"
    full = Response("hi", 2, 3, "stop", [5, 6], logits=np.zeros((2, 7), np.float32), index=1)
    assert repr(full).endswith("finish_reason='stop', token_ids=[5, 6], logits=float32[2, 7], index=1)")
    failed = Response("", 0, 3, "error", error_message="too long")
    assert "error_message='too long'" in repr(failed)
