"""The checkpoint's own chat template: jinja, with what HF's `apply_chat_template` offers a template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from lmdeploy_jax.errors import CheckpointError, RequestError
from lmdeploy_jax.text.conversation import is_prefill

# Stands for the end of a message that is to be continued. Its space shows whether the template trims.
_CUT_HERE = "<|lmdeploy-jax-cut-here|> "


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=1)
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


class HfChatTemplate:
    """A jinja template and the special tokens that it may name.

    source: the jinja text, or several by name, of which `tool_use` is taken when there are tools, else
    `default`.
    tokens: bos_token, eos_token ... as the template sees them.
    Raises `CheckpointError` if a template is not valid jinja.
    """

    def __init__(
        self, source: str | Mapping[str, str], tokens: Mapping[str, str], stop_words: tuple[str, ...] = ()
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        self._templates = {name: _compile(name, text) for name, text in sources.items()}
        self._sources = sources
        self._tokens = dict(tokens)
        self.stop_words = stop_words

    @cached_property
    def reads(self) -> frozenset[str]:
        """Variables that the templates take from outside. To find them takes up to 25 ms, for which only a
        request that brings some waits.
        """
        return frozenset().union(*map(_variables, self._sources.values()))

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt's text. `kwargs` are the template's own variables, such as `enable_thinking`.

        continue_final_message: leave the last message open, so that the model goes on with it. So is a last
            message by the assistant, always: what the template puts after it is cut off.
        Raises `RequestError` with the template's words if it refuses the conversation.
        """
        template = self._pick(tools)
        open_end = continue_final_message or is_prefill(messages)
        variables = self._tokens | _free_variables(kwargs) | {"tools": tools}
        variables["add_generation_prompt"] = add_generation_prompt and not open_end
        if not open_end:
            return _render(template, variables, messages)
        final = messages[-1]
        marked = [*messages[:-1], final | {"content": (final.get("content") or "") + _CUT_HERE}]
        return _cut(_render(template, variables, marked), final)

    def _pick(self, tools: list[dict[str, Any]] | None) -> jinja2.Template:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        names = ", ".join(self._templates) or "none at all"
        raise RequestError(
            f"The checkpoint has no default chat template, only: {names}. Name one in the request."
        )


def _compile(name: str, source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except Exception as error:  # a TemplateSyntaxError, or what odd constants and deep nesting raise in jinja
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise CheckpointError(
            f"The chat template {name!r} is not valid jinja{line}: {str(error).rstrip('.')}. "
            "Give another one with chat_template_config."
        ) from error


def _variables(source: str) -> set[str]:
    return jinja2.meta.find_undeclared_variables(_environment().parse(source))


def _render(template: jinja2.Template, variables: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    try:
        return template.render(variables | {"messages": messages})
    except Exception as error:  # whatever the checkpoint's code does, the request has failed, not the server
        tolerable = [_with_object_arguments(message) for message in messages]
        if tolerable != messages:
            return _render(template, variables, tolerable)
        words = str(error) or type(error).__name__
        raise RequestError(f"The chat template refused the messages: {words}") from error


def _with_object_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Malformed arguments, a text, as an object: some templates walk through them by name."""
    calls = message.get("tool_calls")
    return message | {"tool_calls": [_with_object(call) for call in calls]} if calls else message


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if not isinstance(function["arguments"], str):
        return call
    return call | {"function": function | {"arguments": {"arguments": function["arguments"]}}}


def _cut(text: str, final: dict[str, Any]) -> str:
    """Drops everything from the mark on, and the space before it where the template trims the message."""
    place = text.rfind(_CUT_HERE.rstrip())
    if place < 0:
        raise RequestError(
            f"The chat template does not print the content of the last message, by {final['role']!r}, so "
            "that it cannot be continued. End the conversation with a user's message."
        )
    before = text[:place]
    return before if text.startswith(_CUT_HERE, place) else before.rstrip()


def _free_variables(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's variables. None means not given, as in LMDeploy; HF always defines `documents`."""
    return {"documents": None} | {name: value for name, value in kwargs.items() if value is not None}
