"""What a call of the pipeline is given: checked, and brought to one list of requests."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.errors import ConfigError, RequestError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.session import Session, Turn

if TYPE_CHECKING:
    from lmdeploy_jax.engine.io.frontend import PromptOptions
    from lmdeploy_jax.text.prompts import Prompt
    from lmdeploy_jax.vision.access import MediaAccess

Configs = GenerationConfig | Sequence[GenerationConfig] | None
Sessions = Session | Sequence[Session] | None
_TEMPLATE_WORDS = (
    "enable_thinking",
    "reasoning_effort",
)  # variables of chat templates with a name of their own
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
logger = logging.getLogger("lmdeploy_jax")
_MEDIA_WORDS = ("mm_processor_kwargs", "media_io_kwargs")
KEYWORDS = ("input_ids", "tools", "chat_template_kwargs", *_MEDIA_WORDS, *_TEMPLATE_WORDS)


@dataclass(frozen=True)
class PromptRequest:
    """One prompt of a call. What cannot be served stands as its error, which becomes its answer."""

    prompt: Prompt | RequestError
    config: GenerationConfig
    session: Session | None = None


@dataclass(frozen=True)
class Arguments:
    """A call's arguments. single: one prompt was meant, so that one response is due."""

    requests: list[PromptRequest]
    options: PromptOptions
    single: bool


def parse(
    prompts: Any,
    gen_config: Configs,
    sessions: Sessions,
    kwargs: Mapping[str, Any],
    *,
    do_preprocess: bool = True,
    adapter_name: str | None = None,
    images: MediaAccess | None = None,
    **switches: object,
) -> Arguments:
    """The arguments of a call for any number of prompts, see `Pipeline.infer`.

    images: what they may be loaded from; None where the model takes none.

    Raises ValueError for a form that is no prompt and for lists of different lengths, TypeError for an
    unknown keyword and for what is no config, session or switch, `RequestError` for a keyword that cannot be
    honoured.
    """
    check_switches(do_preprocess=do_preprocess, **switches)
    _check_sampling(gen_config)
    options = _prompt_options(do_preprocess, adapter_name, kwargs, images)
    given, single = _given_prompts(prompts, kwargs, images is not None)
    given = [_with_media_options(prompt, kwargs) for prompt in given]
    configs = _aligned_configs(gen_config, len(given))
    owners = _aligned_sessions(sessions, len(given))
    requests = [PromptRequest(*each) for each in zip(given, configs, owners, strict=True)]
    return Arguments(requests, options, single)


def parse_single(
    prompt: Any, gen_config: GenerationConfig | None, kwargs: Mapping[str, Any], **others: Any
) -> Arguments:
    """The arguments of a call for one prompt. Raises as `parse` does, ValueError for several prompts."""
    _check_config(gen_config)
    call = parse(prompt, gen_config, None, kwargs, **others)
    if not call.single:
        raise ValueError("async_stream takes one prompt; start one for each of several.")
    return call


def parse_turn(
    prompt: Turn,
    session: Session,
    gen_config: GenerationConfig | None,
    kwargs: Mapping[str, Any],
    **others: Any,
) -> Arguments:
    """The arguments of a conversation's next turn, whose prompt is the conversation so far.

    Raises as `parse` does, ValueError for what is no turn, `RequestError` for a config with several answers.
    """
    _check_turn(prompt, session, gen_config)
    config = gen_config or session.gen_config or GenerationConfig()
    if config.n != 1:
        raise RequestError(f"n={config.n}: a conversation goes on from one answer; use infer.")
    return parse(session.messages(prompt), config, session, kwargs, **others)


def refuse(name: str, value: object, reason: str) -> None:
    """Raises `ConfigError` for an argument of LMDeploy's that is set but cannot work."""
    if value:
        raise ConfigError(f"{name}={value!r} is not supported: {reason}. Leave it out.")


def check_switches(**switches: object) -> None:
    """Raises TypeError for a text where True or False is meant: "no" would be taken as on."""
    for name, value in switches.items():
        if isinstance(value, str):
            raise TypeError(f"{name}={value!r} is a text: give True or False.")


def media_access(allowed_media_domains: Sequence[str] | None) -> MediaAccess:
    """What a program's images may be loaded from. Raises `ConfigError` for what is no list of hosts."""
    from lmdeploy_jax.vision.access import MediaAccess

    hosts = allowed_media_domains
    if hosts is not None and (isinstance(hosts, str) or not all(isinstance(host, str) for host in hosts)):
        raise ConfigError(f"allowed_media_domains={hosts!r} is invalid: it must be a list of hosts.")
    return MediaAccess(allowed_media_domains=None if hosts is None else [host.lower() for host in hosts])


