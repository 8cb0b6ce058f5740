"""Tools and blocks that clients send although only their makers' servers know them."""

from __future__ import annotations

import base64
import json
import logging

import httpx
import openai
import pytest

from tests.patience import PATIENCE
from tests.scripted import TOKENIZER, ids
from tests.server.live import serving
from tests.server.scripted import scripted

OBJECT = {"type": "object", "properties": {}}
F = {"type": "function", "name": "f", "parameters": OBJECT}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
SPACE = {"type": "namespace", "name": "crm", "description": "d", "tools": [F, {**F, "name": "g"}, PATCH]}
SEARCH = {"type": "web_search", "external_web_access": False}
PATCHED = {"input": '*** Begin Patch\n"a"\n'}


def called(name: str, arguments: dict) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def server():
    with (
        scripted(lambda request, index: ids("hello"), session_len=4096) as (frontend, engine),
        serving(frontend) as live,
        httpx.Client(base_url=live.url, timeout=PATIENCE) as http,
    ):
        yield http, engine


@pytest.fixture
def say(server):
    """What the model says next."""
    _, engine = server
    usual = engine.script

    def next_answer(text):
        engine.script = lambda request, index: ids(text)

    yield next_answer
    engine.script = usual


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0].base_url}/v1", api_key="none", max_retries=0)


def prompt(server) -> str:
    return TOKENIZER.decode(server[1].seen[-1].prompt.ids, skip_special_tokens=False)


def respond(client, input="hi", **fields):
    return client.responses.create(model="tiny-chat", input=input, **fields)


def test_namespaces_are_flat_and_tools_of_others_are_left_out(server, client, say, caplog):
    say(called("crm__f", {}) + "\n" + called("g", {}))
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        for _ in range(2):
            response = respond(client, tools=[SPACE, F, SEARCH])
    lines = [r.getMessage() for r in caplog.records if "web_search" in r.getMessage()]
    assert len(lines) <= 1, "told once"
    calls = [(call.name, call.namespace) for call in response.output]
    assert calls == [("f", "crm"), ("g", "crm")]
    assert "web_search" not in prompt(server)
    output = {"type": "function_call_output", "call_id": response.output[0].call_id, "output": "done"}
    respond(
        client, [{"role": "user", "content": "hi"}, response.output[0].model_dump(), output], tools=[F, SPACE]
    )
    assert '"crm__f", "arguments"' in prompt(server)


def test_a_custom_tool_is_called_with_a_text(server, client, say):
    say(called("apply_patch", PATCHED))
    whole = respond(client, tools=[PATCH])
    (call,) = whole.output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "apply_patch", PATCHED["input"])
    assert "start: /.+/" in prompt(server), "the model knows the input's grammar"
    events = list(respond(client, tools=[PATCH], stream=True))
    (streamed,) = events[-1].response.output
    assert (streamed.type, streamed.input) == ("custom_tool_call", PATCHED["input"])
    deltas = [e.delta for e in events if e.type == "response.custom_tool_call_input.delta"]
    done = next(e for e in events if e.type == "response.custom_tool_call_input.done")
    assert "".join(deltas) == done.input == PATCHED["input"]
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "patched"}
    respond(client, [output], previous_response_id=whole.id, tools=[PATCH])
    continued = prompt(server)
    assert "patched" in continued
    said = [{"role": "user", "content": "hi"}, call.model_dump(), output]
    respond(client, said, tools=[PATCH])
    assert prompt(server) == continued
    reference = {"type": "item_reference", "id": call.id}
    respond(client, [said[0], reference, output], tools=[PATCH])
    assert prompt(server) == continued


