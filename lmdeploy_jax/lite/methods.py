"""What is done to a layer's weights before they are rounded, and how they are: one class a command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.lite.layouts import CompressedLayout, Layout
from lmdeploy_jax.lite.rounding import Rounded, round_rows
from lmdeploy_jax.lite.weights import LayerWeights, Matrix


class Method(Protocol):
    """A way of quantising a layer. Its fields are the options of its command."""

    @property
    def name(self) -> str:
        """Of its command."""

    @property
    def layout(self) -> Layout:
        """How its weights are stored."""

    @property
    def calibrates(self) -> bool:
        """Whether it asks what the linear layers are given."""

    @property
    def feeds_back(self) -> bool:
        """Whether a layer is given what the rounded one before it makes, not the original."""

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None: all of a row."""

    def prepare(self, weights: LayerWeights) -> None:
        """Scales channels, which changes nothing of what the layer computes."""

    def round(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        """A matrix that a checkpoint has in the dtype `plain`."""

    def nearest(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        """The same without calibration: what its error is compared with."""


@dataclass(frozen=True)
class Fp8:
    """Each row by its largest weight."""

    name = "fp8"
    calibrates = False
    feeds_back = False
    group = None

    @property
    def layout(self) -> CompressedLayout:
        return CompressedLayout("float")

    def prepare(self, weights: LayerWeights) -> None:
        pass

    def round(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        return round_rows(matrix.weight, jnp.dtype("float8_e4m3fn"), self.layout.scale_dtype(plain))

    nearest = round


def options(method: Method) -> dict[str, Any]:
    """A method's options as JSON has them."""
    return {"method": method.name, **asdict(method)}  # type: ignore[call-overload]
