"""What a checkpoint says of its quantisation: `quantization_config`, wherever it stands."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy_jax.converters.fields import QUANTISATION, shown
from lmdeploy_jax.errors import CheckpointError, UnsupportedModelError

SIDE_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
NESTED = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Settings:
    """The fields of a quantisation; `where` names the file and field in errors."""

    method: str
    fields: Mapping[str, Any]
    where: str

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of the names that is there and not null."""
        return next((self.fields[n] for n in names if self.fields.get(n) is not None), default)

    def group(self, *names: str) -> int | None:
        """A group size: -1 is the whole row, None what the tensors say."""
        value = self.get(*names)
        if value is not None and (type(value) is not int or (value < 1 and value != -1)):
            raise self.damaged(names[0], value, "a positive integer, or -1")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise self.damaged(name, value, "true or false")
        return value

    def only(self, name: str, allowed: Sequence[Any], *others: str, lower: bool = False) -> Any:
        """A field's value, the first of `allowed` by default. UnsupportedModelError for any other."""
        value = self.get(name, *others, default=allowed[0])
        value = value.lower() if lower and isinstance(value, str) else value
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise UnsupportedModelError(
                f"{self.where}: {name}={shown(value)} is not supported with {self.method}; supported: "
                f"{', '.join(map(str, allowed))}"
            )
        return value

    def table(self, name: str) -> Mapping[str, Any]:
        """A nested object; empty where it is absent or null."""
        value = self.get(name, default={})
        if not isinstance(value, Mapping):
            raise self.damaged(name, value, "an object")
        return value

    def damaged(self, name: str, value: Any, expected: str) -> CheckpointError:
        """The error that says which field has a value that means nothing."""
        return CheckpointError(f"{self.where}: {name} is {shown(value)}; it must be {expected}")


def find_settings(
    raw: Mapping[str, Any], where: str, folder: str | os.PathLike[str] | None
) -> Settings | None:
    """The settings in a config, in the config of its language model, or in a file beside it; None: none.

    `quant_method` is in lower case. Raises CheckpointError.
    """
    for outer in (raw, *(raw[name] for name in NESTED if isinstance(raw.get(name), Mapping))):
        for name in sorted(QUANTISATION, reverse=True):
            if outer.get(name):
                return _settings(outer[name], f"{where}: {name}", "compressed-tensors")
    for file, method in SIDE_FILES.items():
        path = Path(folder or "") / file
        if folder is not None and path.is_file():
            fields = _read(path)
            return _settings(fields.get("quantization") or fields, str(path), method)
    return None


def _settings(fields: Any, where: str, default: str) -> Settings:
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{where} is {shown(fields)}; it must be an object")
    method = fields.get("quant_method") or ("modelopt" if "quant_algo" in fields else default)
    if not isinstance(method, str):
        raise CheckpointError(f"{where}: quant_method is {shown(method)}; it must be a format's name")
    return Settings(method.lower(), fields, where)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{path}: is a JSON {type(fields).__name__}, not an object")
    return fields