def test_chat_has_custom_tools_too(server, client, say):
    say(called("apply_patch", PATCHED))
    custom = {name: PATCH[name] for name in ("name", "description")}
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /.+/"}}
    fields = {"tools": [{"type": "custom", "custom": custom | {"format": form}}], "model": "tiny-chat"}
    hi = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(messages=hi, **fields).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.type, call.custom.name, call.custom.input) == ("custom", "apply_patch", PATCHED["input"])
    assert whole.finish_reason == "tool_calls"
    assert "start: /.+/" in prompt(server)
    chunks = list(client.chat.completions.create(messages=hi, stream=True, **fields))
    pieces = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    assert (pieces[0].type, pieces[0].custom["name"]) == ("custom", "apply_patch")
    assert "".join(piece.custom["input"] for piece in pieces) == PATCHED["input"]
    answered = [whole.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "patched"}]
    client.chat.completions.create(messages=hi + answered, **fields)
    assert json.dumps(PATCHED) in prompt(server)
    forced = {"type": "custom", "custom": {"name": "apply_patch"}}
    client.chat.completions.create(messages=hi, tool_choice=forced, **fields)
    assert '"apply_patch' in server[1].seen[-1].params.grammar.source.text


@pytest.mark.parametrize("choice", [{"type": "web_search"}, {"type": "mcp", "server_label": "x"}])
def test_what_is_not_here_cannot_be_forced(client, choice):
    with pytest.raises(openai.BadRequestError, match="no tool of type"):
        respond(client, tools=[F, SEARCH], tool_choice=choice)


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "custom", "name": "apply_patch"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "apply_patch"}]},
    ],
)
def test_a_custom_tool_may_be_forced(server, client, say, choice):
    say(called("apply_patch", PATCHED))
    assert respond(client, tools=[F, PATCH], tool_choice=choice).output[0].name == "apply_patch"
    assert '"apply_patch' in server[1].seen[-1].params.grammar.source.text


def test_what_other_servers_tools_did_earlier_is_read(server, client):
    search = {"type": "web_search_call", "id": "ws_1", "action": {"type": "search", "query": "lighthouses"}}
    respond(client, [{"role": "user", "content": "hi"}, search, {"role": "user", "content": "go on"}])
    assert "lighthouses" in prompt(server)


def ask(http, messages, **fields):
    body = {"model": "tiny-chat", "max_tokens": 8, "messages": messages} | fields
    return http.post("/v1/messages", json=body)


def test_documents_and_earlier_blocks_are_read(server):
    http, _ = server
    encoded = base64.b64encode(b"third text").decode()
    blocks = [
        {
            "type": "document",
            "title": "T",
            "source": {"type": "text", "media_type": "text/plain", "data": "first"},
        },
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "second"}]}},
        {"type": "document", "source": {"type": "base64", "media_type": "text/markdown", "data": encoded}},
        {
            "type": "search_result",
            "source": "s",
            "title": "t",
            "content": [{"type": "text", "text": "fourth"}],
        },
    ]
    use = {"type": "server_tool_use", "id": "x", "name": "web_search", "input": {"query": "fifth"}}
    found = {"type": "web_search_result", "title": "sixth", "url": "u", "encrypted_content": "SECRET"}
    result = {"type": "web_search_tool_result", "tool_use_id": "x", "content": [found]}
    turns = [
        {"role": "user", "content": blocks},
        {"role": "assistant", "content": [use, result, {"type": "text", "text": "seventh"}]},
        {"role": "user", "content": "go on"},
    ]
    assert ask(http, turns).status_code == 200
    text = prompt(server)
    for word in ("first", "second", "third text", "fourth", "fifth", "sixth", "seventh"):
        assert word in text
    assert "SECRET" not in text
    pdf = {"type": "base64", "media_type": "application/pdf", "data": encoded}
    refused = ask(http, [{"role": "user", "content": [{"type": "document", "source": pdf}]}])
    assert (
        "messages[0].content[0].source: a document of 'application/pdf'" in refused.json()["error"]["message"]
    )


