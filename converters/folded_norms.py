"""Norms before products, whose weights and biases go into the products: what is left of them has none.

`(normed * scale + shift) @ W^T + b` is `normed @ (W * scale)^T + (b + W @ shift)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from lmdeploy_jax.converters.device import Readable
from lmdeploy_jax.converters.slicing import Index
from lmdeploy_jax.vision.config import TowerConfig

PRODUCTS = {"attention_norm": "attention.qkv", "mlp_norm": "mlp.up"}  # a layer's norms: what reads them
WIDE = np.dtype(np.float32)


@dataclass(frozen=True)
class NormedWeight:
    """A weight whose columns are multiplied by a norm's weight, in float32."""

    weight: Readable
    scale: Readable

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The slice `index`, as `dtype`."""
        columns = self.scale.read(index[len(self.shape) - 1 :], WIDE)
        return (self.weight.read(index, WIDE) * columns).astype(dtype)


@dataclass(frozen=True)
class NormedBias:
    """A bias, and what the weight makes of a norm's bias."""

    bias: Readable
    weight: Readable
    shift: Readable

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bias.shape

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The slice `index`, as `dtype`."""
        shifted = self.weight.read(index, WIDE) @ self.shift.read((), WIDE)
        return (self.bias.read(index, WIDE) + shifted).astype(dtype)


@dataclass(frozen=True)
class ColumnSums:
    """Of each output's weights as they are held, in `dtype`."""

    weight: Readable
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (prod(self.weight.shape[:-1]),)

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The slice `index`, as `dtype`."""
        held = self.weight.read((), self.dtype).astype(WIDE)
        return held.sum(axis=-1).reshape(-1)[index or ...].astype(dtype)


def norm_shapes(config: TowerConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a checkpoint's norms that a fused tower has no place for."""
    kinds = ("weight", "bias") if config.norm == "layer" else ("weight",)
    layers = range(config.layers if config.fused else 0)
    names = (f"tower.layers.{layer}.{norm}.{kind}" for layer in layers for norm in PRODUCTS for kind in kinds)
    return dict.fromkeys(names, (config.width,))


def norms_folded(leaves: Mapping[str, Readable], config: TowerConfig, dtype: np.dtype) -> dict[str, Readable]:
    """The tower's weights, held in `dtype`; those of products behind norms with these."""
    norms = norm_shapes(config)
    found = {name: leaf for name, leaf in leaves.items() if name not in norms}
    for name in norms:
        place, _, kind = name.rpartition(".")
        layer, _, norm = place.rpartition(".")
        product = f"{layer}.{PRODUCTS[norm]}"
        if kind == "weight":
            weight = NormedWeight(leaves[f"{product}.weight"], leaves[name])
            found[f"{product}.weight"] = weight
            if config.norm == "layer":
                found[f"{product}.column_sums"] = ColumnSums(weight, dtype)
        else:
            bias, weight_alone = leaves[f"{product}.bias"], leaves[f"{product}.weight"]
            found[f"{product}.bias"] = NormedBias(bias, weight_alone, leaves[name])
    return found
