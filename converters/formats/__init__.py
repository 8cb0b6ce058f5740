"""Formats of quantised checkpoints: which one a checkpoint is in, and its weights, readable by slice.

A format is a file: ROLES, the last parts of its tensors' names; `check`, which refuses settings that it
cannot read; `open_tensor`, which checks a module's tensors and gives its weight. Which modules are quantised
is told by the tensors that are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmdeploy_jax.converters.formats import awq, compressed, fp8, gptq, modelopt, mxfp4, smooth_quant
from lmdeploy_jax.converters.formats.parts import Parts
from lmdeploy_jax.converters.formats.settings import Settings, find_settings
from lmdeploy_jax.converters.formats.tensor import QuantTensor
from lmdeploy_jax.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class Format:
    """How one format is read. joint: what stands between a module's name and a role."""

    roles: tuple[str, ...]
    check: Callable[[Settings], None]
    open_tensor: Callable[[Parts, Settings], QuantTensor]
    joint: str = "."


FORMATS: Mapping[str, Format] = {
    "awq": Format(awq.ROLES, awq.check, awq.open_tensor),
    "gptq": Format(gptq.ROLES, gptq.check, gptq.open_tensor),
    "compressed-tensors": Format(compressed.ROLES, compressed.check, compressed.open_tensor),
    "fp8": Format(fp8.ROLES, fp8.check, fp8.open_tensor),
    "smooth_quant": Format(smooth_quant.ROLES, smooth_quant.check, smooth_quant.open_tensor),
    "mxfp4": Format(mxfp4.ROLES, mxfp4.check, mxfp4.open_tensor, joint="_"),
    "modelopt": Format(modelopt.ROLES, modelopt.check, modelopt.open_tensor),
}
"""By `quant_method` of a config, which is LMDeploy's `model_format` too."""

ALIASES = {"modelopt_fp4": "modelopt", "modelopt_fp8": "modelopt", "compressed_tensors": "compressed-tensors"}
ON_LOAD = "fp8"  # what `model_format` makes of a checkpoint that is not quantised
PLAIN = (None, "hf")  # values of `model_format` that ask for nothing
ELSEWHERE = "give the model's 16-bit checkpoint, or one in AWQ, GPTQ, compressed-tensors or FP8"


@dataclass(frozen=True)
class Quantisation:
    """The format of a checkpoint and what its config says of it."""

    format: Format
    settings: Settings
    on_load: bool = False
    """Whether the weights are to be quantised as they are read, if none of them is."""

    @property
    def rounds_head(self) -> bool:
        """Whether a plain output head is, whatever the others are."""
        return self.settings.flag("lm_head_quantized", default=False)


def recognise(
    raw: Mapping[str, Any],
    where: str,
    folder: str | os.PathLike[str] | None = None,
    model_format: str | None = None,
) -> Quantisation | None:
    """The format that a config, a file beside it, or `model_format` tells; None: the weights are plain.

    `model_format` "fp8" quantises the weights of a plain checkpoint.
    Raises ConfigError where `model_format` is unknown or another than the checkpoint's, UnsupportedModelError
    for a format that cannot be read, CheckpointError for settings that mean nothing.
    """
    settings = find_settings(raw, where, folder)
    asked = None if model_format in PLAIN else ALIASES.get(model_format or "", model_format)
    if asked is not None and asked not in FORMATS:
        raise ConfigError(f"model_format={model_format!r} is unknown; choose hf, {', '.join(FORMATS)}")
    if settings is None:
        if asked is None:
            return None
        return Quantisation(
            FORMATS[asked], Settings(asked, {}, f"model_format={model_format!r}"), on_load=asked == ON_LOAD
        )
    method = ALIASES.get(settings.method, settings.method)
    if asked is not None and asked != method:
        raise ConfigError(
            f"model_format={model_format!r}, but {settings.where} says {settings.method}; "
            "leave model_format out"
        )
    if method not in FORMATS:
        raise UnsupportedModelError(
            f"{settings.where}: checkpoints quantised with {settings.method} cannot be loaded; {ELSEWHERE}"
        )
    FORMATS[method].check(settings)
    return Quantisation(FORMATS[method], settings, on_load=asked == ON_LOAD)
