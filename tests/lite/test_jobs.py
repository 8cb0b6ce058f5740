"""Jobs over a mixture of experts: what no token came by, what goes on where it ended, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.errors import ConfigError, UnsupportedModelError
from lmdeploy_jax.lite.awq import Awq
from lmdeploy_jax.lite.calibrate import calibrate
from lmdeploy_jax.lite.calibration import Calibration
from lmdeploy_jax.lite.gptq import Gptq
from lmdeploy_jax.lite.methods import Method
from lmdeploy_jax.lite.quantise import Job
from tests.lite import reference
from tests.oracle import save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

GROUP = 8
DOWN = "layers.1.mlp.experts.down.weight"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    save_checkpoint("mixtral", folder)
    return folder


def _calibration(samples: int) -> Calibration:
    """Of one token each, for all of which there is one program."""
    windows = np.random.default_rng(0).integers(3, 250, (samples, 1)).astype(np.int32)
    return Calibration(windows, 1, "drawn")


def _leaf(folder: Path, name: str) -> np.ndarray:
    model = load_model(folder, dtype="float32", dequantise=True)
    return np.asarray(dict(zip(model.skeleton.specs, model.leaves, strict=True))[name])


def test_experts_without_tokens_are_rounded_to_the_nearest(
    mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        errors = Job("it", mixture, tmp_path / "out", Gptq(GROUP), _calibration(1)).run()
    found = [error for error in errors if error.layer == 1 and error.matrix.startswith("mlp.experts.down")]
    unseen = [i for i, error in enumerate(found) if error.output is None]
    assert len(unseen) == len(found) - 2  # a token has two experts
    assert f"no token came by {len(unseen)} of {len(found)} experts" in caplog.text
    before, after = _leaf(mixture, DOWN), _leaf(tmp_path / "out", DOWN)
    for expert in range(len(found)):
        nearest = reference.rounded(before[expert], GROUP, symmetric=True)
        assert np.allclose(after[expert], nearest, rtol=1e-5) == (expert in unseen)


@pytest.mark.parametrize(
    "method", [pytest.param(Awq(GROUP), marks=pytest.mark.full), Gptq(GROUP)], ids=lambda method: method.name
)
def test_an_interrupted_run_writes_the_same_bytes(method: Method, mixture: Path, tmp_path: Path) -> None:
    def interrupt(done: int, *_: object) -> None:
        raise KeyboardInterrupt

    whole, out = (Job("it", mixture, tmp_path / name, method, _calibration(3)) for name in ("a", "b"))
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        out.run(on_layer=interrupt)
    out.run()
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


def test_groups_that_do_not_fit_are_refused_before_anything_is_written(mixture: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--w-group-size 128 does not divide the \d+ inputs .*; take \d+"):
        Job("it", mixture, tmp_path / "out", Awq(), None).run()
    assert not (tmp_path / "out").exists()


def test_layers_that_read_others_are_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint("gemma4", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"Gemma: its layers read .*--calib-samples 0"):
        Job("Gemma", tmp_path / "model", tmp_path / "out", Awq(GROUP), _calibration(1)).run()


def test_statistics_are_those_of_what_is_given(mixture: Path, tmp_path: Path) -> None:
    """The first layer's, of embeddings that are normed here."""
    calibration = _calibration(9)
    told = load_file(calibrate("it", mixture, tmp_path / "stats", calibration, lambda *_: None))
    embedded = _leaf(mixture, "embedding.weight")[calibration.windows.reshape(-1)]
    normed = embedded / np.sqrt((embedded**2).mean(-1, keepdims=True) + 1e-5)
    x = normed * _leaf(mixture, "layers.0.attention_norm.weight")
    for projection in ("q_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{projection}"
        np.testing.assert_allclose(told[f"{name}.absmax"], np.abs(x).max(0), rtol=1e-4)
        np.testing.assert_allclose(told[f"{name}.mean"], x.mean(0), atol=1e-5)
