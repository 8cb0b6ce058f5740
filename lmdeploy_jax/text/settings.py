"""What the files beside a tokenizer say: special tokens, added tokens, stop ids, sentencepiece's switches."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmdeploy_jax.errors import CheckpointError

MAX_ID = 2**32 - 1  # `tokenizers` takes ids as u32
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SAVE_FAST = (  # the remedy for vocabularies that only Python code can read
    "transformers.AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True).save_pretrained(FOLDER)"
)


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text before the model's own segmentation (HF's `AddedToken`)."""

    content: str
    special: bool = True
    lstrip: bool = False  # swallows the white space on its left
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """The merged view of tokenizer_config.json, special_tokens_map.json and added_tokens.json."""

    config: dict[str, Any]
    # bos_token, eos_token ..., and names of the checkpoint's own. None: the checkpoint says there is none.
    named: dict[str, AddedToken | None]
    extra: tuple[AddedToken, ...]  # further special tokens without an id of their own
    added: dict[int, AddedToken]  # id -> token, as the files assign them


def read_json(path: Path) -> Any:
    """Parses a JSON file; None if there is none. Raises `CheckpointError` if it is not JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # the latter: nested a thousand deep and more
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download the file again.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Like `read_json`, for files that must hold an object; {} if there is none."""
    value = read_json(path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads every file beside the vocabulary. Missing files count as empty."""
    config = read_object(folder / "tokenizer_config.json")
    merged = read_object(folder / "special_tokens_map.json") | config
    named = {name: _token(merged[name]) for name in NAMED_TOKENS if name in merged} | _own_names(merged)
    extra = tuple(token for token in map(_token, _extra_tokens(folder, merged)) if token)
    special = {token.content for token in named.values() if token}
    return TokenizerSettings(config, named, extra, _added(folder, config, special, extra))


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json or, where that names none, of config.json.

    Raises `CheckpointError` for what is no integer or list of integers.
    """
    for name in ("generation_config.json", "config.json"):
        given = read_object(folder / name).get("eos_token_id")
        if given is not None:
            ids = given if isinstance(given, list) else [given]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise CheckpointError(
                    f"{folder / name}: eos_token_id is {reprlib.repr(given)}; it must be a token id or a "
                    "list of token ids."
                )
            return tuple(ids)
    return ()


def _token(value: Any) -> AddedToken | None:
    if isinstance(value, str):
        return AddedToken(value)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {k: bool(value[k]) for k in ("lstrip", "rstrip", "single_word", "normalized") if k in value}
        return AddedToken(value["content"], special=bool(value.get("special", True)), **flags)
    return None


def _own_names(merged: dict[str, Any]) -> dict[str, AddedToken | None]:
    """Special tokens by names of the checkpoint's own, such as image_token: from objects, and from keys that
    end as the others' do.
    """
    own = {name: value for name, value in merged.items() if name.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        own |= merged[key] if isinstance(merged.get(key), dict) else {}
    named = {name: _token(value) for name, value in own.items() if name not in NAMED_TOKENS}
    return {name: token for name, token in named.items() if token}


def _extra_tokens(folder: Path, merged: dict[str, Any]) -> Iterator[Any]:
    """Special tokens without names."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = merged.get(key) or []
        if not isinstance(values, list | dict):
            raise CheckpointError(f"{folder}: {key} is {reprlib.repr(values)}; it must be a list.")
        yield from () if isinstance(values, dict) else values


def _added(
    folder: Path, config: dict[str, Any], special: set[str], extra: tuple[AddedToken, ...]
) -> dict[int, AddedToken]:
    """Tokens with ids. Whoever has a name is special, whatever the table says, as in transformers."""
    path = folder / "added_tokens.json"
    unnamed = {token.content for token in extra}
    added = {
        _token_id(i, path): AddedToken(text, special=text in special | unnamed)
        for text, i in read_object(path).items()
    }
    path, table = folder / "tokenizer_config.json", config.get("added_tokens_decoder") or {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is {reprlib.repr(table)}; it must be an object.")
    for key, value in table.items():
        token = _token({"special": False} | value) if isinstance(value, dict) else None
        if token is None:
            raise CheckpointError(f"{path}: added token {key} is {reprlib.repr(value)}; it needs a content.")
        token = replace(token, special=token.special or token.content in special)
        added[_token_id(int(key) if key.isdecimal() and len(key) < 20 else key, path)] = token
    return dict(sorted(added.items()))


def _token_id(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ID:
        raise CheckpointError(f"{path}: {reprlib.repr(value)} is no token id.")
    return value
