"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import os
import pathlib
import re

from lmdeploy_jax import assets
from lmdeploy_jax.errors import CheckpointError

# Weights as safetensors and data only: never a pickle, never code.
PATTERNS = ("*.json", "*.model", "*.jinja", "*.txt")
WEIGHTS = ("*.safetensors",)
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
    from lmdeploy_jax.hub_download import download  # the hub's client takes a while to import

    return download(name, revision, download_dir, patterns)


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.startswith((".", "-"))
