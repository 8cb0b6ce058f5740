"""What is written has the bits that the formats' own tools write."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.lite.layouts import AwqLayout, GptqLayout, Tensors
from lmdeploy_jax.lite.rounding import Grid, round_groups
from tests.converters.formats import packers

GROUP = 32
WEIGHT = np.random.default_rng(0).normal(size=(48, 128)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq(symmetric: bool) -> None:
    rounded = round_groups(jnp.asarray(WEIGHT), Grid(GROUP, symmetric))
    found = AwqLayout(GROUP).tensors(rounded, np.dtype(np.float32))
    expected, stands_for = packers.awq(WEIGHT, GROUP, sym=symmetric)
    _assert_same(
        found, expected | ({"qzeros": np.full_like(found["qzeros"], -0x77777778)} if symmetric else {})
    )
    np.testing.assert_allclose(rounded.dense(), stands_for, rtol=1e-6)


def test_gptq() -> None:
    rounded = round_groups(jnp.asarray(WEIGHT), Grid(GROUP, symmetric=True))
    found = GptqLayout(GROUP).tensors(rounded, np.dtype(np.float32))
    expected, stands_for = packers.gptq(WEIGHT, 4, GROUP, sym=True)
    _assert_same(found, expected)
    np.testing.assert_allclose(rounded.dense(), stands_for, rtol=1e-6)


def test_configs_name_what_is_plain_and_no_neighbour_of_it() -> None:
    (pattern,) = GptqLayout(GROUP).settings(["model.layers.0.mlp.gate", "lm_head"])["dynamic"]
    assert pattern.startswith("-:")
    assert re.match(pattern[2:], "model.layers.0.mlp.gate")
    assert not re.match(pattern[2:], "model.layers.0.mlp.gate_proj")
    assert "dynamic" not in GptqLayout(GROUP).settings(["lm_head"])
    assert AwqLayout(GROUP).settings(["a.gate", "lm_head"])["modules_to_not_convert"] == ["a.gate"]


def _assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for role, array in found.items():
        assert array.dtype == expected[role].dtype, role
        np.testing.assert_array_equal(array, expected[role], role)
