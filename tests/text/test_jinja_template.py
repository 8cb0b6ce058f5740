"""The checkpoint's jinja against transformers' `apply_chat_template`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lmdeploy_jax.errors import CheckpointError, RequestError
from lmdeploy_jax.text.jinja_template import HfChatTemplate
from tests.text.samples import (
    ANSWER,
    CALL,
    CHATML,
    CONVERSATIONS,
    LLAMA2,
    RESULT,
    SYSTEM,
    TOOLS,
    TRICKS,
    USER,
)  # fmt: skip


def hf_template(byte_level: Path, source: Any) -> tuple[HfChatTemplate, PreTrainedTokenizerFast]:
    theirs = PreTrainedTokenizerFast.from_pretrained(byte_level)
    theirs.chat_template = source
    return HfChatTemplate(source, {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}), theirs


@pytest.mark.parametrize("source", [CHATML, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_jinja_equals_transformers(byte_level: Path, source: str, messages: list[dict[str, Any]]) -> None:
    ours, theirs = hf_template(byte_level, source)
    prefill = messages[-1]["role"] == "assistant"
    expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not prefill, continue_final_message=prefill
    )
    assert ours.render(messages) == expected


def test_environment_equals_transformers(byte_level: Path) -> None:
    ours, theirs = hf_template(byte_level, TRICKS)
    for messages in ([USER], [SYSTEM, USER]):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == expected


def test_tools_and_tool_calls_equal_transformers(byte_level: Path) -> None:
    ours, theirs = hf_template(byte_level, CHATML)
    for messages in ([USER], [SYSTEM, USER, CALL, RESULT], [USER, CALL]):
        expected = theirs.apply_chat_template(
            messages, tools=TOOLS, tokenize=False, add_generation_prompt=True
        )
        assert ours.render(messages, tools=TOOLS) == expected


def test_template_variables_and_generation_prompt(byte_level: Path) -> None:
    ours, _ = hf_template(byte_level, CHATML)
    assert ours.render([USER], enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert ours.render([USER], enable_thinking=None) == ours.render([USER])
    assert ours.render([USER], add_generation_prompt=False).endswith("<|im_end|>\n")
    assert ours.render([USER], continue_final_message=True).endswith(USER["content"])


def test_a_refusal_carries_the_templates_words(byte_level: Path) -> None:
    ours, _ = hf_template(byte_level, CHATML)
    with pytest.raises(RequestError, match='tools were not given: "3"'):
        ours.render([USER, RESULT])
    with pytest.raises(RequestError, match="unsafe"):
        hf_template(byte_level, "{{ messages.__class__.__mro__ }}")[0].render([USER])
    with pytest.raises(RequestError, match="cannot be continued"):
        hf_template(byte_level, "fixed text{{ eos_token }}")[0].render([USER, ANSWER])
    with pytest.raises(CheckpointError, match="line 2"):
        HfChatTemplate("a\n{% if %}", {})


def test_whatever_goes_wrong_in_a_template_is_a_refusal(byte_level: Path) -> None:
    recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    sums = ("{{ 1 + 'x' }}", "{{ 1 / 0 }}", "{{ '%d' % 'x' }}", "{{ range(10 ** 9) | list }}")
    for source in ("{{ messages.x.y.z }}", "{{ x() }}", recursion, *sums):
        with pytest.raises(RequestError, match=r"chat template refused the messages: ."):
            hf_template(byte_level, source)[0].render([USER])


def test_variables_may_have_any_name(byte_level: Path) -> None:
    ours, _ = hf_template(byte_level, "{{ template }}{{ variables }}{{ loop }}")
    assert ours.render([USER], template=1, variables=2, loop=3) == "123"
    assert ours.reads == {"template", "variables", "loop"}


BROKEN_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{bad"}}]}


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ("call.arguments", "{bad"),
        ("call.arguments | tojson", '"{bad"'),
        ("call.arguments.items() | list", "[('arguments', '{bad')]"),
        ("call.arguments | items | list", "[('arguments', '{bad')]"),
    ],
)
def test_malformed_arguments_reach_every_template(byte_level: Path, arguments: str, printed: str) -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set call = c.function %}"
        f"{{{{ {arguments} }}}}{{% endfor %}}{{% endfor %}}"
    )
    ours, _ = hf_template(byte_level, source)
    assert ours.render([USER, BROKEN_CALL, USER]) == printed


def test_named_templates(byte_level: Path) -> None:
    ours, _ = hf_template(byte_level, {"default": "plain", "tool_use": "tools"})
    assert (ours.render([USER]), ours.render([USER], tools=TOOLS)) == ("plain", "tools")
    with pytest.raises(RequestError, match="only: rag"):
        HfChatTemplate({"rag": "x"}, {}).render([USER])
