"""A checkpoint folder's `config.json` -> a decoder's config. Works without JAX: nothing is loaded yet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.converters.formats import recognise
from lmdeploy_jax.converters.headers import DOWNLOAD_AGAIN
from lmdeploy_jax.converters.text_part import text_part
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.config import DecoderConfig

ROPE_NAMES = ("rope_scaling", "rope_parameters")  # the old name prevails where a config has both


def read_config(
    folder: str | os.PathLike[str],
    hf_overrides: Mapping[str, Any] | None = None,
    model_format: str | None = None,
) -> DecoderConfig:
    """The `DecoderConfig` of a checkpoint folder; `hf_overrides` is laid over its `config.json`, nested too.

    `model_format`: see `formats.recognise`. Raises CheckpointError, ConfigError, and UnsupportedModelError
    for what is not implemented.
    """
    raw, where = text_part(*read_json(folder, hf_overrides))
    recognise(raw, where, folder, model_format)
    return build_config(raw, where)


def read_json(
    folder: str | os.PathLike[str], overrides: Mapping[str, Any] | None
) -> tuple[dict[str, Any], str]:
    """`config.json` with `overrides` laid over it, and its path. Raises CheckpointError."""
    path = Path(folder) / "config.json"
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no plain file; give the folder of a HuggingFace checkpoint")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found; give the folder of a HuggingFace checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:  # the last: nested a thousand deep and more
        raise CheckpointError(f"{path}: cannot be read: {error}; {DOWNLOAD_AGAIN}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: is a JSON {type(raw).__name__}, not an object")
    return _overlay(raw, _renamed(raw, overrides or {})), str(path)


def _renamed(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """`overrides` with RoPE's settings under the name that the config has for them: the other would replace
    them all, or be passed over. A config with one RoPE for each kind of layer is left alone.
    """
    held = next((name for name in ROPE_NAMES if raw.get(name)), "")
    settings = raw.get(held)
    given = {name: overrides[name] for name in ROPE_NAMES if isinstance(overrides.get(name), Mapping)}
    if (
        not given
        or not isinstance(settings, Mapping)
        or any(isinstance(v, Mapping) for v in settings.values())
    ):
        return overrides
    rest = {name: value for name, value in overrides.items() if name not in given}
    return rest | {
        held: {key: value for each in given.values() for key, value in _new_spelling(each).items()}
    }


def _new_spelling(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_type" if key == "type" else key: value for key, value in settings.items()}


def _overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _overlay(below, value)
        merged[key] = value
    return merged
