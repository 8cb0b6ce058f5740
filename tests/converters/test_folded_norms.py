"""A norm's weight and bias go into the product behind it, and what is summed of that is what is held."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from lmdeploy_jax.converters.folded_norms import norms_folded
from lmdeploy_jax.vision.config import TowerConfig

LAYER = "tower.layers.0."
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Stored:
    """A leaf of an array."""

    values: np.ndarray

    @property
    def shape(self):
        return self.values.shape

    def read(self, index, dtype):
        return self.values[index].astype(dtype)


def tower(norm):
    return TowerConfig(1, 8, 2, 16, (3, 2, 2), "gelu", norm, 1e-6, fused=True)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_product_takes_its_norm(norm):
    draw = np.random.default_rng(0).standard_normal
    shapes = {"attention.qkv.weight": (3, 2, 4, 8), "attention.qkv.bias": (3, 2, 4), "mlp.up.weight": (16, 8)}
    shapes |= {"mlp.up.bias": (16,), "attention_norm.weight": (8,), "mlp_norm.weight": (8,)}
    if norm == "layer":
        shapes |= {"attention_norm.bias": (8,), "mlp_norm.bias": (8,)}
    stored = {LAYER + name: draw(shape).astype(np.float32) for name, shape in shapes.items()}
    leaves = norms_folded({name: Stored(values) for name, values in stored.items()}, tower(norm), BFLOAT16)
    assert not [name for name in leaves if "norm" in name]
    for before, product in (("attention_norm", "attention.qkv"), ("mlp_norm", "mlp.up")):
        weight, bias = (stored[f"{LAYER}{product}.{kind}"] for kind in ("weight", "bias"))
        scale, shift = stored[f"{LAYER}{before}.weight"], stored.get(f"{LAYER}{before}.bias", np.zeros(8))
        got = leaves[f"{LAYER}{product}.weight"].read((), BFLOAT16)
        np.testing.assert_array_equal(got, (weight * scale).astype(BFLOAT16))
        part = leaves[f"{LAYER}{product}.weight"].read((slice(1, 3),), np.dtype(np.float32))
        np.testing.assert_array_equal(part, (weight * scale)[1:3])
        found = leaves[f"{LAYER}{product}.bias"].read((), np.dtype(np.float32))
        np.testing.assert_allclose(found, bias + weight @ shift, rtol=1e-5, atol=1e-6)
        sums = leaves.get(f"{LAYER}{product}.column_sums")
        assert (sums is not None) == (norm == "layer")
        if sums is not None:
            want = got.astype(np.float32).sum(axis=-1).reshape(-1)
            np.testing.assert_allclose(sums.read((), np.dtype(np.float32)), want, atol=1e-6)
