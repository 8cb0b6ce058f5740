"""Chat templates as Python classes, which programs may register: LMDeploy's `lmdeploy.model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from lmdeploy_jax.errors import ConfigError, RequestError
from lmdeploy_jax.text.builtin_templates import ALIASES, BUILTIN, BuiltinTemplate, Layout
from lmdeploy_jax.text.chat_config import TAGS, ChatTemplateConfig
from lmdeploy_jax.text.conversation import Message, is_prefill

Messages = str | list[Message]


class BaseChatTemplate:
    """A chat template made of tags, those of `ChatTemplateConfig`; subclasses override what they print.

    capability: "completion" leaves the tags out. stop_words: texts that end an answer.
    """

    layout = Layout()  # has the tags that are not given

    def __init__(
        self,
        system: str | None = None,
        meta_instruction: str | None = None,
        eosys: str | None = None,
        user: str | None = None,
        eoh: str | None = None,
        assistant: str | None = None,
        eoa: str | None = None,
        separator: str | None = None,
        tool: str | None = None,
        eotool: str | None = None,
        capability: str = "chat",
        stop_words: Iterable[str] | None = None,
        **ignored: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in TAGS and value is not None}
        layout = replace(self.layout, **given)
        self.system, self.eosys = layout.system, layout.eosys
        self.meta_instruction = layout.meta_instruction or ""
        self.user, self.eoh = layout.user, layout.eoh
        self.assistant, self.eoa, self.separator = layout.assistant, layout.eoa, layout.separator
        self.tool, self.eotool = layout.tool or "", layout.eotool
        self.capability = capability
        self.stop_words = list(layout.stop_words if stop_words is None else stop_words)

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> str:
        """A user's text and the opening of the answer; `sequence_start`: behind the default system text."""
        if self.capability == "completion":
            return prompt
        begin = self.separator
        if sequence_start:
            begin = f"{self.system}{self.meta_instruction}{self.eosys}" if self.meta_instruction else ""
        return f"{begin}{self.user}{prompt}{self.eoh}{self.assistant}"

    def messages2prompt(self, messages: Messages, sequence_start: bool = True, **kwargs: Any) -> str:
        """A conversation and the opening of the answer; a text is a user's. Raises `RequestError`."""
        if isinstance(messages, str):
            return self.get_prompt(messages, sequence_start)
        tags = {name: getattr(self, name) for name in TAGS}
        tags |= {"meta_instruction": self.meta_instruction or None, "tool": self.tool or None}
        raw = self.layout.raw and not any(tags.values())
        layout = replace(self.layout, **tags, raw=raw or self.capability == "completion")
        return BuiltinTemplate(layout).render(messages)


Template = TypeVar("Template", bound=type[BaseChatTemplate])


class Registry:
    """Chat template classes by name, the built-in ones among them."""

    def __init__(self) -> None:
        self.module_dict: dict[str, type[BaseChatTemplate]] = {}
        for name in (*BUILTIN, *ALIASES):
            self.module_dict[name] = _builtin_class(name)

    def register_module(
        self,
        name: str | Iterable[str] | None = None,
        force: bool = False,
        module: type[BaseChatTemplate] | None = None,
    ) -> Callable[[Template], Template] | type[BaseChatTemplate]:
        """Register `module`, or the class that this decorates, under `name`, or its own.

        force: in the place of another one of that name. Raises `ConfigError` for what is no template class,
        KeyError for a name that is taken.
        """

        def register(kind: Template) -> Template:
            _check_class(kind)
            names = [kind.__name__] if name is None else [name] if isinstance(name, str) else list(name)
            for each in names:
                if each in self.module_dict and not force:
                    raise KeyError(
                        f"The chat template {each!r} is registered already; force=True replaces it."
                    )
                self.module_dict[each] = kind
            return kind

        return register if module is None else register(module)

    def get(self, name: str) -> type[BaseChatTemplate] | None:
        """The class of that name; None: there is none."""
        return self.module_dict.get(name)

    def made_by_user(self, name: str) -> bool:
        """Whether a program registered it, and it is not built in."""
        kind = self.get(name)
        return kind is not None and "layout" not in vars(kind)


def _builtin_class(name: str) -> type[BaseChatTemplate]:
    return type(name, (BaseChatTemplate,), {"layout": BUILTIN[ALIASES.get(name, name)]})


def _check_class(kind: object) -> None:
    if not isinstance(kind, type) or not issubclass(kind, BaseChatTemplate):
        raise ConfigError(
            f"{kind!r} cannot be registered: a chat template is a subclass of BaseChatTemplate."
        )


MODELS = Registry()


def template_of(config: ChatTemplateConfig) -> BaseChatTemplate:
    """The class that `config` names, or else the base, with its tags."""
    names = (*TAGS, "capability", "stop_words")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return (MODELS.get(config.model_name) or BaseChatTemplate)(**given)


class ClassTemplate:
    """A registered class as a model's chat template. Raises `ConfigError` where it cannot be made."""

    def __init__(self, config: ChatTemplateConfig) -> None:
        self._name = config.model_name
        try:
            template = template_of(config)
            words = config.stop_words if config.stop_words is not None else template.stop_words
        except Exception as error:  # a user's code
            raise ConfigError(f"The chat template {self._name!r} cannot be made: {error!r}") from error
        self._print, self.stop_words = template.messages2prompt, tuple(words or ())
        parameters = inspect.signature(self._print).parameters
        self.reads = frozenset(parameters) - {"messages", "sequence_start"}
        self._takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """What the class prints. It gets the variables that its `messages2prompt` names, or all of them where
        it has `**kwargs`. Raises `RequestError` for what it does not take, and with its words where it fails.
        """
        if continue_final_message or is_prefill(messages) or not add_generation_prompt:
            raise RequestError(
                f"The chat template {self._name!r} always opens an answer; end with a user's turn."
            )
        given = {name: value for name, value in {"tools": tools, **kwargs}.items() if value is not None}
        taken = {name: given[name] for name in given if self._takes_any or name in self.reads}
        if tools and "tools" not in taken:
            raise RequestError(f"The chat template {self._name!r} takes no tools.")
        try:
            text = self._print(messages, **taken)
        except Exception as error:  # a user's code
            raise RequestError(f"The chat template {self._name!r} failed: {error!r}") from error
        if not isinstance(text, str):
            raise RequestError(f"The chat template {self._name!r} gave {text!r:.200} instead of a text.")
        return text
