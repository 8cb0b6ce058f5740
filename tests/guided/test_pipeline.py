"""Guided answers of the embedded model through the real engine, in a pool that is too small for all."""

from __future__ import annotations

import json
import re
import threading

import jsonschema
import pytest

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, Pipeline, Response, pipeline
from lmdeploy_jax.engine.core.compile import CompileCounter
from lmdeploy_jax.guided import tool_grammar
from lmdeploy_jax.text.parsers import AnswerParser, collect, tool_format

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "friend": {"type": "boolean"},
    },
    "required": ["name", "age", "friend"],
    "additionalProperties": False,
}
COLOURS = {"type": "array", "items": {"enum": ["red", "green", "sky blue"]}, "minItems": 1, "maxItems": 5}
SUM = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 99}, {"const": "unknown"}]}
PROMPTS = ["What is 12 + 30?", "Spell candle.", "Name a colour."]
WILD = {"do_sample": True, "temperature": 1.5, "top_k": 0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    config = JaxEngineConfig(
        dtype="float32",
        session_len=512,
        max_batch_size=8,
        max_prefill_token_num=96,
        cache_max_entry_count=3e6,
        eager_mode=True,
        compile_cache_dir=str(tmp_path_factory.mktemp("xla")),
    )
    with pipeline("tiny-chat", config, progress=False) as pipe:
        yield pipe


def schema_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def guided(form: dict | None, **fields: object) -> GenerationConfig:
    return GenerationConfig(response_format=form, **({"max_new_tokens": 200} | fields))


def ask(pipe: Pipeline, form: dict | None, prompts: list[str] = PROMPTS, **fields: object) -> list[Response]:
    found = pipe.infer(prompts, guided(form, **fields))
    assert isinstance(found, list)
    assert [answer.error_message for answer in found] == [None] * len(prompts)
    return found


@pytest.mark.parametrize("schema", [PERSON, COLOURS, SUM])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_json_fits_its_schema_however_wild_the_sampling(schema, seed, pipe):
    sampling = {} if seed is None else WILD | {"random_seed": seed}
    for answer in ask(pipe, schema_format(schema), **sampling):
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), schema)


@pytest.mark.parametrize("sampling", [{}, WILD])
def test_expressions_choices_and_grammars(sampling, pipe):
    cases = {
        r"[A-Z][a-z]{2,5} [0-9]{3}": {"type": "regex_schema", "regex_schema": r"[A-Z][a-z]{2,5} [0-9]{3}"},
        "maybe|no": {"type": "choice", "choice": ["maybe", "no"]},
        r"-?\d(\+\d){0,3}": {"type": "grammar", "grammar": 'start: "-"? D ("+" D){0,3}\nD: /[0-9]/'},
    }
    for pattern, form in cases.items():
        for answer in ask(pipe, form, **sampling):
            assert re.fullmatch(pattern, answer.text), answer.text
            assert answer.finish_reason == "stop"


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "random_seed": 5}, {"repetition_penalty": 1.2}])
def test_a_grammar_that_allows_everything_changes_nothing(sampling, pipe):
    free = ask(pipe, None, max_new_tokens=24, logprobs=1, **sampling)
    same = ask(pipe, {"type": "regex", "regex": r"(.|\n)*"}, max_new_tokens=24, logprobs=1, **sampling)
    assert [a.token_ids for a in same] == [a.token_ids for a in free]
    assert [a.finish_reason for a in same] == [a.finish_reason for a in free]
    for a, b in zip(same, free, strict=True):
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert x == pytest.approx(y, abs=1e-4)


@pytest.mark.parametrize("thinking", [{"enable_thinking": True}, {"reasoning_effort": "none"}])
def test_the_form_begins_at_once_whether_the_template_speaks_of_thinking_or_not(thinking, pipe):
    """A pipeline tells no reasoning apart, so that a text with a form is the form."""
    form = {"type": "choice", "choice": ["maybe", "\n\nno"]}
    for answer in pipe.infer(PROMPTS, guided(form), **thinking):
        assert answer.text in form["choice"]


def test_what_ends_a_form_is_no_part_of_it_unless_it_was_named(pipe):
    form, end = {"type": "regex", "regex": "[0-9]+"}, pipe.tokenizer.eos_token
    shown = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    (plain,) = ask(pipe, form, PROMPTS[:1], **shown)
    (named,) = ask(pipe, form, PROMPTS[:1], stop_words=[end], **shown)
    assert (plain.text, named.text) == ("42", f"42{end}")


def test_strangers_in_the_batch_are_left_alone(pipe):
    plain = guided(None, max_new_tokens=24)
    drawn = guided(None, max_new_tokens=24, do_sample=True, random_seed=4)
    alone = pipe.infer(PROMPTS[:2], [plain, drawn])
    mixed = pipe.infer(
        [PROMPTS[0], *PROMPTS, PROMPTS[1]],
        [plain, *[guided(schema_format(PERSON)) for _ in PROMPTS], drawn],
    )
    assert [a.token_ids for a in (mixed[0], mixed[-1])] == [a.token_ids for a in alone]
    for answer in mixed[1:-1]:
        jsonschema.validate(json.loads(answer.text), PERSON)


