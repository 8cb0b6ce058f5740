"""The pipeline over a scripted engine: prompt forms, arguments, isolation of failures."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, Response, VisionConfig, pipeline
from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.errors import ConfigError, EngineError, RequestError
from tests.patience import wait_until
from tests.scripted import ENDLESS, RAW, TOKENIZER, Opener, echo, endless, ids, opener

ONE_AT_ONCE = JaxEngineConfig(vision_max_batch_size=1)


@pytest.fixture
def opened() -> Iterator[Opener]:
    with opener() as opened:
        yield opened


def test_one_prompt_gives_one_response_and_many_give_a_list_in_order(opened):
    pipe, _ = opened(echo)
    answer = pipe.infer("hello you", **RAW)
    assert isinstance(answer, Response)
    assert (answer.text, answer.finish_reason, answer.index) == ("hello you #0", "stop", 0)
    texts = [f"number {i}" for i in range(20)]
    answers = pipe.infer(texts, **RAW)
    assert [(a.text, a.index) for a in answers] == [(f"{t} #0", i) for i, t in enumerate(texts)]
    assert [a.text for a in pipe(["one"], **RAW)] == ["one #0"]
    assert pipe.infer([]) == []


def test_chat_forms_go_through_the_template(opened):
    pipe, engine = opened(lambda request, index: ids("ok"))
    message = {"role": "user", "content": "hi"}
    for prompts in ("hi", message, [message], ["hi"], [[message]]):
        pipe.infer(prompts)
    assert len({tuple(r.prompt.ids) for r in engine.seen}) == 1
    assert TOKENIZER.decode(engine.seen[0].prompt.ids, skip_special_tokens=False).count("<|im_start|>") >= 2
    pipe.infer([message], **RAW)
    assert list(engine.seen[-1].prompt.ids) == TOKENIZER.encode("hi")


def test_template_keywords_reach_the_template(opened):
    pipe, engine = opened(lambda request, index: ids("ok"))
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
    pipe.infer("hi")
    pipe.infer("hi", tools=[tool])
    pipe.infer("hi", enable_thinking=True)
    pipe.infer("hi", chat_template_kwargs={"enable_thinking": True})
    seen = [TOKENIZER.decode(request.prompt.ids, skip_special_tokens=False) for request in engine.seen]
    plain, tools, thinking, same = seen
    assert "weather" in tools
    assert thinking == same != plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": "x"}, "tools='x' is invalid"),
        ({"tools": [{"a": 1}]}, r"tools\[0\] must be an object"),
        ({"reasoning_effort": "banana"}, "reasoning_effort='banana' is unknown"),
        ({"chat_template_kwargs": {"self": 1}}, "'self' is set by the request itself"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs='x' is invalid"),
    ],
)
def test_what_no_template_can_be_given_is_refused(opened, fields, words):
    pipe, engine = opened(echo)
    for call in (pipe.infer, pipe.stream_infer, pipe.chat):
        with pytest.raises(RequestError, match=words):
            call("hi", **fields)
    assert not engine.seen


def test_variables_that_the_template_does_not_read_are_told_of_once(opened, caplog):
    pipe, _ = opened(lambda request, index: ids("ok"))
    for _ in range(2):
        pipe.infer("hi", chat_template_kwargs={"nonsense": 1, "enable_thinking": True, "documents": None})
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("without them: 'nonsense'")


def test_nulls_and_malformed_arguments_in_the_history(opened):
    """What an OpenAI client's `model_dump()` gives, and a call that a limit has cut."""
    pipe, engine = opened(lambda request, index: ids("ok"))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "cut'}}
    nulls = {"content": None, "refusal": None, "audio": None, "reasoning_content": None}
    user = {"role": "user", "content": "hi", "name": None}
    answer = pipe.infer([user, {"role": "assistant", **nulls, "tool_calls": [call]}, user])
    assert answer.text == "ok"
    prompt = TOKENIZER.decode(engine.seen[0].prompt.ids, skip_special_tokens=False)
    assert "None" not in prompt
    assert '{"name": "f", "arguments": {"a": "cut}' in prompt


def test_token_ids_are_taken_as_they_are(opened):
    pipe, _ = opened(echo)
    prompt = TOKENIZER.encode("one two")
    assert pipe.infer(input_ids=prompt).text == "one two #0"
    assert [a.text for a in pipe.infer(input_ids=[prompt, prompt[:1]])] == [
        "one two #0",
        TOKENIZER.decode(prompt[:1]) + " #0",
    ]
    assert pipe.infer(prompt).text == "one two #0"
    with pytest.raises(ValueError, match="exactly one of messages or input_ids"):
        pipe.infer("text", input_ids=prompt)
    with pytest.raises(ValueError, match="exactly one of messages or input_ids"):
        pipe.infer()


def test_each_prompt_may_have_its_own_config(opened):
    pipe, _ = opened(endless)
    configs = [GenerationConfig(max_new_tokens=n) for n in (1, 5, 3)]
    assert [a.generate_token_len for a in pipe.infer(["a", "b", "c"], configs)] == [1, 5, 3]
    with pytest.raises(ValueError, match="input gen_config length differs from the length of prompts"):
        pipe.infer(["a", "b"], configs)


def test_n_answers_come_as_choices(opened):
    pipe, _ = opened(echo)
    answer = pipe.infer("hello", GenerationConfig(n=3), **RAW)
    assert [answer.text, *(c.text for c in answer.choices)] == ["hello #0", "hello #1", "hello #2"]
    assert [c.choice for c in answer.choices] == [1, 2]
    texts = {}
    for piece in pipe.stream_infer("hello", gen_config=GenerationConfig(n=2), **RAW):
        texts[piece.choice] = texts.get(piece.choice, "") + piece.text
    assert texts == {0: "hello #0", 1: "hello #1"}


