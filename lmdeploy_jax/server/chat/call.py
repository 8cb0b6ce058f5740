"""What every chat protocol asks for, said in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.text.prompts import Prompt
from lmdeploy_jax.text.template_arguments import Tool


@dataclass(frozen=True)
class ToolChoice:
    """auto: call or talk; none: talk; required: call, `name` if one is given. Enforced by a grammar.

    allowed: names of the tools that may be called; None is all of them.
    """

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    allowed: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ChatCall:
    """A prompt, how it is to be continued, and how the answer is to be read.

    chat: False passes the prompt on without the chat template. config: its `response_format` holds for the
    answer's content, after any reasoning.
    """

    prompt: Prompt
    config: GenerationConfig
    chat: bool = True
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cache_salt: str = ""

    @property
    def has_form(self) -> bool:
        """Whether the content is held to a form. A call that is required goes first."""
        form = self.config.response_format
        return form is not None and form["type"] != "text" and self.tool_choice.mode != "required"