def test_anthropics_own_tools(server):
    http, _ = server
    hi = [{"role": "user", "content": "hi"}]
    search = {"type": "web_search_20250305", "name": "web_search"}
    own = {"name": "f", "input_schema": OBJECT}
    assert ask(http, hi, tools=[search, own]).status_code == 200
    assert "web_search" not in prompt(server)
    assert '"f"' in prompt(server)
    forced = ask(http, hi, tools=[search, own], tool_choice={"type": "tool", "name": "web_search"})
    assert "'web_search_20250305', which this server does not have" in forced.json()["error"]["message"]
    screen = ask(http, hi, tools=[{"type": "computer_20250124", "name": "computer"}])
    assert screen.status_code == 400
    assert "tools[0].input_schema is missing" in screen.json()["error"]["message"]
    assert "'computer_20250124'" in screen.json()["error"]["message"]
    openais = ask(http, hi, tools=[{"type": "function", "function": {"name": "f"}}])
    assert "tools[0].name is missing" in openais.json()["error"]["message"], (
        "a form of another protocol is no tool"
    )


def test_tools_that_the_client_runs_are_told_of_with_what_they_take(server):
    http, engine = server
    editor = {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool", "max_characters": 100}
    tools = [{"type": "bash_20250124", "name": "bash"}, editor, {"type": "memory_20250818", "name": "memory"}]
    hi = [{"role": "user", "content": "hi"}]
    assert ask(http, hi, tools=tools).status_code == 200
    for word in ('"restart"', '"str_replace_based_edit_tool"', '"view_range"', '"old_path"'):
        assert word in prompt(server)
    assert "undo_edit" not in prompt(server)
    forced = {"type": "tool", "name": "str_replace_based_edit_tool"}
    assert ask(http, hi, tools=tools, tool_choice=forced).status_code == 200
    assert '"file_text"' in engine.seen[-1].params.grammar.source.text, "what it takes is enforced"


@pytest.mark.parametrize("protocol", ["chat", "responses", "messages"])
def test_a_conversation_with_a_malformed_call_goes_on(server, protocol):
    http, _ = server
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{bad"}}
    chat = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "invalid arguments"},
    ]
    items = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{bad"},
        {"type": "function_call_output", "call_id": "c", "output": "invalid arguments"},
    ]
    blocks = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"raw_arguments": "{bad"}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c", "content": "invalid arguments"}],
        },
    ]
    path, body = {
        "chat": ("/v1/chat/completions", {"messages": chat}),
        "responses": ("/v1/responses", {"input": items}),
        "messages": ("/v1/messages", {"messages": blocks, "max_tokens": 8}),
    }[protocol]
    assert http.post(path, json=body).status_code == 200
    assert "{bad" in prompt(server)


def test_calls_in_the_form_before_tools_are_read(server):
    http, _ = server
    said = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "forty-two"},
    ]
    assert http.post("/v1/chat/completions", json={"messages": said}).status_code == 200
    assert '{"name": "f", "arguments": {"a": 1}}' in prompt(server)
    assert "<tool_response>\nforty-two\n</tool_response>" in prompt(server)


@pytest.mark.parametrize("whole", [True, False])
def test_tools_may_be_told_of_as_those_that_are_allowed(server, whole):
    http, _ = server
    function = {"name": "f", "description": "finds", "parameters": OBJECT} if whole else {"name": "f"}
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"tools": [{"type": "function", "function": function}]},
    }
    body = {"messages": [{"role": "user", "content": "hi"}], "tool_choice": choice}
    answer = http.post("/v1/chat/completions", json=body)
    if whole:
        assert answer.status_code == 200
        assert '"finds"' in prompt(server)
    else:
        assert '"f"' not in prompt(server), "a name alone is no tool"


@pytest.mark.parametrize("how", [{"tool_choice": "required"}, {}])
def test_a_schema_that_cannot_be_enforced_is_named_without_internals(server, how):
    http, _ = server
    parameters = {"type": "object", "properties": {"a": {"type": "int"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": not how}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]} | how
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("tools[0].function.parameters.properties.a.type='int' is invalid: choose from")
