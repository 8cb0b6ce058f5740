"""`ChatTemplateConfig`: a chat template given as tags, LMDeploy's public dataclass and JSON format."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lmdeploy_jax.errors import ConfigError

CAPABILITIES = ("chat", "completion")


@dataclass
class ChatTemplateConfig:
    """A named template, and the tags that replace its own. A field that is None is inherited from the name.

    A conversation is printed as `system + meta_instruction + eosys` (where it has no system message of its
    own), then `user + text + eoh`, `assistant + text + eoa + separator` and `tool + text + eotool` for its
    messages, then `assistant` as the opening of the answer.

    model_name: a built-in name, "hf" for the checkpoint's own jinja, or a free name where the tags are given.
    model_path: for "hf", the folder to read the jinja from; None is the model's.
    capability: "chat", or "completion" for the bare text.
    stop_words: texts that end an answer.
    """

    model_name: str
    model_path: str | None = None
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    tool: str | None = None
    eotool: str | None = None
    separator: str | None = None
    capability: str | None = None
    stop_words: list[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model_name, str) or not self.model_name:
            raise ConfigError(f"ChatTemplateConfig.model_name={self.model_name!r} must be a name.")
        if self.capability not in (None, *CAPABILITIES):
            raise ConfigError(
                f"ChatTemplateConfig.capability={self.capability!r} is not supported. "
                f"Use one of {', '.join(CAPABILITIES)}."
            )
        self._check_words()
        for name in TAGS:
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(
                    f"ChatTemplateConfig.{name}={getattr(self, name)!r} must be a text or None."
                )

    def _check_words(self) -> None:
        words = self.stop_words
        if words is None:
            return
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
            raise ConfigError(
                f"ChatTemplateConfig.stop_words={words!r} must be a list of texts that are not empty."
            )
        self.stop_words = list(words)

    @property
    def tags(self) -> dict[str, str]:
        """The tags that are set."""
        return {name: value for name in TAGS if (value := getattr(self, name)) is not None}

    @property
    def chat_template(self) -> Any:
        """A `model.BaseChatTemplate` with these tags, of the class that is registered under the name."""
        classes = importlib.import_module("lmdeploy_jax.text.template_classes")  # which needs this module
        return classes.template_of(self)

    @classmethod
    def from_json(cls, file_or_string: str | Path) -> ChatTemplateConfig:
        """From a JSON file, or from the JSON text itself. Raises `ConfigError`, for unknown fields too."""
        text = str(file_or_string)
        if not text.lstrip().startswith("{"):
            path = Path(text).expanduser()
            if not path.is_file():
                raise ConfigError(f"There is no chat template file {text!r}.")
            text = path.read_text(encoding="utf-8")
        return cls._from_text(text)

    @classmethod
    def _from_text(cls, text: str) -> ChatTemplateConfig:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"The chat template is not valid JSON: {error}.") from error
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known] if isinstance(values, dict) else None
        if unknown is None or unknown or "model_name" not in values:
            raise ConfigError(
                "A chat template in JSON must be an object with 'model_name' and fields among "
                f"{', '.join(known[1:])}; unknown here: {unknown or 'nothing'}."
            )
        return cls(**values)

    def to_json(self, file_path: str | Path | None = None) -> str:
        """The fields that are set, as JSON; also written to `file_path` if given."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        text = json.dumps(values, ensure_ascii=False, indent=2)
        if file_path is not None:
            Path(file_path).expanduser().write_text(text + "\n", encoding="utf-8")
        return text


TAGS = (
    "system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa", "tool", "eotool", "separator",
)  # fmt: skip