def refuse_unknown_fields(unknown: Mapping[str, Any]) -> None:
    """Raises TypeError for arguments that `pipeline()` does not have."""
    engine_fields = {f.name for f in fields(JaxEngineConfig)}
    for name, value in unknown.items():
        hint = f": give backend_config=JaxEngineConfig({name}={value!r})" if name in engine_fields else ""
        raise TypeError(f"pipeline() got an unexpected keyword argument {name!r}{hint}")


def _prompt_options(
    do_preprocess: bool, adapter_name: str | None, kwargs: Mapping[str, Any], images: MediaAccess | None
) -> PromptOptions:
    from lmdeploy_jax.engine.io.frontend import PromptOptions
    from lmdeploy_jax.text.template_arguments import checked_variables
    from lmdeploy_jax.vision.access import MediaAccess

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
    return PromptOptions(do_preprocess, tools, variables, access=images or MediaAccess())


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    settings = {f.name for f in fields(GenerationConfig)}
    for name in kwargs:
        if name not in KEYWORDS:
            hint = f": give gen_config=GenerationConfig({name}=...)" if name in settings else ""
            raise TypeError(f"unexpected keyword argument {name!r}{hint}. Known are {', '.join(KEYWORDS)}.")


def _with_media_options(prompt: Prompt | RequestError, kwargs: Mapping[str, Any]) -> Prompt | RequestError:
    from lmdeploy_jax.text.prompts import with_media_options

    if isinstance(prompt, RequestError):
        return prompt
    return with_media_options(prompt, kwargs)


def _given_prompts(
    prompts: Any, kwargs: Mapping[str, Any], images: bool
) -> tuple[list[Prompt | RequestError], bool]:
    """Raises ValueError for a form that is no prompt at all, and unless exactly one of prompts and input_ids
    is given.
    """
    from lmdeploy_jax.text.prompts import normalise_prompts

    input_ids = kwargs.get("input_ids")
    if (prompts is None) == (input_ids is None):
        raise ValueError("You must specify exactly one of messages or input_ids.")
    if prompts is None:
        lists, single = id_lists(input_ids)
        prompts = lists[0] if single else lists
    return normalise_prompts(prompts, images=images)


def id_lists(input_ids: Any) -> tuple[list[list[int]], bool]:
    """Sequences of token ids as lists, and whether a single one was meant. Raises ValueError otherwise.

    input_ids: as a list, an array, or what transformers' `apply_chat_template` gives, which has them by name.
    """
    if isinstance(input_ids, Mapping):
        input_ids = input_ids.get("input_ids", ())
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    if rows and _are_ids(rows):
        return [rows], True
    lists = [list(row) for row in rows if not isinstance(row, str | Mapping) and isinstance(row, Iterable)]
    if len(lists) != len(rows) or not all(map(_are_ids, lists)):
        raise ValueError("input_ids must be a list of token ids, or a list of such lists.")
    return lists, False


def _are_ids(row: list[Any]) -> bool:
    return all(hasattr(i, "__index__") for i in row)


def _check_sampling(gen_config: Configs) -> None:
    """Once for each set of fields: LMDeploy decodes greedily unless `do_sample`, whatever else is set."""
    for config in gen_config if isinstance(gen_config, Sequence) else [gen_config]:
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


def _check_turn(prompt: object, session: object, gen_config: object) -> None:
    """Raises ValueError for what is no turn of a conversation, TypeError for what is no session or config."""
    _check_config(gen_config)
    from lmdeploy_jax.text.prompts import is_image_pair

    messages = prompt if isinstance(prompt, list) and prompt else [prompt]
    pair = isinstance(prompt, tuple) and is_image_pair(prompt)
    if not (pair or isinstance(prompt, str) or all(isinstance(message, Mapping) for message in messages)):
        raise ValueError(
            f"Unsupported prompt: {prompt!r:.200}. A turn is a text, a pair of a text and an image or "
            "images, a message, or a list of messages."
        )
    if not isinstance(session, Session):
        raise TypeError(f"session must be a Session, as chat() or session() gave it, not {session!r:.200}.")


def _check_config(gen_config: object) -> None:
    """Raises TypeError unless it is one config, or None."""
    if gen_config is not None and not isinstance(gen_config, GenerationConfig):
        raise TypeError(f"gen_config must be a GenerationConfig, not {gen_config!r:.200}.")


def _aligned_configs(gen_config: Configs, count: int) -> list[GenerationConfig]:
    """One config for each prompt: copies, since answers under way read them when their owner may have changed
    them for the next call. Raises ValueError for a list of another length, TypeError for others.
    """
    if gen_config is None or isinstance(gen_config, GenerationConfig):
        return [copy(gen_config) if gen_config else GenerationConfig()] * count
    _check_kind("gen_config", GenerationConfig, gen_config)
    if len(gen_config) != count:
        raise ValueError(
            "input gen_config length differs from the length of prompts. "
            f"Got {len(gen_config)} configs and {count} prompts."
        )
    return list(map(copy, gen_config))


def _aligned_sessions(sessions: Sessions, count: int) -> list[Session | None]:
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
