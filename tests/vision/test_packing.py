"""Views in one run give the tokens of each alone; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmdeploy_jax.converters.vision import load_vision
from lmdeploy_jax.vision.packing import pack, size_of
from lmdeploy_jax.vision.positions import window_places
from tests.vision.oracle import save_checkpoint
from tests.vision.pictures import picture
from tests.vision.test_parity import compiled

IMAGES = (picture(20, 33), picture(40, 21, seed=1), picture(9, 9, seed=2))


@pytest.mark.parametrize("name", ["internvl_hf", "qwen2_5_vl", "qwen3_vl", "llava_next"])
def test_together_as_alone(name: str, tmp_path: Path) -> None:
    model = load_vision(save_checkpoint(name, tmp_path))
    config = model.config
    views = [view for image in IMAGES for view in config.processor(image).views]
    sizes = [size_of(config, view.grid) for view in views]
    counts = [len(view.patches) // config.processor.merge**2 for view in views]
    size, run = -(-sum(sizes) // 16) * 16, compiled(model)
    results = [run(pack(config, [view], size, sum(counts))) for view in views]
    parts = [result[:, :count] for result, count in zip(results, counts, strict=True)]
    alone = np.concatenate([*parts, results[0][:, sum(counts) :]], axis=1)
    together = run(pack(config, views, size, sum(counts)))
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())
    with pytest.raises(ValueError, match="do not fit"):
        pack(config, views, sum(sizes) - 1, sum(counts))
    with pytest.raises(ValueError, match="do not fit"):
        pack(config, views, size, sum(counts) - 1)


def test_windows_of_the_released_size() -> None:
    """The order that transformers gives a grid of 3 x 5 blocks, and where its windows begin."""
    places, length = window_places(2, 64, 6, 10)
    blocks = places[::4] // 4
    assert np.argsort(blocks).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 4, 9, 14]
    assert length == 2 * 64
    assert (blocks >= 16).sum() == 3
    np.testing.assert_array_equal(places.reshape(-1, 4), places[::4, None] + np.arange(4))


def test_windows_that_divide_the_grid_leave_no_place_empty() -> None:
    places, length = window_places(2, 64, 16, 16)
    assert length == 256
    np.testing.assert_array_equal(np.sort(places), np.arange(256))
