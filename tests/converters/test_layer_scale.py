"""Layer scales are multiplied into the products that they scale, whatever slice is read, and rounded once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lmdeploy_jax.converters.keytable import Rule, bind
from lmdeploy_jax.converters.layer_scale import folded
from lmdeploy_jax.converters.layouts import Rows
from lmdeploy_jax.converters.safetensors import CheckpointReader

LAYER = "tower.layers.3."
SHAPES = {LAYER + "attention.out.weight": (6, 2, 4), LAYER + "attention.out.bias": (6,), "tower.other": (6,)}
SCALES = {LAYER + "attention_scale": (6,)}
RULES = (
    Rule(r"(\d)\.proj\.(weight)", r"tower.layers.\1.attention.out.\2", layout=Rows(flat_columns=True)),
    Rule(r"(\d)\.proj\.(bias)", r"tower.layers.\1.attention.out.\2"),
    Rule(r"(\d)\.ls1", r"tower.layers.\1.attention_scale"),
    Rule("other", "tower.other"),
)


def test_a_scale_is_folded_into_its_product(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"3.proj.weight": (6, 8), "3.proj.bias": (6,), "3.ls1": (6,), "other": (6,)}
    stored = {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(stored, tmp_path / "model.safetensors")
    wide = {name: value.astype(np.float32) for name, value in stored.items()}
    want = (wide["3.proj.weight"] * wide["3.ls1"][:, None]).reshape(6, 2, 4)
    with CheckpointReader(tmp_path) as reader:
        leaves = folded(bind(RULES, reader, SHAPES | SCALES), SCALES)
        assert leaves.keys() == SHAPES.keys()
        for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
            read = {name: leaf.read((), dtype) for name, leaf in leaves.items()}
            np.testing.assert_array_equal(read[LAYER + "attention.out.weight"], want.astype(dtype))
            bias = (wide["3.proj.bias"] * wide["3.ls1"]).astype(dtype)
            np.testing.assert_array_equal(read[LAYER + "attention.out.bias"], bias)
            np.testing.assert_array_equal(read["tower.other"], stored["other"].astype(dtype))
        part = leaves[LAYER + "attention.out.weight"].read((slice(1, 4), slice(1, 2)), np.dtype(np.float32))
        np.testing.assert_array_equal(part, want[1:4, 1:2])
