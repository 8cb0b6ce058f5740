"""What a checkpoint's files say of its images. Works without JAX: nothing is loaded yet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy_jax.converters.config import read_json
from lmdeploy_jax.converters.fields import Fields, shown
from lmdeploy_jax.converters.text_part import TEXT_PARTS
from lmdeploy_jax.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from lmdeploy_jax.vision.config import VisionModelConfig
    from lmdeploy_jax.vision.families import VisionFamily

# The image processor's settings, and the name under which a file of several processors holds them.
PROCESSOR_FILES = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))
VIDEO_FILES = (("video_preprocessor_config.json", None), ("processor_config.json", "video_processor"))


def read_vision(
    folder: str | os.PathLike[str], hf_overrides: Mapping[str, Any] | None = None
) -> tuple[VisionFamily, VisionModelConfig]:
    """What a checkpoint's images are to become, its config under `hf_overrides`. Raises UnsupportedModelError
    where it takes none.
    """
    from lmdeploy_jax.vision.families import VISION_FAMILIES, vision_family

    raw, where = read_json(folder, hf_overrides)
    family = vision_family(raw)
    if family is None:
        known = ", ".join(VISION_FAMILIES)
        raise UnsupportedModelError(
            f"{where}: architectures {shown(raw.get('architectures'))} take no images here; "
            f"those that do: {known}"
        )
    config = family.config(Fields(raw, where), _processor_fields(Path(folder), PROCESSOR_FILES))
    if family.video is None:
        return family, config
    video = family.video.rule(Fields(raw, where), _processor_fields(Path(folder), VIDEO_FILES))
    return family, replace(config, video=video)


def _processor_fields(folder: Path, files: Sequence[tuple[str, str | None]]) -> Fields:
    """A processor's file; empty where there is none, so that the family's own values hold."""
    for name, within in files:
        path = folder / name
        if path.is_file():
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
            found = raw.get(within) if within and isinstance(raw, dict) else raw
            if isinstance(found, dict):
                return Fields(found, str(path))
    return Fields({}, str(folder / files[0][0]))


def servable_vision(
    folder: str | os.PathLike[str], hf_overrides: Mapping[str, Any] | None = None
) -> tuple[VisionFamily, VisionModelConfig] | None:
    """What the engine makes of images; None for models that it serves as text models.

    It gives tokens the places that they have in the prompt. Converted checkpoints hold the language model
    alone, and of some families no more than that is read.
    """
    raw, _ = read_json(folder, hf_overrides)
    named = raw.get("architectures")
    within_others = isinstance(named, list) and any(name in TEXT_PARTS for name in named)
    if not within_others or not any(Path(folder).glob("*.safetensors")):
        return None
    from lmdeploy_jax.vision.families import vision_family

    if vision_family(raw) is None:
        return None
    return read_vision(folder, hf_overrides)