def test_every_other_option_goes_with_a_grammar(pipe):
    form = schema_format(PERSON)
    options = [
        {"n": 3, "do_sample": True, "temperature": 1.5, "random_seed": 7},
        {"frequency_penalty": 1.5, "presence_penalty": 1.0},
        {"min_new_tokens": 150},
        {"ignore_eos": True},
        {"bad_words": ["true"]},
        {"logits_processors": [lambda ids, logits: -logits]},
        {"logprobs": 3},
    ]
    for fields in options:
        answer = ask(pipe, form, PROMPTS[:1], **fields)[0]
        found = [answer, *answer.choices]
        assert len(found) == fields.get("n", 1)
        for each in found:
            jsonschema.validate(json.loads(each.text), PERSON)
            assert each.finish_reason == "stop"
    assert (
        '"friend"'
        in ask(pipe, form, PROMPTS[:1], stop_words=['"friend"'], include_stop_str_in_output=True)[0].text
    )


def test_the_same_seed_gives_the_same_answer_in_any_company(pipe):
    config = guided(schema_format(PERSON), **WILD, random_seed=11)
    alone = pipe.infer(PROMPTS[0], config)
    crowd = pipe.infer([PROMPTS[1], PROMPTS[0]], [guided(None, max_new_tokens=40), config])
    assert crowd[1].token_ids == alone.token_ids


def test_the_limit_may_cut_a_guided_answer(pipe):
    answer = ask(pipe, schema_format(PERSON), PROMPTS[:1], max_new_tokens=3)[0]
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 3)


def test_preempted_sequences_keep_their_place_in_the_grammar(pipe):
    scheduler = pipe.frontend.engine.scheduler
    form = {"type": "regex", "regex": "([a-z]{1,9} ){40}end"}
    prompts = [f"{'Count with me. ' * 4}{i}" for i in range(8)]
    expected = [pipe.infer(prompt, guided(form, max_new_tokens=400)).token_ids for prompt in prompts[:2]]
    before = scheduler.preemptions
    found = ask(pipe, form, prompts, max_new_tokens=400)
    assert scheduler.preemptions > before
    assert [answer.token_ids for answer in found[:2]] == expected
    for answer in found:
        assert re.fullmatch("([a-z]{1,9} ){40}end", answer.text)
    scheduler.check_integrity()


def test_where_everything_allowed_is_banned_the_answer_ends_with_an_error_alone(pipe):
    allowed = pipe.tokenizer.encode("x", add_bos=False, add_special_tokens=False)
    broken = guided({"type": "regex", "regex": "x{5}"}, bad_words=["x", "xx", "xxx"], bad_token_ids=allowed)
    healthy, failed = pipe.infer(PROMPTS[:2], [guided(schema_format(PERSON)), broken])
    assert (failed.finish_reason, failed.error_code) == ("error", "invalid_logits")
    assert "ruled out" in failed.error_message
    jsonschema.validate(json.loads(healthy.text), PERSON)


def test_a_faulty_schema_fails_its_own_prompt_only(pipe):
    configs = [guided(schema_format({"type": "objectt"})), guided(schema_format(PERSON))]
    failed, healthy = pipe.infer(PROMPTS[:2], configs)
    assert (failed.finish_reason, failed.error_code) == ("error", "invalid_request")
    assert "objectt" in failed.error_message
    assert healthy.finish_reason == "stop"


def test_an_aborted_answer_leaves_no_page_behind(pipe):
    stream = pipe.stream_infer(
        PROMPTS, gen_config=guided({"type": "regex", "regex": "[a-z ]*"}, ignore_eos=True)
    )
    next(iter(stream))
    stream.close()
    assert ask(pipe, {"type": "choice", "choice": ["done"]})[0].text == "done"
    pipe.frontend.engine.scheduler.check_integrity()


def test_many_threads_with_grammars_of_their_own(pipe):
    found: dict[int, str] = {}

    def work(i: int) -> None:
        form = {"type": "regex", "regex": f"thread {i}: [a-z]{{3,9}}"}
        found[i] = ask(pipe, form, PROMPTS[:1])[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(re.fullmatch(f"thread {i}: [a-z]{{3,9}}", text) for i, text in found.items())


def test_a_required_call_is_made(pipe):
    parameters = {
        "type": "object",
        "properties": {"expression": {"type": "string", "maxLength": 12}},
        "required": ["expression"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "calculator", "parameters": parameters}}]
    for style in ("qwen", "llama3", "internlm", "mistral", "deepseek-v3", "glm4", "qwen3coder"):
        form = tool_grammar(tool_format(style), tools, pipe.tokenizer, parallel=False)
        answer = pipe.infer("What is 12 + 30?", guided(form), tools=tools)
        parser = AnswerParser(None, tool_format(style), {"calculator": parameters})
        parsed = collect(parser.feed(answer.text) + parser.finish())
        assert not parsed.content
        assert [call.name for call in parsed.tool_calls] == ["calculator"]
        jsonschema.validate(json.loads(parsed.tool_calls[0].arguments), parameters)


def test_a_grammar_compiles_no_program(pipe):
    ask(pipe, None, do_sample=True)
    counter = CompileCounter()
    ask(pipe, schema_format(PERSON))
    assert counter.count == 0
