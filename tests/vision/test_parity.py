"""Pixels, tower and projector give the rows that transformers' language model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lmdeploy_jax.converters.vision import LoadedVisionModel, load_vision
from lmdeploy_jax.vision.inputs import VisionInputs
from lmdeploy_jax.vision.packing import pack, size_of
from tests.vision.oracle import CONFIGS, hf_features, save_checkpoint
from tests.vision.pictures import picture

TOLERANCE = 1e-4


def compiled(model: LoadedVisionModel) -> Callable[[VisionInputs], np.ndarray]:
    """Runs a model, compiled without LLVM's optimisations: the tests' time is compilation."""
    fast = {"xla_backend_optimization_level": 0}
    step = jax.jit(lambda leaves, inputs: model.merge(leaves)(inputs), compiler_options=fast)
    return lambda inputs: np.asarray(step(model.leaves, inputs))


def features(model: LoadedVisionModel, images: Sequence[Image.Image]) -> np.ndarray:
    """The rows [1 + k, rows, D] of all images, from one run with room to spare."""
    done = [model.config.processor(image) for image in images]
    plans = [image.plan for image in done]
    rows = sum(len(model.family.rows(model.config, plan)) for plan in plans)
    size = sum(size_of(model.config, plan) for plan in plans)
    unit = model.config.tower.window or 16
    size = size + 1 if model.config.tower.grid is not None else -(-(size + 1) // unit) * unit
    inputs = pack(model.config, model.family.rows, done, size, rows + 3)
    return compiled(model)(inputs)[:, :rows]


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert worst < TOLERANCE, f"relative error {worst:.2e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(name, tmp_path)
    images = [picture(60, 85), picture(31, 40, seed=1)]
    ours = features(load_vision(folder), images)
    for mine, theirs in zip(ours, hf_features(name, folder, images), strict=True):
        assert_close(mine, theirs)
