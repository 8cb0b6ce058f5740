"""A checkpoint of the Hugging Face hub, downloaded; what went wrong and what may help."""

from __future__ import annotations

import difflib
import os
import pathlib
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

NOT_FOUND = (RepositoryNotFoundError, HFValidationError, OfflineModeIsEnabled, LocalEntryNotFoundError)


def download(
    name: str, revision: str | None, download_dir: str | os.PathLike[str] | None, patterns: list[str]
) -> pathlib.Path:
    """The folder of a hub id, with the files that match `patterns`. Raises CheckpointError."""
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
    meant = [known[other] for other in close if known[other] != name]  # else the revision is what lacks
    return f". Did you mean {' or '.join(map(repr, meant))}?" if meant else ""


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
        at = "" if revision is None else f" at revision {revision!r}"
        return (
            f"no such folder here, not in the local cache{at}, and the hub cannot be reached (offline, or "
            "HF_HUB_OFFLINE is set); go online, or give the path of a downloaded checkpoint folder"
        )
    return f"the download failed: {type(error).__name__}: {error}"