def test_stop_strings_end_an_answer_and_abort_it(opened):
    pipe, engine = opened(lambda request, index: ids("one two three", stop=False) + ENDLESS)
    answer = pipe.infer("x", GenerationConfig(stop_words=["two"], max_new_tokens=400))
    assert (answer.text, answer.finish_reason, answer.stop_match) == ("one ", "stop", "two")
    wait_until(lambda: engine.idle)
    assert engine.aborted == [(engine.seen[0].request_id, 0)]


def test_a_special_stop_word_stops_by_its_id_under_its_name(opened):
    pipe, _ = opened(lambda request, index: ids("one two"))
    config = GenerationConfig(stop_words=[TOKENIZER.eos_token], ignore_eos=True)
    answer = pipe.infer("x", config)
    assert (answer.text, answer.stop_match) == ("one two", TOKENIZER.eos_token)


def test_a_bad_prompt_fails_alone(opened):
    pipe, _ = opened(echo, session_len=40)
    bad_message = [{"role": "wizard", "content": "hi"}]
    long = "one two " * 60
    answers = pipe.infer(["good", bad_message, long, [99999], "too", "broken \ud800"], **RAW)
    assert [a.finish_reason for a in answers] == ["stop", "error", "error", "error", "stop", "error"]
    assert [a.index for a in answers] == list(range(6))
    assert [a.error_code for a in answers[1:4]] == [
        "invalid_request",
        "context_length_exceeded",
        "invalid_request",
    ]
    assert "wizard" in answers[1].error_message
    assert "maximum context length is 40 tokens" in answers[2].error_message
    assert "99999" in answers[3].error_message
    assert [answers[0].text, answers[4].text] == ["good #0", "too #0"]
    assert pipe.infer(bad_message).finish_reason == "error"


def test_an_engines_trouble_stays_with_its_prompt(opened):
    def script(request: Request, index: int) -> Iterator[int]:
        yield from ids("so far", stop=False)
        if len(request.prompt) == 1:
            raise RuntimeError("lost")
        yield TOKENIZER.eos_token_id

    pipe, _ = opened(script)
    bad, good = pipe.infer([[5], [5, 6]])
    assert (bad.text, bad.finish_reason, bad.error_code) == ("so far", "error", "internal_error")
    assert "lost" in bad.error_message
    assert good.finish_reason == "stop"


@pytest.mark.parametrize("prompts", [3, ("a", "b"), [["a"]], [None], object()])
def test_what_is_no_prompt_raises(opened, prompts):
    pipe, _ = opened(echo)
    with pytest.raises(ValueError, match="Unsupported prompts"):
        pipe.infer(prompts)


def test_unknown_and_unsupported_arguments_are_refused(opened):
    pipe, engine = opened(echo)
    with pytest.raises(TypeError, match=r"'max_new_tokens'.*GenerationConfig"):
        pipe.infer("hi", max_new_tokens=30)
    with pytest.raises(TypeError, match="'tool'"):
        pipe.stream_infer("hi", tool=[])
    with pytest.raises(RequestError, match="adapter_name='a'"):
        pipe.infer("hi", adapter_name="a")
    with pytest.raises(RequestError, match="do_preprocess=False"):
        pipe.infer("hi", enable_thinking=True, **RAW)
    assert not engine.seen


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"trust_remote_code": "no"}, TypeError, "trust_remote_code"),
        ({"speculative_config": object()}, ConfigError, "speculative_config"),
        ({"vision_config": object()}, ConfigError, "vision_config"),
        ({"vision_config": VisionConfig(2), "backend_config": ONE_AT_ONCE}, ConfigError, "differ"),
        ({"allowed_media_domains": "a.example"}, ConfigError, "allowed_media_domains"),
        ({"backend_config": {"tp": 1}}, ConfigError, "backend_config"),
        ({"log_level": "LOUD"}, ConfigError, "log_level"),
        ({"tp": 2}, TypeError, r"'tp'.*JaxEngineConfig\(tp=2\)"),
        ({"sesion_len": 2}, TypeError, "'sesion_len'"),
    ],
)
def test_what_pipeline_cannot_do_is_refused_before_loading(fields, error, text):
    with pytest.raises(error, match=text):
        pipeline("no such model", **fields)


def test_a_closed_pipeline_says_so(opened):
    pipe, _ = opened(echo)
    with pipe:
        pass
    pipe.close()
    with pytest.raises(EngineError, match="closed"):
        pipe.infer("hi")


def test_there_are_no_reward_models(opened):
    pipe, _ = opened(echo)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is not in reward model list"):
        pipe.get_reward_score([1, 2])


def test_perplexity_is_the_mean_loss_of_all_tokens_but_the_first(opened):
    pipe, engine = opened(echo)
    assert pipe.get_ppl([[3, 4, 8], [1, 9]]) == [6.0, 9.0]  # the script's log-probability is minus the id
    assert pipe.get_ppl([3, 4]) == [4.0]
    assert pipe.get_ppl({"input_ids": [3, 4], "attention_mask": [1, 1]}) == [4.0]  # as transformers gives it
    assert pipe.get_ppl([]) == []
    assert {(r.params.max_new_tokens, r.params.prompt_logprobs) for r in engine.seen} == {(1, 0)}
    with pytest.raises(RequestError, match=r"input_ids\[1\] has 1 tokens"):
        pipe.get_ppl([[1, 2], [1]])
    assert all(map(math.isfinite, pipe.get_ppl([[1, 2]] * 3)))
