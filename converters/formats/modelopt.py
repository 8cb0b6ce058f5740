"""NVIDIA's Model Optimizer: FP8 by tensor, channel or block, and NVFP4."""

from __future__ import annotations

import numpy as np

from lmdeploy_jax.converters.formats.fp4 import Fp4Tensor, open_nvfp4
from lmdeploy_jax.converters.formats.parts import Parts
from lmdeploy_jax.converters.formats.scaled import ScaledTensor, open_scaled
from lmdeploy_jax.converters.formats.settings import Settings
from lmdeploy_jax.models.formats import E4M3

ROLES = ("weight_scale", "weight_scale_2", "input_scale")
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
BLOCK = (128, 128)


def check(settings: Settings) -> None:
    """Refuses what `open_tensor` cannot read."""
    settings.only("quant_algo", ALGORITHMS)


def open_tensor(parts: Parts, settings: Settings) -> ScaledTensor | Fp4Tensor:
    """A module's weight. NVFP4 is two elements a byte; its second scale multiplies the first."""
    if parts.info("weight").dtype == np.uint8:
        return open_nvfp4(parts, "weight", "weight_scale", "weight_scale_2", divides=False)
    weight_only = settings.get("quant_algo") == "FP8_PB_WO"
    activations = None if weight_only else E4M3
    block = BLOCK if weight_only else None
    input_role = "input_scale" if "input_scale" in parts and not weight_only else None
    return open_scaled(parts, "weight_scale", block=block, activations=activations, input_role=input_role)
