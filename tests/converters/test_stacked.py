"""Experts in one tensor for all of a layer's are read as the single ones are."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.converters.stacked import StackedExperts, StackedReader
from tests.models.paged import named_leaves
from tests.oracle import save_checkpoint

EXPERTS, INNER, HIDDEN = 3, 4, 6


def test_a_checkpoint_of_stacked_experts_loads_alike(tmp_path):
    single = save_checkpoint("qwen3_moe", tmp_path / "single")
    tensors = load_file(single / "model.safetensors")
    stacked = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([tensors[f"{prefix}.{i}.{part}_proj.weight"] for i in range(8)])
            for part in ("gate", "up", "down")
        )
        stacked |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}
    (tmp_path / "stacked").mkdir()
    shutil.copy(single / "config.json", tmp_path / "stacked")
    save_file(stacked, tmp_path / "stacked" / "model.safetensors")
    ours, theirs = (named_leaves(load_model(tmp_path / name)) for name in ("stacked", "single"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_every_order_is_read_by_slice(tmp_path, interleaved, transposed, told):
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, EXPERTS, INNER, HIDDEN)).astype(np.float32)
    down = rng.normal(size=(EXPERTS, HIDDEN, INNER)).astype(np.float32)
    bias = rng.normal(size=(EXPERTS, 2 * INNER)).astype(np.float32)
    both = np.stack([gate, up], 2).reshape(EXPERTS, -1, HIDDEN)
    both = both if interleaved else np.concatenate([gate, up], axis=1)
    held = [both.swapaxes(1, 2), down.swapaxes(1, 2)] if transposed else [both, down]
    names = ("l.experts.gate_up_proj", "l.experts.down_proj")
    tensors = dict(zip(names, map(np.ascontiguousarray, held), strict=True))
    save_file(tensors | {"l.experts.gate_up_proj_bias": bias, "l.norm": bias}, tmp_path / "model.safetensors")
    layout = StackedExperts(interleaved=interleaved, transposed=transposed if told else None)
    with CheckpointReader(tmp_path) as files:
        reader = StackedReader(files, layout)
        assert "l.norm" in reader.names()
        assert not [name for name in reader.names() if "gate_up" in name]
        rows, columns = slice(1, 3), slice(2, 5)
        for i in range(EXPERTS):
            for part, weight in (("gate", gate), ("up", up)):
                found = reader.read(f"l.experts.{i}.{part}_proj.weight", (rows, columns))
                np.testing.assert_array_equal(found, weight[i][rows, columns])
                np.testing.assert_array_equal(reader.read(f"l.experts.{i}.{part}_proj.weight"), weight[i])
            np.testing.assert_array_equal(reader.read(f"l.experts.{i}.down_proj.weight"), down[i])
            up_bias = bias[i, 1::2] if interleaved else bias[i, INNER:]
            np.testing.assert_array_equal(reader.read(f"l.experts.{i}.up_proj.bias"), up_bias)


def test_experts_without_a_byte_are_not_counted(tmp_path):
    name, file = "l.experts.gate_up_proj", tmp_path / "model.safetensors"
    save_file({name: np.zeros((1 << 40, 0, 4), np.float32)}, file)
    with CheckpointReader(tmp_path) as reader:
        assert StackedReader(reader, StackedExperts()).names() == (name,)
