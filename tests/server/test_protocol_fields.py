"""What clients ask for under their own names, in every protocol, by a server that needs no model."""

from __future__ import annotations

import json

import anthropic
import httpx
import openai
import pytest
from anthropic.types.beta.message_create_params import MessageCreateParamsBase as BetaMessageParams
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase as MessageParams
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseParams

from lmdeploy_jax.server.anthropic import route as anthropic_route
from lmdeploy_jax.server.anthropic.bodies import CountTokensRequest, MessagesRequest
from lmdeploy_jax.server.completions.bodies import CompletionRequest
from lmdeploy_jax.server.embeddings.bodies import EmbeddingsRequest
from lmdeploy_jax.server.native.bodies import GenerateRequest
from lmdeploy_jax.server.openai_chat import route as chat_route
from lmdeploy_jax.server.openai_chat.bodies import ChatCompletionRequest
from lmdeploy_jax.server.responses import route as responses_route
from lmdeploy_jax.server.responses.bodies import InputTokensRequest, ResponsesRequest
from tests.patience import PATIENCE
from tests.scripted import TOKENIZER, ids
from tests.server.live import serving
from tests.server.scripted import scripted

SAID = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, GENERATE = "/v1/messages", "/generate"
BODIES = {
    CHAT: {"messages": SAID},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": SAID, "max_tokens": 8},
    GENERATE: {"prompt": "hi"},
}
MODELS = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    RESPONSES: ResponsesRequest,
    MESSAGES: MessagesRequest,
    GENERATE: GenerateRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/responses/input_tokens": InputTokensRequest,
}
INT = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "int"}}}}}
INT_AT = "tools[0].function.parameters.properties.a.type"
THOUGHT = "<think>\nwell\n</think>\n\nhello"


@pytest.fixture(scope="module")
def server():
    with (
        scripted(lambda request, index: ids(THOUGHT)) as (frontend, engine),
        serving(frontend, strict=True) as live,
        httpx.Client(base_url=live.url, timeout=PATIENCE) as http,
    ):
        yield http, engine


def post(http, path, **fields):
    answer = http.post(path, json=BODIES.get(path, BODIES[MESSAGES]) | fields)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("path", MODELS)
def test_a_field_that_is_null_is_as_good_as_absent(server, path):
    http, _ = server
    required = {
        "/v1/responses/input_tokens": {"input": "hi"},
        "/v1/messages/count_tokens": {"messages": SAID},
    }
    body = BODIES.get(path) or required[path]
    names = {field.alias or name for name, field in MODELS[path].model_fields.items()}
    answer = http.post(path, json=dict.fromkeys(names) | body)
    assert answer.status_code == 200, answer.text
    tools = {"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}
    chat_tool = {"type": "function", "function": {"name": "f", "parameters": None, "strict": None}}
    claude = {"name": "f", "input_schema": {"type": "object"}, "type": None, "description": None}
    choice = {"type": "auto", "disable_parallel_tool_use": None}
    nested = {
        CHAT: {"tools": [chat_tool], "stream_options": {"include_usage": None}},
        RESPONSES: {"tools": [tools], "text": {"format": None}, "reasoning": {"effort": None}},
        MESSAGES: {"tools": [claude], "tool_choice": choice, "output_config": {"format": None}},
    }
    assert http.post(path, json=body | nested.get(path, {})).status_code == 200


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
CLAUDE = {"type": "json_schema", "schema": SCHEMA}
REGEX, CHOICE, GBNF = "a+b", ["yes", "no"], 'root ::= "yes" | "no"'
FORMS = [
    (NAMED, MESSAGES, {"output_config": {"format": CLAUDE, "effort": "low"}}),
    (NAMED, MESSAGES, {"output_format": CLAUDE}),
    (NAMED, RESPONSES, {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}),
    ({"type": "json_object"}, RESPONSES, {"text": {"format": {"type": "json_object"}}}),
    (NAMED, CHAT, {"response_format": {"type": "json_object", "schema": SCHEMA}}),
    (NAMED, CHAT, {"response_format": {"type": "json_schema", "schema": SCHEMA}}),
    (NAMED, CHAT, {"json_schema": SCHEMA}),
    ({"type": "grammar", "grammar": GBNF}, CHAT, {"grammar": GBNF}),
    (NAMED, CHAT, {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}}),
    (NAMED, COMPLETIONS, {"guided_json": json.dumps(SCHEMA)}),
    ({"type": "regex", "regex": REGEX}, COMPLETIONS, {"structured_outputs": {"regex": REGEX}}),
    ({"type": "choice", "choice": CHOICE}, GENERATE, {"guided_choice": CHOICE}),
    ({"type": "regex", "regex": REGEX}, RESPONSES, {"guided_regex": REGEX}),
    ({"type": "grammar", "grammar": GBNF}, CHAT, {"guided_grammar": GBNF}),
    ({"type": "json_object"}, CHAT, {"structured_outputs": {"json_object": True}}),
]


