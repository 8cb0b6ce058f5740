"""W8A8 as LMDeploy's `lite smooth_quant` writes it: INT8 or FP8 with a scale a row."""

from __future__ import annotations

from lmdeploy_jax.converters.formats.parts import Parts
from lmdeploy_jax.converters.formats.scaled import ScaledTensor, open_scaled
from lmdeploy_jax.converters.formats.settings import Settings
from lmdeploy_jax.models.formats import E4M3, E5M2, INT8

ROLES = ("scale",)
DTYPES = ("int8", "fp8", "float8_e4m3fn", "float8_e5m2")


def check(settings: Settings) -> None:
    """Refuses what `open_tensor` cannot read."""
    settings.only("quant_dtype", DTYPES)


def open_tensor(parts: Parts, settings: Settings) -> ScaledTensor:
    """A module's weight; `quant_dtype` is checked against what it is stored as."""
    tensor = open_scaled(parts, "scale")
    told = {"fp8": E4M3, "float8_e4m3fn": E4M3, "float8_e5m2": E5M2, "int8": INT8}[
        settings.only("quant_dtype", DTYPES)
    ]
    element = tensor.scheme.element
    if settings.get("quant_dtype") is not None and element != told:
        raise parts.damaged("weight", f"is {element}, but quant_dtype is {settings.get('quant_dtype')}")
    return open_scaled(parts, "scale", activations=element)
