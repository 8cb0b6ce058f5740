"""Scales that are folded into a layer change nothing of what it computes, in any family."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.lite.layer import LayerModel, Windows
from lmdeploy_jax.lite.scaling import scalings
from lmdeploy_jax.lite.source import open_source
from lmdeploy_jax.lite.weights import LayerWeights
from lmdeploy_jax.models.kernels import Kernels
from tests.oracle import CONFIGS, save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

USUAL = ("llama_mha", "mixtral")  # values of their own for each head, and experts
OTHERS = sorted(CONFIGS.keys() - set(USUAL))
FLOAT = jnp.dtype("float32")


@pytest.mark.parametrize("name", [*USUAL, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_what_is_folded_changes_nothing(name: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    source, windows = open_source(tmp_path), Windows(2, 24)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(windows.tokens, source.config.hidden_size)), FLOAT)
    seen = set()
    for layer, leaves in zip(source.config.layers, source.layers, strict=True):
        model = LayerModel(source.config, layer, FLOAT, Kernels())
        if layer in seen or not _runs(model):
            continue
        seen.add(layer)
        weights = LayerWeights(model, leaves)
        before, found = model.run(weights.arrays, x, windows)
        assert found.keys() == set(model.observed)
        weights.found = found
        for scaling in scalings(source.config, layer):
            sizes = [matrix.weight.shape[1] for matrix in weights.matrices(scaling.readers[0])]
            shape = (len(sizes), sizes[0]) if scaling.by_expert else sizes[0]
            scaling.fold(weights, jnp.asarray(np.exp(rng.normal(size=shape)), FLOAT))
        after, other = model.run({leaf: weights.wide(leaf) for leaf in weights.arrays}, x, windows)
        assert _error(after, before) < 3e-4
        for module in found:  # and calibration's statistics, scaled, are those of the scaled layer
            for matrix in weights.matrices(module):
                if matrix.inputs is not None:
                    assert _error(matrix.inputs.gram, other[module].of_expert(matrix.expert).gram) < 1e-2


def _runs(model: LayerModel) -> bool:
    try:
        model.check_runs("it")
    except Exception:
        return False
    return True


def _error(one: jax.Array, other: jax.Array) -> float:
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
