"""Every family that is read can be written, and is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmdeploy_jax.assets import TINY_VISION
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.errors import UnsupportedModelError
from lmdeploy_jax.lite.awq import Awq
from lmdeploy_jax.lite.calibration import Calibration
from lmdeploy_jax.lite.methods import Fp8, Method
from lmdeploy_jax.lite.quantise import Job
from tests.oracle import CONFIGS, save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

NOT_ALONE = ("gemma4",)  # layers that read more than the residual stream
GROUP = 4  # divides the inputs of all of them


def test_a_model_that_takes_images_keeps_its_tower(tmp_path: Path) -> None:
    Job("tiny-vision", TINY_VISION, tmp_path / "out", Fp8()).run()
    _compare(TINY_VISION, tmp_path / "out", 0.04)
    with CheckpointReader(TINY_VISION) as before, CheckpointReader(tmp_path / "out") as after:
        tower = [name for name in before.names() if "vision" in name]
        assert len(tower) > 10
        for name in tower:
            np.testing.assert_array_equal(before.read(name), after.read(name))


@pytest.mark.full
@pytest.mark.parametrize("method", [Fp8(), Awq(GROUP, search_scale=False)], ids=lambda method: method.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read(name: str, method: Method, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path / "model")
    windows = np.random.default_rng(0).integers(3, 250, (2, 32)).astype(np.int32)
    calibration = Calibration(windows, 2, "drawn") if method.calibrates else None
    job = Job(name, tmp_path / "model", tmp_path / "out", method, calibration)
    if method.calibrates and name in NOT_ALONE:
        with pytest.raises(UnsupportedModelError, match="cannot be calibrated one at a time"):
            job.run()
        return
    errors = job.run()
    assert errors
    if method.calibrates:
        load_model(tmp_path / "out", dequantise=True)  # scaled, so that weights are not to be compared
        seen = [error for error in errors if error.output is not None and error.nearest is not None]
        assert np.mean([error.output for error in seen]) < np.mean([error.nearest for error in seen])
    else:
        _compare(tmp_path / "model", tmp_path / "out", 0.04)


def _compare(before: Path, after: Path, most: float) -> None:
    """Each weight within a relative error of `most`."""
    one, other = (load_model(folder, dtype="float32", dequantise=True) for folder in (before, after))
    assert one.skeleton.specs.keys() == other.skeleton.specs.keys()
    for name, first, second in zip(one.skeleton.specs, one.leaves, other.leaves, strict=True):
        first, second = np.asarray(first), np.asarray(second)
        assert np.linalg.norm(first - second) <= most * np.linalg.norm(first), name
