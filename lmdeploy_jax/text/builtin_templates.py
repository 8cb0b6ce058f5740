"""Chat templates by name, for checkpoints without a jinja template of their own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lmdeploy_jax.errors import ConfigError, RequestError
from lmdeploy_jax.text.chat_config import ChatTemplateConfig
from lmdeploy_jax.text.conversation import Message, is_prefill


@dataclass(frozen=True)
class Layout:
    """The tags of `ChatTemplateConfig`, all resolved, and two habits that tags cannot express.

    fold_system: the system text stands inside the first user turn.
    lead: stands between `assistant` and an answer that is already there, but not at the prompt's end, where
        the model is to write it itself.
    """

    system: str = ""
    meta_instruction: str | None = None
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    tool: str | None = None  # None: the template has no tool turn
    eotool: str = ""
    separator: str = ""
    stop_words: tuple[str, ...] = ()
    fold_system: bool = False
    lead: str = ""
    raw: bool = field(default=False)  # contents only


class BuiltinTemplate:
    """Prints a conversation by a `Layout`."""

    reads: frozenset[str] = frozenset()

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.stop_words = layout.stop_words

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt's text. An assistant's last message is left open; `kwargs` (jinja variables) mean
        nothing here.

        Raises `RequestError` for tools and tool calls, which these templates cannot print.
        """
        if tools or any(message.get("tool_calls") for message in messages):
            raise RequestError(
                "This chat template cannot present tools. Use a checkpoint whose own chat template does."
            )
        if self._layout.raw:
            return "".join(message["content"] for message in messages)
        turns = self._turns(messages)
        text = "".join(opening + body + closing for opening, body, closing in turns)
        if continue_final_message or is_prefill(messages):
            return text.removesuffix(turns[-1][2])
        return text + self._layout.assistant * add_generation_prompt

    def _turns(self, messages: list[Message]) -> list[tuple[str, str, str]]:
        """(opening tag, text, closing tag) of each turn, the default system text included."""
        layout = self._layout
        if layout.meta_instruction is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": layout.meta_instruction}, *messages]
        if layout.fold_system:
            messages = _fold_system(messages, layout)
        return [self._turn(message) for message in messages]

    def _turn(self, message: Message) -> tuple[str, str, str]:
        layout, content = self._layout, message["content"]
        match message["role"]:
            case "user":
                return layout.user, content, layout.eoh
            case "assistant":
                return layout.assistant + layout.lead, content, layout.eoa + layout.separator
            case "tool":
                if layout.tool is None:
                    raise RequestError("This chat template has no turn for the role 'tool'.")
                return layout.tool, content, layout.eotool
            case _:
                return layout.system, content, layout.eosys


def _fold_system(messages: list[Message], layout: Layout) -> list[Message]:
    """Moves a leading system text into the first user turn."""
    if messages[0]["role"] not in ("system", "developer"):
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise RequestError("This chat template needs a user's message after the system's.")
    text = layout.system + messages[0]["content"] + layout.eosys + messages[1]["content"]
    return [messages[1] | {"content": text}, *messages[2:]]


def _chatml(**changes: Any) -> Layout:
    layout = Layout(
        system="<|im_start|>system\n", eosys="<|im_end|>\n",
        user="<|im_start|>user\n", eoh="<|im_end|>\n",
        assistant="<|im_start|>assistant\n", eoa="<|im_end|>", separator="\n",
        tool="<|im_start|>tool\n", eotool="<|im_end|>\n",
        stop_words=("<|im_end|>",),
    )  # fmt: skip
    return replace(layout, **changes)


def _headers(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_INTERNLM_CREDO = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such "
    "as English and 中文."
)

