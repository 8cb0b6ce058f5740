"""`--config FILE`: flags from a YAML file. What the command line says too, the command line decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from absl import flags as absl_flags

from lmdeploy_jax.errors import ConfigError

NAME = "config"
HELP = "YAML file with flags as `name: value`; flags given here win over the file's"

NO_NUMBERS = {
    "invalid literal for int()": "a whole number is needed",
    "could not convert string to float": "a number is needed",
}


def apply(values: absl_flags.FlagValues, path: str) -> None:
    """Sets the flags that the file names. Raises ConfigError for a file that cannot be read, an unknown name
    and a value that does not fit.
    """
    for key, value in _read(Path(path)).items():
        name = str(key).replace("-", "_")
        if name not in values or name == NAME:
            raise ConfigError(f"{path}: {key!r} is no flag of this command; --help lists them.")
        if value is None:
            continue  # `key:` without a value counts as not given
        try:
            _set(values[name], value)
        except (absl_flags.Error, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: {key}: {fault_of(error)}") from error


def fault_of(error: Exception) -> str:
    """What is wrong with a flag's value, without Python's words for it."""
    fault = str(error)
    for pythons, ours in NO_NUMBERS.items():
        head, found, _ = fault.partition(pythons)
        fault = head + ours if found else fault
    return fault


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    try:
        found = yaml.safe_load(text)
    except (
        Exception
    ) as error:  # a YAMLError, or whatever a wrong date, number or nesting raises in the library
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, not a {type(found).__name__}.")
    return found


def _set(flag: absl_flags.Flag[Any], value: Any) -> None:
    given = flag.value if flag.present else None
    if flag.flag_type() == "multi json":  # the command line's objects are merged over the file's
        flag.value = [flag.parser.parse(value), *(given or [])]
    elif given is None:
        if isinstance(value, bool) != bool(flag.boolean):
            raise ValueError(f"{value!r} does not fit a flag of type {flag.flag_type()}")
        flag.parse(value if isinstance(value, bool | list) else str(value))
