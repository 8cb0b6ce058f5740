"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import difflib
import os
import pathlib
import re
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lmdeploy_jax import assets
from lmdeploy_jax.errors import CheckpointError

# Weights as safetensors and data only: never a pickle, never code.
PATTERNS = ("*.json", "*.model", "*.jinja", "*.txt")
WEIGHTS = ("*.safetensors",)
NOT_FOUND = (RepositoryNotFoundError, HFValidationError, OfflineModeIsEnabled, LocalEntryNotFoundError)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    weights: bool = True,
) -> pathlib.Path:
    """The folder of an embedded model, of a local folder, or of a hub id, in this order.

    A hub id is downloaded into `download_dir` (default: the cache of huggingface_hub) at `revision` (default:
    the main branch), without its weights where they are not asked for. Raises CheckpointError where there is
    no such folder or the download fails.
    """
    name = os.fspath(model)
    folder = pathlib.Path(name).expanduser()
    embedded = assets.resolve(name)
    if embedded is not None:
        return embedded
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{name}: a file; give the folder that holds config.json and *.safetensors")
    if isinstance(model, pathlib.Path) or not _is_hub_id(name):
        raise CheckpointError(
            f"model {name!r}: no such folder, and not a hub id; give a checkpoint folder, an id such as "
            "'Qwen/Qwen3-0.6B', or 'tiny-chat'"
        )
    patterns = [*PATTERNS, *WEIGHTS] if weights else [*PATTERNS]
    return _download(name, revision, download_dir, patterns)


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.startswith((".", "-"))


def _download(
    name: str, revision: str | None, download_dir: str | os.PathLike[str] | None, patterns: list[str]
) -> pathlib.Path:
    cache = None if download_dir is None else os.fspath(download_dir)
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=patterns
        )
    except Exception as error:
        hint = _like(name, cache) if isinstance(error, NOT_FOUND) else ""
        raise CheckpointError(f"model {name!r}: {_reason(error, revision)}{hint}") from error
    return pathlib.Path(folder)


def _like(name: str, cache: str | None) -> str:
    """What a mistyped name may have meant: an embedded model, or one of the local cache."""
    known = {other.lower(): other for other in (*_cached(cache), *assets.names())}
    close = difflib.get_close_matches(name.lower(), known, cutoff=0.7)
    return f". Did you mean {' or '.join(repr(known[other]) for other in close)}?" if close else ""


def _cached(cache: str | None) -> Iterator[str]:
    folder = pathlib.Path(cache or huggingface_hub.constants.HF_HUB_CACHE)
    for entry in sorted(folder.glob("models--*")):
        yield entry.name.removeprefix("models--").replace("--", "/")


def _reason(error: Exception, revision: str | None) -> str:
    """What happened and what to do about it."""
    if isinstance(error, GatedRepoError):
        return "the repository is gated; accept its terms on the hub and log in with 'hf auth login'"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; check the branch, tag or commit"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return "no such folder here, and no such repository on the hub; check the name, or log in to see it"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return (
            "no such folder here, not in the local cache, and the hub cannot be reached (offline, or "
            "HF_HUB_OFFLINE is set); go online, or give the path of a downloaded checkpoint folder"
        )
    return f"the download failed: {type(error).__name__}: {error}"
