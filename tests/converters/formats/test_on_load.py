"""`model_format="fp8"` on a plain checkpoint: every linear layer in E4M3, a scale a row."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.converters.formats.on_load import PIECE
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.converters.published import HEAD
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.quantised import dequantise
from tests.converters.formats.packers import CASES, quantise_folder
from tests.converters.formats.test_held import WEIGHTS, arrays_of
from tests.models.paged import PagedRunner, named_leaves
from tests.oracle import save_checkpoint

IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def test_linear_layers_are_rounded_and_nothing_else_is(llama: Path) -> None:
    plain, held = load_model(llama), load_model(llama, model_format="fp8", dequantise=False)
    names = {f"layers.{layer}.{weight}.weight" for layer in (0, 1) for weight in WEIGHTS}
    assert set(held.skeleton.formats) == names
    for name, leaf in named_leaves(plain).items():
        if name not in names:
            np.testing.assert_array_equal(named_leaves(held)[name], leaf)
    weight = load_file(llama / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    scale = np.abs(weight).max(1, keepdims=True) / 448
    arrays = arrays_of(held, "layers.1.mlp.down.weight")
    assert arrays.values.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(
        np.asarray(arrays.values, np.float32), (weight / scale).astype(jnp.float8_e4m3fn).astype(np.float32)
    )
    np.testing.assert_allclose(arrays.scales, scale.T, rtol=1e-6)
    ours = np.asarray(dequantise(held.skeleton.formats["layers.1.mlp.down.weight"], arrays, jnp.float32))
    assert np.linalg.norm(ours - weight) < 0.03 * np.linalg.norm(weight)  # 0.026 is what E4M3 costs


def test_pieces_make_the_whole(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(llama, model_format="fp8")
    assert PIECE > 10**6
    monkeypatch.setattr("lmdeploy_jax.converters.formats.on_load.PIECE", 7 * 64)
    for ours, theirs in zip(load_model(llama, model_format="fp8").leaves, whole.leaves, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_logits_are_near_those_of_the_plain_model(llama: Path) -> None:
    def logits(**options: bool | str) -> np.ndarray:
        return PagedRunner(load_model(llama, **options)).ragged([(0, 0, IDS, len(IDS))])[0]  # type: ignore[arg-type]

    plain = logits()
    weights_alone, with_activations = logits(model_format="fp8"), logits(model_format="fp8", dequantise=False)
    distances = [
        np.linalg.norm(made - plain) / np.linalg.norm(plain) for made in (weights_alone, with_activations)
    ]
    print(f"logits differ by {distances[0]:.4f} with weights in FP8, {distances[1]:.4f} with activations too")
    assert 0 < distances[0] < distances[1] < 0.15


def test_a_plain_head_may_be_rounded_with_the_rest(llama: Path, tmp_path: Path) -> None:
    """Beside whatever the other weights are; where the embedding is the head, that is refused."""
    asked = {"quantization_config": {"quant_method": "fp8", "lm_head_quantized": True}}
    held = load_model(llama, model_format="fp8", hf_overrides=asked, dequantise=False)
    assert len(held.skeleton.formats) == 2 * len(WEIGHTS) + 1
    head = load_file(llama / "model.safetensors")["lm_head.weight"]
    ours = dequantise(held.skeleton.formats[HEAD], arrays_of(held, HEAD), jnp.float32)
    assert 0 < np.linalg.norm(ours - head) < 0.03 * np.linalg.norm(head)
    quantise_folder(llama, tmp_path / "awq", tmp_path / "dense", CASES["awq"])
    asked = {"quantization_config": {"lm_head_quantized": True}}
    mixed = load_model(tmp_path / "awq", hf_overrides=asked, dequantise=False)
    assert mixed.skeleton.formats[HEAD] == held.skeleton.formats[HEAD]
    np.testing.assert_array_equal(arrays_of(mixed, HEAD).values, arrays_of(held, HEAD).values)
    file = tmp_path / "awq" / "model.safetensors"
    save_file({name: array for name, array in load_file(file).items() if name != HEAD}, file)
    with pytest.raises(ConfigError, match=r"lm_head_quantized is true, but .* has no lm_head.weight"):
        load_model(tmp_path / "awq", hf_overrides=asked)
