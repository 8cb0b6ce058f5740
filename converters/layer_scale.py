"""What attention and MLP add times a learned factor a channel: the factor goes into the last product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lmdeploy_jax.converters.keytable import Leaf
from lmdeploy_jax.converters.slicing import Index
from lmdeploy_jax.vision.config import TowerConfig

PRODUCTS = {"attention_scale": "attention.out", "mlp_scale": "mlp.down"}  # a layer's scales: what they scale


@dataclass(frozen=True)
class ScaledLeaf:
    """A weight whose rows are multiplied by a vector's elements, in float32."""

    leaf: Leaf
    scale: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The slice `index`, as `dtype`."""
        rows = self.scale.read(index[:1], np.dtype(np.float32))
        values = self.leaf.read(index, np.dtype(np.float32))
        return (values * rows.reshape(-1, *(1,) * (values.ndim - 1))).astype(dtype)


def scale_shapes(config: TowerConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a checkpoint's scales, which the tower has no place for."""
    layers = range(config.layers if config.layer_scale else 0)
    return {f"tower.layers.{layer}.{scale}": (config.width,) for layer in layers for scale in PRODUCTS}


def folded(leaves: Mapping[str, Leaf], scales: Mapping[str, tuple[int, ...]]) -> dict[str, Leaf | ScaledLeaf]:
    """The tower's weights, those of scaled products with their scales."""
    found: dict[str, Leaf | ScaledLeaf] = {name: leaf for name, leaf in leaves.items() if name not in scales}
    for name in scales:
        layer, _, scale = name.rpartition(".")
        for kind in ("weight", "bias"):
            target = f"{layer}.{PRODUCTS[scale]}.{kind}"
            if target in leaves:
                found[target] = ScaledLeaf(leaves[target], leaves[name])
    return found
