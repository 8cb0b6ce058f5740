"""Built-in chat templates against the published jinja of the same models."""

from __future__ import annotations

import pytest

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.text.builtin_templates import BuiltinTemplate, builtin
from lmdeploy_jax.text.chat_template import ChatTemplateConfig, select
from lmdeploy_jax.text.jinja_template import HfChatTemplate
from tests.text.samples import ANSWER, CALL, CONVERSATIONS, PUBLISHED, RESULT, SYSTEM, TOOLS, USER

ALIKE = {"yi": "chatml", "qwen3": "qwen", "llama3_1": "llama3"}


@pytest.mark.parametrize("name", [*PUBLISHED, *ALIKE])
def test_builtins_print_what_the_published_jinja_prints(name: str) -> None:
    ours, published = builtin(name), HfChatTemplate(PUBLISHED[ALIKE.get(name, name)], {})
    for messages in CONVERSATIONS:
        if name != "gemma" or messages[0] is not SYSTEM:  # Gemma's own jinja refuses a system message
            assert ours.render(messages) == published.render(messages)


def test_tags_are_put_together_as_lmdeploy_does() -> None:
    tags = {
        "system": "<S>", "meta_instruction": "meta", "eosys": "</S>", "user": "<U>", "eoh": "</U>",
        "assistant": "<A>", "eoa": "</A>", "separator": "|", "tool": "<T>", "eotool": "</T>",
    }  # fmt: skip
    config = ChatTemplateConfig("my own", stop_words=["</A>"], **tags)
    template = select_builtin(config)
    assert template.stop_words == ("</A>",)
    assert template.render([USER]) == f"<S>meta</S><U>{USER['content']}</U><A>"
    assert template.render([SYSTEM, USER, ANSWER, RESULT]) == (
        f"<S>Be brief.</S><U>{USER['content']}</U><A>Sure  </A>|<T>3</T><A>"
    )
    assert template.render([USER, ANSWER]) == f"<S>meta</S><U>{USER['content']}</U><A>Sure  "
    assert template.render([USER], add_generation_prompt=False).endswith("</U>")


def test_inherited_tags_and_completion() -> None:
    changed = select_builtin(ChatTemplateConfig("qwen", meta_instruction="Be kind."))
    assert changed.render([USER]) == builtin("qwen").render([{"role": "system", "content": "Be kind."}, USER])
    raw = select_builtin(ChatTemplateConfig("qwen", capability="completion"))
    assert raw.render([SYSTEM, USER]) == SYSTEM["content"] + USER["content"]
    assert builtin("base").render([USER]) == USER["content"]


def select_builtin(config: ChatTemplateConfig) -> BuiltinTemplate:
    template = select(None, "nowhere", config)  # type: ignore[arg-type]  # a named template looks at no checkpoint
    assert isinstance(template, BuiltinTemplate)
    return template


def test_builtins_refuse_what_they_cannot_print() -> None:
    with pytest.raises(RequestError, match="cannot present tools"):
        builtin("qwen").render([USER], tools=TOOLS)
    with pytest.raises(RequestError, match="cannot present tools"):
        builtin("qwen").render([USER, CALL, RESULT])
    with pytest.raises(RequestError, match="'tool'"):
        builtin("vicuna").render([USER, RESULT])
    with pytest.raises(RequestError, match="after the system's"):
        builtin("llama2").render([SYSTEM])
