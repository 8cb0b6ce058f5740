"""Requests of the Responses protocol as chat calls, and the conversations that they go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.bodies import length, width
from lmdeploy_jax.server.chat.call import ChatCall
from lmdeploy_jax.server.ids import ToolCallIds
from lmdeploy_jax.server.responses.bodies import InputTokensRequest, ResponsesRequest
from lmdeploy_jax.server.responses.items import Message, messages_of
from lmdeploy_jax.server.responses.store import Item, ResponseStore, StoredResponse
from lmdeploy_jax.server.responses.tools import Toolbox
from lmdeploy_jax.text.conversation import normalise_messages
from lmdeploy_jax.text.prompts import Prompt

_MESSAGE_IDS = ToolCallIds("msg_")
# Fields that a GenerationConfig has under the same name.
_SAME = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "ignore_eos", "skip_special_tokens"),
    "include_stop_str_in_output",
)


@dataclass(frozen=True)
class Conversation:
    """messages: all up to a request, without its instructions. input: the items that the request adds.
    toolbox: its tools. store: where answers are kept; kept: whether this one is to be.
    """

    messages: list[Message]
    input: list[Item]
    toolbox: Toolbox
    store: ResponseStore
    kept: bool

    def keep(self, body: Mapping[str, Any]) -> None:
        """Let later requests go on from this response. A call in it that was cut off is left out of what they
        go on from.
        """
        if not self.kept:
            return
        whole = [i for i in body["output"] if "call_id" not in i or i["status"] == "completed"]
        said = messages_of(whole, self.toolbox, self.store.item)
        self.store.put(body["id"], StoredResponse([*self.messages, *said], body, self.input))


def continued(body: InputTokensRequest, store: ResponseStore, *, kept: bool = False) -> Conversation:
    """What the request says after what came before it. Raises `ApiError` for a response that is not kept."""
    toolbox = Toolbox(body)
    previous = body.previous_response_id
    before = store.get(previous, "previous_response_id").messages if previous else []
    said = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = [*before, *messages_of(said, toolbox, store.item)]
    return Conversation(messages, list(map(_listed, said)), toolbox, store, kept)


def _listed(item: Mapping[str, Any]) -> Item:
    """An input item as it is listed: it has a type, an id, and its texts are parts."""
    kind = item.get("type", "message")
    listed = {"id": _MESSAGE_IDS.new(), "type": kind, **item}
    if isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        listed["content"] = [{"type": part, "text": item["content"]}]
    return listed


def chat_call(
    body: InputTokensRequest, conversation: Conversation, config: GenerationConfig, *, images: bool
) -> ChatCall:
    """The call that continues the conversation. System texts of the request come first, as one message.

    images: whether the model takes any.
    """
    said = conversation.messages
    texts = [body.instructions] if body.instructions else []
    texts += [m["content"] for m in said if m["role"] == "system"]
    system: list[Message] = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    messages: Sequence[Message] = system + [m for m in said if m["role"] != "system"]
    return ChatCall(
        Prompt(messages=tuple(normalise_messages(messages, images=images))),
        config,
        tools=conversation.toolbox.functions,
        tool_choice=conversation.toolbox.choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        template_kwargs=_template_kwargs(body),
        cache_salt=getattr(body, "cache_salt", None) or "",
    )


def sampling(body: ResponsesRequest) -> dict[str, Any]:
    """Fields of a GenerationConfig, None for what is left open."""
    return {name: getattr(body, name) for name in _SAME} | {
        "max_new_tokens": length(body.max_output_tokens),
        "top_k": width(body.top_k),
        "random_seed": None if body.seed is None else body.seed & 0xFFFFFFFF,
        "stop_words": [body.stop] if isinstance(body.stop, str) else body.stop,
        "response_format": body.form(),
        "logprobs": body.logprobs,
    }


def _template_kwargs(body: InputTokensRequest) -> dict[str, Any]:
    effort = body.reasoning.effort if body.reasoning else None
    named = {"enable_thinking": body.enable_thinking, "reasoning_effort": effort}
    return {name: value for name, value in named.items() if value is not None} | (
        body.chat_template_kwargs or {}
    )
