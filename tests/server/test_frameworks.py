"""What people build on: frameworks that speak to the server through official clients, or instead of them.

A script speaks for the model, so that the protocol is judged. Each is skipped where it is not installed;
`docs/clients.md` says with which versions it was seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest
from pydantic import BaseModel

from tests.patience import PATIENCE
from tests.server.adding import QUESTION, SENTENCE, adding
from tests.server.live import serving
from tests.server.scripted import scripted


class Sum(BaseModel):
    x: int


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


@pytest.fixture(scope="module")
def url():
    with scripted(adding, session_len=16_384) as (frontend, _), serving(frontend) as live:
        yield live.url


@pytest.fixture
def gpt(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


@pytest.fixture
def claude(url):
    anthropic = pytest.importorskip("anthropic")
    return anthropic.Anthropic(base_url=url, api_key="none")


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_langchain(url, api):
    if api == "messages":
        made = pytest.importorskip("langchain_anthropic").ChatAnthropic
        model = made(model="tiny-chat", base_url=url, api_key="none")
    else:
        made = pytest.importorskip("langchain_openai").ChatOpenAI
        model = made(
            model="tiny-chat", base_url=f"{url}/v1", api_key="none", use_responses_api=api == "responses"
        )
    agents = pytest.importorskip("langchain.agents")
    assert model.invoke(QUESTION).text == SENTENCE
    assert "".join(piece.text for piece in model.stream(QUESTION)) == SENTENCE
    assert [each.text for each in model.batch([QUESTION, QUESTION])] == [SENTENCE] * 2
    assert model.with_structured_output(Sum, method="json_schema").invoke(QUESTION) == Sum(x=42)
    (call,) = model.bind_tools([add]).invoke(QUESTION).tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 12, "b": 30})
    said = agents.create_agent(model, [add]).invoke({"messages": [("user", QUESTION)]})["messages"]
    assert [m.type for m in said] == ["human", "ai", "tool", "ai"]
    assert (said[2].content, said[3].text) == ("42", SENTENCE)


def test_langchain_embeddings(url):
    made = pytest.importorskip("langchain_openai").OpenAIEmbeddings
    model = made(model="tiny-chat", base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)
    assert len(model.embed_documents(["one", "two"])) == 2


def test_llama_index(url):
    made = pytest.importorskip("llama_index.llms.openai_like").OpenAILike
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.tools import FunctionTool

    model = made(
        model="tiny-chat", api_base=f"{url}/v1", api_key="none", is_chat_model=True,
        is_function_calling_model=True, context_window=16_384,
    )  # fmt: skip
    assert model.complete(QUESTION).text == SENTENCE
    assert "".join(piece.delta for piece in model.stream_complete(QUESTION)) == SENTENCE
    assert "42" in str(model.predict_and_call([FunctionTool.from_defaults(add)], QUESTION))
    assert model.as_structured_llm(Sum).complete(QUESTION).raw == Sum(x=42)

    async def agent():
        return str(await FunctionAgent(tools=[add], llm=model).run(QUESTION))

    assert asyncio.run(agent()) == SENTENCE


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "JSON", "RESPONSES_TOOLS"])
def test_instructor(gpt, mode):
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(gpt, mode=instructor.Mode[mode])
    asked = {"model": "tiny-chat", "messages": [{"role": "user", "content": QUESTION}]}
    assert client.chat.completions.create(response_model=Sum, max_retries=0, **asked).x == 42
    if mode == "TOOLS":
        assert list(client.chat.completions.create_partial(response_model=Sum, **asked))[-1].x == 42


@pytest.mark.parametrize("mode", ["ANTHROPIC_TOOLS", "ANTHROPIC_JSON"])
def test_instructor_with_messages(claude, mode):
    instructor = pytest.importorskip("instructor")
    client = instructor.from_anthropic(claude, mode=instructor.Mode[mode])
    asked = {"model": "tiny-chat", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 99}
    assert client.messages.create(response_model=Sum, max_retries=0, **asked).x == 42


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_pydantic_ai(url, api):
    ai = pytest.importorskip("pydantic_ai")
    if api == "messages":
        if int(pytest.importorskip("anthropic").__version__.partition(".")[0]) > 1:
            pytest.skip("fails within itself, before any request, with anthropic 2")
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        model = AnthropicModel("tiny-chat", provider=AnthropicProvider(base_url=url, api_key="none"))
    else:
        from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
        from pydantic_ai.providers.openai import OpenAIProvider

        kind = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
        model = kind("tiny-chat", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))

    async def runs():
        kinds = [{}, {"tools": [add]}, {"output_type": Sum}]
        if api != "messages":  # where it has no such mode
            kinds.append({"output_type": ai.NativeOutput(Sum)})
        found = [(await ai.Agent(model, **kind).run(QUESTION)).output for kind in kinds]
        async with ai.Agent(model).run_stream(QUESTION) as run:
            return found, [text async for text in run.stream_text()][-1]

    found, streamed = asyncio.run(runs())
    assert found[:3] == [SENTENCE, SENTENCE, Sum(x=42)]
    assert all(each == Sum(x=42) for each in found[3:])
    assert streamed == SENTENCE


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents(url, api):
    agents = pytest.importorskip("agents")
    openai = pytest.importorskip("openai")
    agents.set_tracing_disabled(True)
    kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
    tool = agents.function_tool(add)

    async def runs():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        model = kind(model="tiny-chat", openai_client=client)
        plain = agents.Agent("a", model=model)
        streamed = agents.Runner.run_streamed(agents.Agent("a", model=model, tools=[tool]), QUESTION)
        async for _ in streamed.stream_events():
            pass
        typed = await agents.Runner.run(agents.Agent("a", model=model, output_type=Sum), QUESTION)
        return (
            (await agents.Runner.run(plain, QUESTION)).final_output,
            streamed.final_output,
            typed.final_output,
        )

    assert asyncio.run(runs()) == (SENTENCE, SENTENCE, Sum(x=42))


def test_smolagents(url):
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.OpenAIServerModel("tiny-chat", api_base=f"{url}/v1", api_key="none")
    agent = smolagents.ToolCallingAgent(tools=[smolagents.tool(add)], model=model, verbosity_level=0)
    assert agent.run(QUESTION) == "42"
    assert [step.observations for step in agent.memory.steps[1:2]] == ["42"], "the first step calls `add`"


def test_dspy(url):
    dspy = pytest.importorskip("dspy")
    for api in ("chat", "responses"):
        model = dspy.LM("openai/tiny-chat", api_base=f"{url}/v1", api_key="none", model_type=api, cache=False)
        with dspy.context(lm=model):
            assert dspy.Predict("question -> answer")(question=QUESTION).answer == "42"


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_litellm(url, provider):
    litellm = pytest.importorskip("litellm")
    base = url if provider == "anthropic" else f"{url}/v1"
    asked = {"model": f"{provider}/tiny-chat", "api_base": base, "api_key": "none"}
    messages = [{"role": "user", "content": QUESTION}]
    assert litellm.completion(messages=messages, **asked).choices[0].message.content == SENTENCE
    pieces = litellm.completion(messages=messages, stream=True, **asked)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == SENTENCE
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "hi " * 20_000}], **asked)


def test_llm(url, tmp_path):
    """Its command line, with a model of its configuration."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny-chat\n  api_base: {url}/v1\n"
        "  supports_schema: true\n  supports_tools: true\n"
    )

    def run(*arguments):
        command = [sys.executable, "-m", "llm", "-m", "tiny", "--key", "none", *arguments, QUESTION]
        env = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run() == SENTENCE
    assert json.loads(run("--schema", "x int")) == {"x": 42}
    assert run("--functions", "def add(a: int, b: int) -> int:\n    return a + b") == SENTENCE
