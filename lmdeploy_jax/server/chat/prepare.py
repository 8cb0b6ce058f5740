"""Makes a chat call ready for the engine: its prompt in tokens, its grammar, and how its answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.prompt import EncodedPrompt
from lmdeploy_jax.server.chat.call import ChatCall, ToolChoice
from lmdeploy_jax.server.chat.reader import AnswerReader, ReaderFactory, ReasoningCounter
from lmdeploy_jax.server.generation import Generation, Job
from lmdeploy_jax.text.parsers import AnswerParser, ReasoningFormat, ToolFormat
from lmdeploy_jax.text.template_arguments import Tool, checked_tools, checked_variables, thinking_is_off
from lmdeploy_jax.vision.access import MediaAccess

if TYPE_CHECKING:
    from lmdeploy_jax.engine.io.frontend import Frontend

_TAIL = 32  # tokens of a prompt's end in which an open tag of reasoning is looked for


@dataclass(frozen=True)
class Prepared:
    """A call that is ready: the engine's job, and how its answers are read."""

    job: Job
    reader: ReaderFactory


class Chat:
    """Prepares calls for a model whose answers have these formats. May be used from any thread.

    access: what images may be loaded from.
    """

    def __init__(
        self,
        frontend: Frontend,
        tools: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        access: MediaAccess,
    ) -> None:
        self._frontend = frontend
        self._tokenizer = frontend.tokenizer
        self.tools = tools
        self.reasoning = reasoning
        self._access = access

    def prepare(self, call: ChatCall) -> Prepared:
        """Renders and tokenises. Raises `RequestError` for what cannot be served."""
        tools = self._offered(call)
        prompt = self._encoded(call, tools)
        if not call.chat:
            return Prepared(Job(prompt, call.config), partial(AnswerReader, config=call.config))
        started = self._starts_in_reasoning(prompt.ids)
        thinks_not = thinking_is_off(
            self._frontend.template_variables(checked_variables(call.template_kwargs))
        )
        form = self._form(call, tools, started, thinks_not)
        skip = call.config.skip_special_tokens and not self._tags_are_special(bool(tools))
        config = replace(call.config, response_format=form, skip_special_tokens=skip)
        never = call.has_form and thinks_not and not started  # no grammar that lets it think either
        reasoning = None if never else self.reasoning
        return Prepared(Job(prompt, config), self._reader(call, tools, reasoning, started))

    def submit(self, call: ChatCall, generation: Generation, *, stream: bool) -> ReaderFactory:
        """Prepare the call and submit it; returns how its answers are read. On a worker thread.

        Raises as `prepare` does.
        """
        prepared = self.prepare(call)
        generation.submit([prepared.job], stream=stream)
        return prepared.reader

    def count(self, call: ChatCall) -> int:
        """Tokens of the call's prompt."""
        return len(self._encoded(call, self._offered(call), to_count=True))

    def _encoded(self, call: ChatCall, tools: list[Tool], *, to_count: bool = False) -> EncodedPrompt:
        from lmdeploy_jax.engine.io.frontend import PromptOptions

        variables = dict(call.template_kwargs)
        options = PromptOptions(call.chat, tools or None, variables, call.cache_salt, self._access)
        return self._frontend.encode(call.prompt, options, to_count=to_count)

    def _offered(self, call: ChatCall) -> list[Tool]:
        """The tools that the model is told of."""
        choice = call.tool_choice
        if choice.mode == "none" or not call.tools:
            if choice.mode == "required":
                raise RequestError("tool_choice asks for a tool call, but the request holds no tools.")
            return []
        if self.tools is None:
            raise RequestError(
                "This model's format of tool calls is not known, so tools cannot be used. Start the server "
                "with --tool-call-parser, or set tool_choice to 'none'."
            )
        return _allowed(checked_tools(call.tools), choice)

    def _starts_in_reasoning(self, ids: Sequence[int]) -> bool:
        if self.reasoning is None:
            return False
        return self.reasoning.opened_by(self._tokenizer.decode(ids[-_TAIL:], skip_special_tokens=False))

    def _form(
        self, call: ChatCall, tools: list[Tool], started: bool, thinks_not: bool
    ) -> dict[str, Any] | None:
        """The form of the whole answer, reasoning included; None where it is free."""
        from lmdeploy_jax.guided import after_reasoning, tool_grammar

        form = call.config.response_format
        required = call.tool_choice.mode == "required"
        if tools and (required or (form is None and self._promises(tools))):
            assert self.tools is not None
            return tool_grammar(
                self.tools,
                tools,
                self._tokenizer,
                name=call.tool_choice.name,
                required=required,
                parallel=call.parallel_tool_calls,
                reasoning=self.reasoning,
                starts_in_reasoning=started,
                reasoning_forbidden=thinks_not,
            )
        if call.has_form and self.tools is not None and self.tools.frames:
            raise RequestError(
                "response_format cannot be enforced in the channels of this model's answers; leave it out, "
                "or start the server with --tool-call-parser none --reasoning-parser none."
            )
        if form is None or self.reasoning is None:
            return form
        return after_reasoning(form, self._tokenizer, self.reasoning, started, thinks_not)

    def _promises(self, tools: Sequence[Tool]) -> bool:
        """Whether calls must be watched, since the arguments of some have been promised to fit."""
        from lmdeploy_jax.guided import has_grammar

        assert self.tools is not None
        return has_grammar(self.tools) and any(tool["function"].get("strict") is True for tool in tools)

    def _tags_are_special(self, with_tools: bool) -> bool:
        """Whether leaving special tokens out of the text would hide the tags from the parser."""
        tags = list(self.tools.special_tokens) if self.tools and (with_tools or self.tools.frames) else []
        tags += [self.reasoning.open, self.reasoning.close] if self.reasoning else []
        ids = (self._tokenizer.token_to_id(tag) for tag in tags)
        return any(i is not None and self._tokenizer.is_special(i) for i in ids)

    def _reader(
        self, call: ChatCall, tools: list[Tool], reasoning: ReasoningFormat | None, started: bool
    ) -> ReaderFactory:
        """Content that is held to a form is not looked through for calls: it cannot hold any."""
        frames = self.tools is not None and self.tools.frames
        tool_format = self.tools if (tools or frames) and not call.has_form else None
        if tool_format is None and reasoning is None:
            return partial(AnswerReader, config=call.config)
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

        def make(choice: int) -> AnswerReader:
            parser = AnswerParser(reasoning, tool_format, schemas, started, call.has_form)
            counter = ReasoningCounter(self._tokenizer, reasoning, started) if reasoning else None
            return AnswerReader(choice, call.config, parser, counter, one_call=not call.parallel_tool_calls)

        return make


def _allowed(tools: Sequence[Tool], choice: ToolChoice) -> list[Tool]:
    """The tools that `choice` allows. Raises `RequestError` where it names one that there is not."""
    names = [tool["function"]["name"] for tool in tools]
    wanted = [choice.name] if choice.name is not None else list(choice.allowed or ())
    missing = [name for name in wanted if name not in names]
    if missing:
        raise RequestError(f"Allowed tool(s) not found in request.tools: {missing}.")
    if choice.allowed is None:
        return list(tools)
    return [tool for tool in tools if tool["function"]["name"] in choice.allowed]
