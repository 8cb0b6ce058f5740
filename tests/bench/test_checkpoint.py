"""Random checkpoints: transformers loads them, and their values do not depend on how they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lmdeploy_jax.bench import checkpoint, shapes
from lmdeploy_jax.bench.quantised import FORMATS, find
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.quantised import QuantWeight

MIXTURES = ("tiny-deepseek-v2", "tiny-gpt-oss")


def values(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe", *MIXTURES])
def test_transformers_loads_every_tensor(name: str, tmp_path: Path) -> None:
    folder = checkpoint.make(name, tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(model(torch.tensor([[300, 301]])).logits.float()).all()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Grüße").input_ids) == "Grüße"


def test_distribution_and_shards(tmp_path: Path) -> None:
    whole = values(checkpoint.make("tiny-llama", tmp_path / "whole"))
    folder = checkpoint.make("tiny-llama", tmp_path / "cut", shard_bytes=1 << 20)
    cut = values(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    embedding = whole["model.embed_tokens.weight"].float()
    assert abs(float(embedding.std()) - 0.02) < 1e-4
    assert abs(float(embedding.mean())) < 1e-4
    assert torch.equal(whole["model.norm.weight"], torch.ones(256, dtype=torch.bfloat16))


def test_values_are_rounded_as_bfloat16_is() -> None:
    """Ties included: half of these end with the bits of one."""
    drawn = np.random.default_rng(0).standard_normal(4096, np.float32)
    drawn[::2] = (drawn[::2].view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
    rounded = shapes._bfloat16(drawn)
    np.testing.assert_array_equal(rounded, drawn.astype(shapes.NORMAL.DTYPES["BF16"]))


def test_an_existing_checkpoint_is_kept_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    folder = checkpoint.make("tiny-qwen2", tmp_path)
    before = (folder / "config.json").stat().st_mtime_ns
    assert checkpoint.make("tiny-qwen2", tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-qwen2"]


@pytest.mark.parametrize(
    ("model_format", "block_scales"), [*((name, False) for name in FORMATS if name != "mxfp4"), ("fp8", True)]
)
def test_quantised_ones_are_held_as_the_kernels_read_them(
    model_format: str, block_scales: bool, tmp_path: Path
) -> None:
    options = {"model_format": model_format, "block_scales": block_scales}
    folder = checkpoint.make("tiny-llama", tmp_path, **options)
    assert folder.name == f"tiny-llama-{model_format}{'-blocks' * block_scales}"
    model = load_model(folder, dtype="bfloat16", dequantise=False)
    form, linears = find(**options), [layer.mlp.down for layer in model.merge(model.leaves).layers]
    for linear in linears:
        weight = linear.weight
        assert isinstance(weight, QuantWeight)
        assert (weight.format, weight.shape) == (form.held(512).name, (256, 512))
        assert weight.operand(-1) is not None
        assert 0.017 < float(weight.dense().astype("float32").std()) < 0.023


def test_experts_in_mxfp4_stay_so(tmp_path: Path) -> None:
    folder = checkpoint.make("tiny-gpt-oss", tmp_path, model_format="mxfp4")
    model = load_model(folder, dtype="bfloat16", dequantise=False)
    for layer in model.merge(model.leaves).layers:
        experts = layer.mlp.experts
        for weight, columns in ((experts.gate_up.weight, 256), (experts.down.weight, 128)):
            assert isinstance(weight, QuantWeight)
            assert weight.format == find("mxfp4").held(columns).name
            assert 0.014 < float(weight.dense().astype("float32").std()) < 0.026


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_format": "modelopt"}, "choose one of fp8, awq"),
        ({"model_format": "mxfp4"}, "no weights that mxfp4 quantises"),
        ({"model_format": "awq", "block_scales": True}, "fp8"),
    ],
)
def test_formats_that_cannot_be_made_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpoint.make("tiny-llama", tmp_path, **options)


def test_unknown_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llama3-8b"):
        checkpoint.make("llama9", tmp_path)


# transformers has no model of the layout in which InternVL is published: its own is named otherwise.
@pytest.mark.parametrize("name", [name for name in shapes.names() if "internvl" not in name])
def test_shapes_count_what_transformers_counts(name: str, tmp_path: Path) -> None:
    config = shapes.read(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = sum(int(np.prod(tensor.shape)) for tensor in shapes.tensors(config))
    assert ours == sum(parameter.numel() for parameter in model.parameters())
    assert len(read_config(tmp_path).layers) == config["num_hidden_layers"]


def test_weights_that_are_not_written_are_made_as_they_are_loaded(tmp_path: Path) -> None:
    """In the model's dtype, none of them zero; no file holds them."""
    folder = checkpoint.make_unwritten("tiny-llama", tmp_path)
    assert not list(folder.glob("*.safetensors*"))
    leaves = load_model(folder, dtype="bfloat16").leaves
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    assert all(np.asarray(leaf, np.float32).std() > 0.01 for leaf in leaves)


@pytest.mark.parametrize("form", ["fp8", *[pytest.param(f, marks=pytest.mark.full) for f in ("awq", "gptq")]])
def test_they_are_made_in_the_form_that_a_file_would_have(form: str, tmp_path: Path) -> None:
    """The same leaves, and numbers as large as those of plain weights."""
    written = checkpoint.make("tiny-llama", tmp_path, model_format=form)
    made = checkpoint.make_unwritten("tiny-llama", tmp_path, model_format=form)
    ours, theirs = (load_model(f, dtype="bfloat16", dequantise=False) for f in (made, written))
    assert ours.skeleton.formats == theirs.skeleton.formats
    assert {k: (s.shape, s.dtype) for k, s in ours.skeleton.specs.items()} == {
        k: (s.shape, s.dtype) for k, s in theirs.skeleton.specs.items()
    }
    down = ours.merge(ours.leaves).layers[0].mlp.down.weight.dense()
    assert 0.005 < np.asarray(down, np.float32).std() < 0.03


def test_random_experts_are_not_quantised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tiny-qwen3-moe: --random quantises dense models alone"):
        checkpoint.make_unwritten("tiny-qwen3-moe", tmp_path, model_format="fp8")