BUILTIN: dict[str, Layout] = {
    "base": Layout(raw=True),
    "chatml": _chatml(),
    "qwen": _chatml(
        meta_instruction="You are a helpful assistant.",
        tool="<|im_start|>user\n<tool_response>\n", eotool="\n</tool_response><|im_end|>\n",
    ),
    "yi": _chatml(stop_words=("<|im_end|>", "<|endoftext|>")),
    "internlm2": _chatml(meta_instruction=_INTERNLM_CREDO, tool="<|im_start|>environment\n"),
    "internlm3": _chatml(meta_instruction=_INTERNLM_CREDO, tool="<|im_start|>environment\n"),
    "llama2": Layout(
        system="<<SYS>>\n", eosys="\n<</SYS>>\n\n", user="[INST] ", eoh=" [/INST]",
        eoa=" </s>", separator="<s>", lead=" ", fold_system=True, stop_words=("</s>",),
    ),
    "llama3": Layout(
        system=_headers("system"), eosys="<|eot_id|>", user=_headers("user"), eoh="<|eot_id|>",
        assistant=_headers("assistant"), eoa="<|eot_id|>", tool=_headers("ipython"), eotool="<|eot_id|>",
        stop_words=("<|eot_id|>", "<|end_of_text|>"),
    ),
    "mistral": Layout(
        eosys="\n\n", user="[INST] ", eoh=" [/INST]", eoa="</s>", lead=" ", fold_system=True,
        stop_words=("</s>",),
    ),
    "vicuna": Layout(
        meta_instruction=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        eosys=" ", user="USER: ", eoh=" ", assistant="ASSISTANT:", lead=" ", eoa="</s>",
        stop_words=("</s>",),
    ),
    "llava-v1": Layout(
        meta_instruction=(
            "A chat between a curious human and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the human's questions."
        ),
        eosys=" ", user="USER: ", eoh=" ", assistant="ASSISTANT:", lead=" ", eoa="</s>",
        stop_words=("</s>",),
    ),
    "llava-chatml": _chatml(meta_instruction="Answer the questions."),
    "glm4": Layout(
        system="<|system|>\n", user="<|user|>\n", assistant="<|assistant|>", lead="\n",
        tool="<|observation|>\n", stop_words=("<|user|>", "<|observation|>", "<|endoftext|>"),
    ),
    "gemma": Layout(
        eosys="\n\n", user="<start_of_turn>user\n", eoh="<end_of_turn>\n", assistant="<start_of_turn>model\n",
        eoa="<end_of_turn>", separator="\n", fold_system=True, stop_words=("<end_of_turn>",),
    ),
    "phi3": Layout(
        system="<|system|>\n", eosys="<|end|>\n", user="<|user|>\n", eoh="<|end|>\n",
        assistant="<|assistant|>\n", eoa="<|end|>", separator="\n", stop_words=("<|end|>",),
    ),
    "deepseek": Layout(
        eosys="\n\n", user="User: ", eoh="\n\n", assistant="Assistant:", lead=" ",
        eoa="<｜end▁of▁sentence｜>", stop_words=("<｜end▁of▁sentence｜>",),
    ),
}  # fmt: skip
ALIASES = {
    "qwen2": "qwen",
    "qwen3": "qwen",
    "llama3_1": "llama3",
    "codellama": "llama2",
    "mixtral": "mistral",
}


def known_names() -> list[str]:
    return sorted([*BUILTIN, *ALIASES])


def builtin(name: str) -> BuiltinTemplate:
    """The template of that name. Raises `ConfigError` that lists the known ones."""
    return BuiltinTemplate(_layout(name))


def from_config(config: ChatTemplateConfig) -> BuiltinTemplate:
    """The named template with the tags of `config` in place of its own.

    A free name is a template of its own, and must bring at least its `user` or `assistant` tag.
    """
    own = ("user" in config.tags or "assistant" in config.tags) and config.model_name not in known_names()
    layout = Layout() if own else _layout(config.model_name)
    changes: dict[str, Any] = dict(config.tags)
    if changes:
        changes["raw"] = False
    if config.stop_words is not None:
        changes["stop_words"] = tuple(config.stop_words)
    if config.capability == "completion":
        changes["raw"] = True
    return BuiltinTemplate(replace(layout, **changes))


def _layout(name: str) -> Layout:
    layout = BUILTIN.get(ALIASES.get(name, name))
    if layout is None:
        raise ConfigError(
            f"Unknown chat template {name!r}. Known: hf, {', '.join(known_names())}; or give a "
            "ChatTemplateConfig with its own tags."
        )
    return layout
