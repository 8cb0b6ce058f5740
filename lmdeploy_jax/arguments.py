"""What a call of the pipeline is given: checked, and brought to one list."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.errors import ConfigError, RequestError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.session import Session

if TYPE_CHECKING:
    from lmdeploy_jax.engine.io.frontend import PromptOptions
    from lmdeploy_jax.text.prompts import Prompt

Configs = GenerationConfig | Sequence[GenerationConfig] | None
_TEMPLATE_WORDS = (
    "enable_thinking",
    "reasoning_effort",
)  # variables of chat templates with a name of their own
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
logger = logging.getLogger("lmdeploy_jax")
KEYWORDS = ("input_ids", "tools", "chat_template_kwargs", *_TEMPLATE_WORDS)


def refuse(name: str, value: object, reason: str) -> None:
    """Raises `ConfigError` for an argument of LMDeploy's that is set but cannot work."""
    if value:
        raise ConfigError(f"{name}={value!r} is not supported: {reason}. Leave it out.")


def check_switches(**switches: object) -> None:
    """Raises TypeError for a text where True or False is meant: "no" would be taken as on."""
    for name, value in switches.items():
        if isinstance(value, str):
            raise TypeError(f"{name}={value!r} is a text: give True or False.")


def refuse_unknown_fields(unknown: Mapping[str, Any]) -> None:
    """Raises TypeError for arguments that `pipeline()` does not have."""
    engine_fields = {f.name for f in fields(JaxEngineConfig)}
    for name, value in unknown.items():
        hint = f": give backend_config=JaxEngineConfig({name}={value!r})" if name in engine_fields else ""
        raise TypeError(f"pipeline() got an unexpected keyword argument {name!r}{hint}")


def prompt_options(do_preprocess: bool, adapter_name: str | None, kwargs: Mapping[str, Any]) -> PromptOptions:
    """Raises TypeError for an unknown keyword, `RequestError` for one that cannot be honoured."""
    from lmdeploy_jax.engine.io.frontend import PromptOptions
    from lmdeploy_jax.text.template_arguments import checked_variables

    _refuse_unknown(kwargs)
    if adapter_name is not None:
        raise RequestError(
            f"adapter_name={adapter_name!r} is not supported: LoRA adapters cannot be loaded yet."
        )
    variables = checked_variables(kwargs.get("chat_template_kwargs") or {})
    variables |= {name: kwargs[name] for name in _TEMPLATE_WORDS if kwargs.get(name) is not None}
    tools = kwargs.get("tools") or None
    if not do_preprocess and (tools or variables):
        raise RequestError(
            "do_preprocess=False leaves out the chat template: tools and template variables have no effect."
        )
    return PromptOptions(do_preprocess, tools, variables)


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    settings = {f.name for f in fields(GenerationConfig)}
    for name in kwargs:
        if name not in KEYWORDS:
            hint = f": give gen_config=GenerationConfig({name}=...)" if name in settings else ""
            raise TypeError(f"unexpected keyword argument {name!r}{hint}. Known are {', '.join(KEYWORDS)}.")


def given_prompts(prompts: Any, kwargs: Mapping[str, Any]) -> tuple[list[Prompt | RequestError], bool]:
    """The prompts as a list, and whether a single one was meant. A bad prompt stands as its error.

    Raises ValueError for a form that is no prompt at all, and unless exactly one of prompts and input_ids
    is given.
    """
    input_ids = kwargs.get("input_ids")
    if (prompts is None) == (input_ids is None):
        raise ValueError("You must specify exactly one of messages or input_ids.")
    if prompts is not None:
        return _normalised(prompts)
    lists, single = id_lists(input_ids)
    return _normalised(lists[0] if single else lists)


def _normalised(prompts: Any) -> tuple[list[Prompt | RequestError], bool]:
    from lmdeploy_jax.text.prompts import normalise_prompts

    try:
        items, single = normalise_prompts(prompts)
        return list(items), single
    except RequestError as error:
        if isinstance(prompts, list) and not isinstance(prompts[0], Mapping):
            return [_normalised(prompt)[0][0] for prompt in prompts], False
        return [error], True


def id_lists(input_ids: Any) -> tuple[list[list[int]], bool]:
    """Sequences of token ids as lists, and whether a single one was meant. Raises ValueError otherwise."""
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    if rows and _are_ids(rows):
        return [rows], True
    lists = [list(row) for row in rows if not isinstance(row, str | Mapping) and isinstance(row, Iterable)]
    if len(lists) != len(rows) or not all(map(_are_ids, lists)):
        raise ValueError("input_ids must be a list of token ids, or a list of such lists.")
    return lists, False


def _are_ids(row: list[Any]) -> bool:
    return all(hasattr(i, "__index__") for i in row)


def warn_of_greedy(gen_config: Configs) -> None:
    """Once for each set of fields: LMDeploy decodes greedily unless `do_sample`, whatever else is set."""
    given = [gen_config] if isinstance(gen_config, GenerationConfig) else gen_config or ()
    for config in given:
        if isinstance(config, GenerationConfig) and not config.do_sample and config.temperature != 0:
            usual = GenerationConfig
            names = tuple(name for name in _SAMPLING if getattr(config, name) != getattr(usual, name))
            _warn_of_greedy(names)


@cache
def _warn_of_greedy(names: tuple[str, ...]) -> None:
    if names:
        logger.warning(
            "%s of GenerationConfig: no effect, since do_sample is off and answers are greedy. Give "
            "do_sample=True to sample.",
            ", ".join(names),
        )


def check_turn(prompt: object, session: object, gen_config: object) -> None:
    """Raises ValueError for what is no turn of a conversation, TypeError for what is no session or config."""
    check_config(gen_config)
    messages = prompt if isinstance(prompt, list | tuple) and prompt else [prompt]
    if not isinstance(prompt, str) and not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"Unsupported prompt: {prompt!r:.200}. A turn is a text, a message, or a list of messages."
        )
    if session is not None and not isinstance(session, Session):
        raise TypeError(f"session must be a Session, as chat() or session() gave it, not {session!r:.200}.")


def check_config(gen_config: object) -> None:
    """Raises TypeError unless it is one config, or None."""
    if gen_config is not None and not isinstance(gen_config, GenerationConfig):
        raise TypeError(f"gen_config must be a GenerationConfig, not {gen_config!r:.200}.")


def aligned_configs(gen_config: Configs, count: int) -> list[GenerationConfig]:
    """One config for each prompt. Raises ValueError for a list of another length, TypeError for others."""
    if gen_config is None or isinstance(gen_config, GenerationConfig):
        return [gen_config or GenerationConfig()] * count
    _check_kind("gen_config", GenerationConfig, gen_config)
    if len(gen_config) != count:
        raise ValueError(
            "input gen_config length differs from the length of prompts. "
            f"Got {len(gen_config)} configs and {count} prompts."
        )
    return list(gen_config)


def aligned_sessions(sessions: Session | Sequence[Session] | None, count: int) -> list[Session | None]:
    """One session, or None, for each prompt. Raises ValueError for another number, TypeError for others."""
    if sessions is None:
        return [None] * count
    if not isinstance(sessions, Session):
        _check_kind("sessions", Session, sessions)
    given: list[Session | None] = [sessions] if isinstance(sessions, Session) else list(sessions)
    if len(given) != count:
        raise ValueError(
            f"prompts and sessions should have the same length. Got {count} prompts and {len(given)} sessions"
        )
    return given


def _check_kind(name: str, kind: type, values: object) -> None:
    for value in values if isinstance(values, Sequence) else [values]:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, or a list of them; it has {value!r}.")