@pytest.mark.parametrize(("form", "path", "fields"), FORMS)
def test_a_form_is_enforced_by_every_name_for_it(server, form, path, fields):
    http, engine = server

    def enforced(path, fields):
        post(http, path, **fields)
        return engine.seen[-1].params.grammar.source.text

    same = path if path in (COMPLETIONS, GENERATE) else CHAT  # without the reasoning that may come first
    assert enforced(path, fields) == enforced(same, {"response_format": form})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": REGEX, "guided_choice": CHOICE}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": {}, "regex": REGEX, "tag": 1}}, "structured_outputs.tag"),
        ({"guided_json": "{"}, "guided_json"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"stop": [""]}, "stop"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_the_name_it_came_under(server, fields, param):
    http, _ = server
    answer = http.post(CHAT, json=BODIES[CHAT] | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (MESSAGES, {"stop_sequences": [""]}, None, "stop_sequences="),
        (RESPONSES, {"stop": [""]}, "stop", "stop="),
        (RESPONSES, {"text": {"format": {"type": "poem"}}}, "text.format.type", "Input should be"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input.1", "at least 1 character"),
        (CHAT, {"tool_choice": "sometimes"}, "tool_choice", "'auto'"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, None, "audio is not"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "unknown role 'robot'"),
        (RESPONSES, {"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "unknown role 'robot'"),
        (CHAT, {"tools": [INT], "tool_choice": "required"}, INT_AT, "integer"),
    ],
)
def test_errors_speak_of_fields_and_not_of_how_they_are_checked(server, path, body, param, words):
    http, _ = server
    error = http.post(path, json=BODIES.get(path, {}) | body).json()["error"]
    assert words in error["message"]
    assert not {"constrained", "literal[", "stop_words"} & set(error["message"].split(":")[0].split("."))
    if param:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (
            MESSAGES,
            {"output_config": {"format": CLAUDE | {"schema": {"type": "int"}}}},
            "output_config.format.schema.type",
        ),
        (
            RESPONSES,
            {"text": {"format": {"type": "json_schema", "schema": {"type": "int"}}}},
            "text.format.schema.type",
        ),
        (CHAT, {"guided_regex": "("}, "guided_regex cannot be used: "),
        (CHAT, {"structured_outputs": {"choice": []}}, "structured_outputs.choice=[] is invalid"),
        (CHAT, {"grammar": 'root ::= "a'}, "grammar cannot be "),
        (
            CHAT,
            {"response_format": {"type": "regex", "regex": "("}},
            "response_format of type 'regex' cannot",
        ),
    ],
)
def test_a_form_that_cannot_be_enforced_is_called_by_the_name_it_came_under(server, path, fields, words):
    http, _ = server
    answer = http.post(path, json=BODIES[path] | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(words)


def test_an_empty_body_is_called_so(server):
    http, _ = server
    answer = http.post(CHAT, content=b"", headers={"content-type": "application/json"})
    assert answer.json()["error"]["message"] == "The body is empty: send a JSON object."


def test_fields_of_the_official_clients_are_known():
    for params, model, refused in (
        (ChatParams, ChatCompletionRequest, chat_route.REFUSED),
        (CompletionParams, CompletionRequest, {}),
        (EmbeddingCreateParams, EmbeddingsRequest, {}),
        (ResponseParams, ResponsesRequest, responses_route.REFUSED),
        (InputTokenCountParams, InputTokensRequest, responses_route.REFUSED),
        (MessageParams, MessagesRequest, anthropic_route.REFUSED),
        (BetaMessageParams, MessagesRequest, anthropic_route.REFUSED),
        (MessageCountTokensParams, CountTokensRequest, anthropic_route.REFUSED),
    ):
        unknown = set(params.__annotations__) - set(model.model_fields) - set(refused)
        assert not unknown, (params, unknown)


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"max_tokens": -1}, {}),
        ({"top_p": 0, "temperature": 1.0}, {"top_p": 0.0, "temperature": 1.0}),
        ({"session_id": "abc", "user": {"id": "u"}}, {}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
    ],
)
def test_neutral_values_of_other_servers_mean_the_same_here(server, fields, same):
    http, engine = server

    def asked(fields):
        post(http, CHAT, seed=1, **fields)
        return engine.seen[-1].params

    assert asked(fields) == asked(same)


