"""FP8 checkpoints with `quant_method: fp8`: DeepSeek's 128x128 blocks, or a scale a tensor (AutoFP8)."""

from __future__ import annotations

from lmdeploy_jax.converters.formats.parts import Parts
from lmdeploy_jax.converters.formats.scaled import Block, ScaledTensor, open_scaled
from lmdeploy_jax.converters.formats.settings import Settings
from lmdeploy_jax.models.formats import E4M3

ROLES = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
SIZES = "two sizes"


def check(settings: Settings) -> None:
    """Refuses what `open_tensor` cannot read."""
    settings.only("activation_scheme", ("dynamic", "static"))
    settings.only("fmt", ("e4m3", "float8_e4m3fn", "e5m2"), lower=True)
    settings.only("scale_fmt", ("float", "ue8m0"), lower=True)
    _block(settings)


def open_tensor(parts: Parts, settings: Settings) -> ScaledTensor:
    """A module's weight. The scale is multiplied by, whatever it is called."""
    role = parts.first("weight_scale_inv", "weight_scale")
    block = _block(settings) if role == "weight_scale_inv" or settings.get("weight_block_size") else None
    static = settings.get("activation_scheme") == "static" and block is None
    input_role = parts.first("input_scale", "activation_scale") if static else None
    return open_scaled(parts, role, block=block, activations=E4M3, input_role=input_role)


def _block(settings: Settings) -> Block:
    value = settings.get("weight_block_size", default=[128, 128])
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise settings.damaged("weight_block_size", value, SIZES)
    return value[0], value[1]
