"""SmoothQuant (Xiao et al., 2023): outliers of activations go over into weights, so that both take 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from lmdeploy_jax.lite.awq import absmax, fold_all
from lmdeploy_jax.lite.layouts import CompressedLayout, Layout, SmoothQuantLayout
from lmdeploy_jax.lite.rounding import Rounded, round_rows
from lmdeploy_jax.lite.scaling import importance, scales_at
from lmdeploy_jax.lite.weights import LayerWeights, Matrix

ALPHA = 0.5
DTYPES: Mapping[str, str] = {
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}
COMPRESSED: Mapping[str, str] = {"int8": "int", "float8_e4m3fn": "float"}  # what compressed-tensors has


@dataclass(frozen=True)
class SmoothQuant:
    """Weights in `dtype`, a scale a row. `own_layout`: as LMDeploy writes them."""

    dtype: str = "int8"
    own_layout: bool = False

    name = "smooth_quant"
    calibrates = True
    feeds_back = False
    group = None

    @property
    def layout(self) -> Layout:
        return SmoothQuantLayout(self.dtype) if self.own_layout else CompressedLayout(COMPRESSED[self.dtype])

    def prepare(self, weights: LayerWeights) -> None:
        if weights.found:
            fold_all(weights, self._scales)

    def _scales(self, matrices: Sequence[Matrix]) -> Float32[Array, "K"]:
        return scales_at(jnp.float32(ALPHA), absmax(matrices), importance(matrices, None))

    def round(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        return round_rows(matrix.weight, jnp.dtype(self.dtype), self.layout.scale_dtype(plain))

    nearest = round
