"""load_model: what it accepts besides a plain checkpoint, what it refuses before it allocates anything."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lmdeploy_jax.converters.load
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.load import load_model, pick_dtype
from lmdeploy_jax.errors import CheckpointError, ConfigError, UnsupportedModelError
from lmdeploy_jax.text.settings import read_object
from tests.models.paged import named_leaves
from tests.oracle import save_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


def change(folder, **tensors):
    """Replaces tensors of a checkpoint; None removes one."""
    kept = load_file(folder / "model.safetensors") | tensors
    save_file(
        {name: value for name, value in kept.items() if value is not None}, folder / "model.safetensors"
    )


def test_leaves_are_named_fused_and_in_order(llama):
    model = load_model(llama)
    leaves, tensors = named_leaves(model), load_file(llama / "model.safetensors")
    qkv = np.asarray(leaves["layers.1.attention.qkv.weight"])
    assert qkv.shape == (2, 4, 16, 64)
    np.testing.assert_array_equal(
        qkv[1, 1], tensors["model.layers.1.self_attn.q_proj.weight"].reshape(4, 16, 64)[3]
    )
    np.testing.assert_array_equal(
        qkv[1, 3], tensors["model.layers.1.self_attn.v_proj.weight"].reshape(2, 16, 64)[1]
    )
    up = np.asarray(leaves["layers.0.mlp.gate_up.weight"])[1]
    np.testing.assert_array_equal(up, tensors["model.layers.0.mlp.up_proj.weight"])
    merged = model.merge(model.leaves)
    assert merged.layers[1].attention.qkv.weight[...] is leaves["layers.1.attention.qkv.weight"]


def test_progress_ends_at_the_total(llama):
    calls = []
    model = load_model(llama, on_progress=lambda done, total: calls.append((done, total)))
    total = sum(leaf.nbytes for leaf in model.leaves)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_cast(llama, dtype):
    leaves = named_leaves(load_model(llama, dtype=dtype))
    assert {str(leaf.dtype) for leaf in leaves.values()} == {dtype}
    stored = load_file(llama / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(leaves["norm.weight"], stored.astype(leaves["norm.weight"].dtype))


def test_auto_dtype_depends_on_the_device_and_the_checkpoint():
    picks = {
        (stored, platform): str(pick_dtype("auto", np.dtype(stored), platform))
        for stored in ("float32", "float16", "bfloat16")
        for platform in ("cpu", "gpu")
    }
    assert {picks[stored, "cpu"] for stored in ("float32", "float16", "bfloat16")} == {"float32"}
    assert [picks[stored, "gpu"] for stored in ("float32", "float16", "bfloat16")] == [
        "bfloat16",
        "float16",
        "bfloat16",
    ]
    with pytest.raises(ConfigError, match="dtype='int3' is unknown"):
        pick_dtype("int3", np.dtype("float32"), "cpu")


def test_overrides_are_laid_over_nested_objects(llama):
    config = read_config(llama, {"max_position_embeddings": 99, "rope_parameters": {"rope_theta": 5.0}})
    assert (config.max_position, config.ropes[0].theta, config.ropes[0].kind) == (99, 5.0, "default")
    assert load_model(llama, hf_overrides={"rms_norm_eps": 0.5}).config.norm_eps == 0.5


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
@pytest.mark.parametrize("held", ["rope_scaling", "rope_parameters"])
def test_rope_is_overridden_by_either_name(copy, name, kind, held):
    """What the override does not say stays as it was, whatever the names in the file."""
    config = json.loads((copy / "config.json").read_text())
    settings = config.pop("rope_parameters") | {"rope_theta": 5000.0}
    (copy / "config.json").write_text(json.dumps(config | {held: settings}))
    rope = read_config(copy, {name: {kind: "linear", "factor": 2}}).ropes[0]
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 2.0, 5000.0)


V_PROJ = "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({V_PROJ: None}, f"missing tensor {V_PROJ}"),
        (
            {V_PROJ: np.zeros((16, 64), np.float32)},
            f"{V_PROJ}: shape [16, 64], config.json asks for [32, 64]",
        ),
        ({"model.layers.1.self_attn.q_proj.bias": np.zeros(64, np.float32)}, "q_proj.bias"),
        (
            {"model.layers.1.mlp.down.weight": np.zeros((64, 96), np.float32)},
            "unknown tensor model.layers.1.mlp",
        ),
        ({V_PROJ: np.zeros((32, 64), np.int8)}, f"{V_PROJ}: stored as int8, which cannot be read as float32"),
        ({"model.rotor.weight": np.zeros(1, np.float32)}, "unknown tensor model.rotor.weight"),
        ({"lm_head.weight": None}, "missing tensor lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_allocated(copy, monkeypatch, tensors, message):
    change(copy, **tensors)
    monkeypatch.setattr(lmdeploy_jax.converters.load, "load_leaves", lambda *_: pytest.fail("allocated"))
    with pytest.raises(CheckpointError) as caught:
        load_model(copy)
    assert message in str(caught.value)


def test_a_folder_without_a_readable_config_is_named(copy):
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: is a JSON list, not an object"):
        load_model(copy)
    for text in ("{", '{"a": ' + "[" * 5000, "1" * 5000):
        (copy / "config.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"(?s)config.json: cannot be read.*download the file again"
        ):
            load_model(copy)
        with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
            read_object(copy / "config.json")
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: not found"):
        load_model(copy)


def test_an_unsupported_config_is_refused_before_the_weights_are_opened(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    (copy / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="quantised with hqq cannot be loaded; give the model"):
        load_model(copy)


def test_old_rotary_buffers_are_left_unread(copy):
    plain = load_model(copy).leaves
    change(copy, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, load_model(copy).leaves))
