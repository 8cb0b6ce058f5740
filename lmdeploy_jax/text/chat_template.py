"""Which chat template a model gets: the user's choice, the checkpoint's own jinja, or a built-in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from lmdeploy_jax.errors import CheckpointError, ConfigError
from lmdeploy_jax.text.builtin_templates import ALIASES, BUILTIN, BuiltinTemplate, builtin, from_config
from lmdeploy_jax.text.chat_config import ChatTemplateConfig
from lmdeploy_jax.text.conversation import Message, normalise_messages
from lmdeploy_jax.text.jinja_template import HfChatTemplate
from lmdeploy_jax.text.settings import read_json, read_object
from lmdeploy_jax.text.template_classes import MODELS, ClassTemplate
from lmdeploy_jax.text.tokenizer import Tokenizer

__all__ = [
    "BuiltinTemplate", "ChatTemplate", "ChatTemplateConfig", "HfChatTemplate", "builtin",
    "normalise_messages", "select",
]  # fmt: skip

logger = logging.getLogger("lmdeploy_jax")

# config.json's model_type -> built-in. "llama" is missing on purpose: Llama 1 to 3, Yi and Vicuna all call
# themselves so; their vocabulary tells, see `_by_vocabulary`.
_BY_MODEL_TYPE = {
    "qwen": "qwen", "qwen2": "qwen", "qwen2_moe": "qwen", "qwen3": "qwen", "qwen3_moe": "qwen",
    "internlm2": "internlm2", "internlm3": "internlm3", "mistral": "mistral", "mixtral": "mistral",
    "chatglm": "glm4", "glm": "glm4", "glm4": "glm4", "gemma": "gemma", "gemma2": "gemma", "phi3": "phi3",
    "deepseek_v2": "deepseek", "deepseek_v3": "deepseek",
}  # fmt: skip
_BY_TOKENS = (("chatml", ("<|im_start|>", "<|im_end|>")), ("llama3", ("<|start_header_id|>", "<|eot_id|>")))


class ChatTemplate(Protocol):
    """Prints messages, in the shape of `normalise_messages`, as the text that the model was trained on."""

    stop_words: tuple[str, ...]

    @property
    def reads(self) -> frozenset[str]:
        """Names of the variables that it looks at."""
        ...

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str: ...


def select(
    tokenizer: Tokenizer, model_path: str | Path, config: ChatTemplateConfig | str | None = None
) -> ChatTemplate:
    """The chat template of a model.

    config: a built-in or registered name, the path of a .json (ChatTemplateConfig) or .jinja file, a
        `ChatTemplateConfig`, or None: then the checkpoint's own jinja, else a built-in by model_type and
        special tokens, else `base`.
    Raises `ConfigError` for a choice that names nothing or is broken, `CheckpointError` where the
    checkpoint's own template is.
    """
    folder = Path(model_path).expanduser()
    choice = _named(config) if isinstance(config, str) else config
    if choice is None:
        return _own_template(tokenizer, folder) or _by_evidence(tokenizer, folder)
    if isinstance(choice, Path):
        return _of_file(tokenizer, choice)
    if MODELS.made_by_user(choice.model_name):
        return ClassTemplate(choice)
    if choice.model_name != "hf":
        return from_config(choice)
    return _chosen_own(tokenizer, choice, Path(choice.model_path or folder).expanduser())


def _named(choice: str) -> ChatTemplateConfig | Path:
    """What a text on the command line means: a name or a file."""
    path = Path(choice).expanduser()
    if choice in BUILTIN or choice in ALIASES or choice == "hf":
        return ChatTemplateConfig(choice)
    if path.suffix in (".jinja", ".jinja2"):
        return path
    if path.suffix == ".json" or choice.lstrip().startswith("{"):
        return ChatTemplateConfig.from_json(choice)
    return ChatTemplateConfig(choice)


def _of_file(tokenizer: Tokenizer, path: Path) -> HfChatTemplate:
    try:
        return HfChatTemplate(path.read_text(encoding="utf-8"), *_tokens(tokenizer))
    except (OSError, UnicodeError, CheckpointError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}") from error


def _chosen_own(tokenizer: Tokenizer, config: ChatTemplateConfig, folder: Path) -> ChatTemplate:
    """`model_name="hf"`: the checkpoint's jinja, of which only the stop words can be replaced."""
    if config.tags:
        raise ConfigError(f"The jinja chat template ('hf') has no tags to replace: {', '.join(config.tags)}.")
    if config.capability == "completion":
        return builtin("base")
    own = _own_template(tokenizer, folder)
    if own is None:
        raise ConfigError(f"The chat template 'hf' was asked for, but {folder} has none.")
    if config.stop_words is not None:
        own.stop_words = tuple(config.stop_words)
    return own


def _own_template(tokenizer: Tokenizer, folder: Path) -> HfChatTemplate | None:
    """The checkpoint's jinja. `.jinja` files go before tokenizer_config.json, as in HF."""
    source = _source(folder)
    return HfChatTemplate(source, *_tokens(tokenizer)) if source else None


def _source(folder: Path) -> str | dict[str, str] | None:
    files = _files(folder)
    if files:
        return files
    source = read_object(folder / "tokenizer_config.json").get("chat_template")
    if not source:  # transformers reads the next one for processors alone; better than none
        in_file = read_json(folder / "chat_template.json")
        source = in_file.get("chat_template") if isinstance(in_file, dict) else in_file
    if not source or isinstance(source, str):
        return source or None
    return _by_name(source, folder)


def _files(folder: Path) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/NAME.jinja."""
    found = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = folder / "chat_template.jinja"
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


def _by_name(source: Any, folder: Path) -> dict[str, str]:
    """Named templates, written as a list of {name, template} or as an object."""
    try:
        return (
            {item["name"]: item["template"] for item in source} if isinstance(source, list) else dict(source)
        )
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: chat_template must be a text or a list of objects with 'name' and 'template'."
        ) from error


def _tokens(tokenizer: Tokenizer) -> tuple[dict[str, str], tuple[str, ...]]:
    """Special tokens as a template sees them, and those that end a turn."""
    named = {name: token.content for name, token in tokenizer.settings.named.items() if token}
    named |= {name: t for name in ("bos_token", "eos_token") if (t := getattr(tokenizer, name)) is not None}
    turn_end = tokenizer.settings.config.get("eot_token")
    ends = [tokenizer.eos_token, turn_end if isinstance(turn_end, str) else None]
    return named, tuple(dict.fromkeys(token for token in ends if token))


def _by_evidence(tokenizer: Tokenizer, folder: Path) -> BuiltinTemplate:
    model_type = read_object(folder / "config.json").get("model_type")
    name = _BY_MODEL_TYPE.get(model_type or "") or _by_vocabulary(tokenizer)
    if name is None:
        logger.warning(
            "the checkpoint has no chat template and its model_type %r names none; prompts are passed on as "
            "they are. Choose one with chat_template_config: %s", model_type, ", ".join(BUILTIN),
        )  # fmt: skip
        return builtin("base")
    logger.info("the checkpoint has no chat template; using the built-in %r", name)
    return builtin(name)


def _by_vocabulary(tokenizer: Tokenizer) -> str | None:
    return next(
        (n for n, tokens in _BY_TOKENS if all(tokenizer.token_to_id(t) is not None for t in tokens)), None
    )
