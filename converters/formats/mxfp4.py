"""MXFP4 as gpt-oss has its experts: `X_blocks` and `X_scales` make the weight `X`."""

from __future__ import annotations

from lmdeploy_jax.converters.formats.fp4 import Fp4Tensor, open_mxfp4
from lmdeploy_jax.converters.formats.parts import Parts
from lmdeploy_jax.converters.formats.settings import Settings

ROLES = ("blocks", "scales")


def check(settings: Settings) -> None:
    """Nothing of the config changes how tensors are read."""


def open_tensor(parts: Parts, settings: Settings) -> Fp4Tensor:
    """A stack of weights, whose leading axes are rows."""
    return open_mxfp4(parts, "blocks", "scales")
