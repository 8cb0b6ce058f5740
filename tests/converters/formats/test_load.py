"""Quantised checkpoints through `load_model`: the weights are those that the files stand for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy_jax.config import ModelFormat
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.formats import FORMATS
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.converters.formats.packers import CASES, quantise_folder
from tests.models.paged import PagedRunner, named_leaves
from tests.oracle import hf_logits, save_checkpoint

Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folders(llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "quantised", tmp_path / "dense"


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantisation = config.get("quantization_config") or {}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation | fields}))


@pytest.mark.parametrize("kind", CASES)
def test_weights_are_those_that_the_file_stands_for(
    kind: str, llama: Path, folders: tuple[Path, Path]
) -> None:
    quantised, dense = folders
    quantise_folder(llama, quantised, dense, CASES[kind])
    theirs = named_leaves(load_model(dense))
    ours = named_leaves(load_model(quantised))
    assert list(ours) == list(theirs)
    for name, leaf in theirs.items():
        np.testing.assert_allclose(
            ours[name], leaf, rtol=0, atol=CASES[kind].exact * np.abs(leaf).max(), err_msg=name
        )


@pytest.mark.parametrize(
    ("kind", "family"), [("awq", "qwen2"), ("gptq_act_order", "phi3"), ("fp8_block", "qwen3")]
)
def test_logits_are_those_of_the_plain_weights(
    kind: str, family: str, tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    """Biases, tied embeddings, parts that are fused in the file; transformers runs the plain weights."""
    quantised, dense = folders
    quantise_folder(save_checkpoint(family, tmp_path / "plain"), quantised, dense, CASES[kind])
    ids = list(range(3, 40))
    (ours,) = PagedRunner(load_model(quantised)).ragged([(0, 0, ids, len(ids))])
    theirs = hf_logits(dense, ids)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def test_biases_that_are_zero_and_that_the_model_lacks_are_left_out(
    llama: Path, folders: tuple[Path, Path]
) -> None:
    quantised, dense = folders
    quantise_folder(llama, quantised, dense, CASES["gptq"])
    file = quantised / "model.safetensors"
    save_file(load_file(file) | {f"{Q_PROJ}.bias": torch.zeros(64)}, file)
    np.testing.assert_array_equal(load_model(quantised).leaves[-1], load_model(dense).leaves[-1])
    save_file(load_file(file) | {f"{Q_PROJ}.bias": torch.ones(64)}, file)
    with pytest.raises(CheckpointError, match=f"extra tensor {Q_PROJ}.bias"):
        load_model(quantised)


def test_what_is_not_quantised_stays_plain(llama: Path, folders: tuple[Path, Path]) -> None:
    """A layer that the author left out, and a head that he did not."""
    quantised, dense = folders
    quantise_folder(llama, quantised, dense, CASES["awq"])
    tensors, plain = load_file(quantised / "model.safetensors"), load_file(llama / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{Q_PROJ}.")}
    kept[f"{Q_PROJ}.weight"] = plain[f"{Q_PROJ}.weight"]
    save_file(kept, quantised / "model.safetensors")
    widened = load_file(dense / "model.safetensors") | {f"{Q_PROJ}.weight": plain[f"{Q_PROJ}.weight"]}
    save_file(widened, dense / "model.safetensors")
    for ours, theirs in zip(load_model(quantised).leaves, load_model(dense).leaves, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_scales_of_the_cache_are_kept_out_with_one_line(
    llama: Path, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    quantised, dense = folders
    quantise_folder(llama, quantised, dense, CASES["ct_fp8_channel"])
    names = ("k_scale", "v_scale", "attn.k_scale", "k_proj.k_scale", "v_proj.output_scale")
    scales = {f"model.layers.{layer}.self_attn.{name}": torch.ones(1) for layer in (0, 1) for name in names}
    file = quantised / "model.safetensors"
    save_file(load_file(file) | scales, file)
    with caplog.at_level(logging.INFO, logger="lmdeploy_jax"):
        load_model(quantised)
    (line,) = [record.message for record in caplog.records if "KV cache" in record.message]
    assert "10 scales of a quantised KV cache are left unread" in line


def test_every_format_can_be_given() -> None:
    assert set(get_args(ModelFormat)) == {"hf", *FORMATS}


def test_a_format_that_nothing_is_in_is_told_to_whom_asked_for_it(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_model(llama, model_format="awq")
    assert "model_format='awq' asks for awq, but no tensor" in caplog.text


def test_the_format_may_be_given(llama: Path, folders: tuple[Path, Path]) -> None:
    quantised, dense = folders
    quantise_folder(llama, quantised, dense, CASES["awq"])
    config = json.loads((quantised / "config.json").read_text())
    del config["quantization_config"]
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"(?s)unknown tensor model.layers.0.*give model_format$"):
        load_model(quantised)
    read_config(quantised, model_format="awq")
    np.testing.assert_array_equal(
        load_model(quantised, model_format="awq").leaves[-1], load_model(dense).leaves[-1]
    )
    for name in ("gguf", "banana"):
        with pytest.raises(ConfigError, match=f"model_format='{name}' is unknown; choose hf, awq"):
            read_config(quantised, model_format=name)
    set_config(quantised, quant_method="gptq")
    with pytest.raises(ConfigError, match=r"model_format='awq', but .* says gptq"):
        read_config(quantised, model_format="awq")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "quantised with bitsandbytes cannot be loaded; give",
        ),
        ({"quant_method": "gguf"}, "quantised with gguf cannot be loaded"),
        ({"quant_method": "hqq"}, "quantised with hqq cannot be loaded"),
        ({"quant_method": "torchao"}, "quantised with torchao cannot be loaded"),
        (
            {"quant_method": "awq", "version": "gemv"},
            "version='gemv' is not supported with awq; supported: gemm",
        ),
        ({"quant_method": "awq", "bits": 3}, "bits=3 is not supported with awq"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3 is not supported with gptq; supported: 4, 8"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "checkpoint_format='marlin' is not supported",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "format='marlin-24' is not supported",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ' is not supported"),
    ],
)
def test_other_formats_are_refused_before_the_weights_are_opened(
    llama: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError) as caught:
        read_config(tmp_path)
    assert message in str(caught.value)