THINKS = [
    (CHAT, {"reasoning_effort": "high"}, True),
    (CHAT, {"reasoning_effort": "minimal"}, False),
    (CHAT, {"reasoning_effort": "low", "enable_thinking": False}, False),
    (CHAT, {"chat_template_kwargs": {"thinking": True}}, True),
    (RESPONSES, {"reasoning": {"effort": "medium"}}, True),
    (RESPONSES, {"reasoning": {"effort": "none"}}, False),
    (RESPONSES, {"chat_template_kwargs": {"enable_thinking": True}}, True),
    (RESPONSES, {"enable_thinking": True}, True),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
    (MESSAGES, {"thinking": {"type": "between_tools"}}, True),
    (MESSAGES, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, True),
    (MESSAGES, {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, False),
    (MESSAGES, {"output_config": {"effort": "high"}}, False),
]


@pytest.mark.parametrize(("path", "fields", "thinks"), THINKS)
def test_every_protocol_switches_reasoning_by_its_own_field(server, path, fields, thinks):
    http, engine = server
    post(http, path, **fields)
    assert ("/think" in TOKENIZER.decode(engine.seen[-1].prompt.ids)) is thinks


@pytest.mark.parametrize(
    ("path", "field", "param"),
    [
        (CHAT, "messages", "messages"),
        (COMPLETIONS, "prompt", "prompt"),
        (GENERATE, "prompt", "prompt"),
        (RESPONSES, "input", "input"),
        ("/v1/embeddings", "input", "input"),
        (MESSAGES, "messages", None),
    ],
)
def test_a_prompt_beyond_the_context_is_told_in_words_that_gateways_know(server, path, field, param):
    http, _ = server
    long = "word " * 600
    given = [{"role": "user", "content": long}] if field == "messages" else long
    answer = http.post(path, json=BODIES.get(path, {}) | {field: given})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    if path == MESSAGES:
        assert "prompt is too long: 6" in error["message"]
        assert error["message"].endswith(" tokens > 512 maximum")
    else:
        assert "This model's maximum context length is 512 tokens" in error["message"]
        assert error["param"] == param


def test_every_delta_has_a_place_for_reasoning(server):
    """As LMDeploy's documented programs read it from every chunk."""
    http, _ = server
    client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
    call = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for fields in ({}, {"tools": [call]}):
        stream = client.chat.completions.create(model="tiny-chat", messages=SAID, stream=True, **fields)
        deltas = [chunk.choices[0].delta for chunk in stream]
        assert "".join(delta.reasoning_content or "" for delta in deltas) == "well"
        assert "".join(delta.content or "" for delta in deltas) == "hello"


def test_messages_tell_tokens_that_are_asked_for_and_take_a_prompt_in_tokens(server):
    http, engine = server
    asked = {"return_token_ids": True, "return_logprob": True, "max_tokens": 64}
    whole = post(http, MESSAGES, **asked).json()
    assert TOKENIZER.decode(whole["output_ids"], skip_special_tokens=False).startswith(THOUGHT)
    assert [i for _, i in whole["output_token_logprobs"]] == whole["output_ids"]
    events = post(http, MESSAGES, stream=True, **asked).text.split("\n\n")
    last = next(json.loads(e.partition("data: ")[2]) for e in events if "message_delta" in e)
    assert last["output_ids"] == whole["output_ids"]
    assert last["output_token_logprobs"] == whole["output_token_logprobs"]
    post(http, MESSAGES, messages=[], input_ids=[5, 6, 7])
    assert list(engine.seen[-1].prompt.ids) == [5, 6, 7]
    refused = http.post(MESSAGES, json=BODIES[MESSAGES] | {"return_routed_experts": True})
    assert "return_routed_experts is not supported" in refused.json()["error"]["message"]


def test_anthropics_client_parses_what_it_asks_for(server):
    http, engine = server
    claude = anthropic.Anthropic(base_url=str(http.base_url), api_key="none", max_retries=0)
    engine.script = lambda request, index: ids('{"x": 42}')
    try:
        config = {"format": {"type": "json_schema", "schema": SCHEMA | {"additionalProperties": False}}}
        answer = claude.messages.create(model="tiny-chat", max_tokens=60, messages=SAID, output_config=config)
    finally:
        engine.script = lambda request, index: ids(THOUGHT)
    assert json.loads(answer.content[0].text) == {"x": 42}
