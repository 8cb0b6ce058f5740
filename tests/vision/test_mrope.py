"""Positions equal those that transformers computes, and those of the original code for videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lmdeploy_jax.vision.mrope import VisionGrid, mrope_positions
from tests.vision.oracle import hf_model, save_checkpoint

IMAGE, VIDEO = 1, 2


def theirs(
    name: str, folder: Path, kinds: list[int], images: list[list[int]], videos: list[list[int]] | None = None
) -> tuple[np.ndarray, int]:
    """By the kind of each token (0 text) and grids [frames, rows, columns] of patches."""
    model = hf_model(name, save_checkpoint(name, folder)).model
    found, delta = model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.long),
        torch.tensor([kinds], dtype=torch.int),
        image_grid_thw=torch.tensor(images),
        video_grid_thw=torch.tensor(videos) if videos else None,
    )
    return found[:, 0].numpy(), int(delta)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_images(name, tmp_path):
    kinds = [0, 0, *[IMAGE] * 6, 0, *[IMAGE] * 5, 0, 0, 0]
    want = theirs(name, tmp_path, kinds, [[1, 4, 6], [1, 10, 2]])
    grids = [VisionGrid(2, 2, 3), VisionGrid(9, 5, 1)]
    positions, delta = mrope_positions(len(kinds), grids)
    np.testing.assert_array_equal(positions, want[0])
    assert delta == want[1]


def test_a_video_of_qwen3_is_an_image_a_frame(tmp_path):
    kinds = [0, 0, *[VIDEO] * 6, 0, 0, *[VIDEO] * 6, 0]
    want = theirs("qwen3_vl", tmp_path, kinds, [[1, 4, 6]], [[2, 4, 6]])
    positions, delta = mrope_positions(len(kinds), [VisionGrid(2, 2, 3), VisionGrid(10, 2, 3)])
    np.testing.assert_array_equal(positions, want[0])
    assert delta == want[1]


@pytest.mark.parametrize(("interval", "last", "following"), [(1.0, 7, 8), (2.0, 12, 13)])
def test_text_after_a_video_goes_on_behind_its_last_frame(interval, last, following):
    """transformers 5.24 forgets the frames here; the original code of Qwen2-VL and Qwen2.5-VL does not."""
    positions, delta = mrope_positions(2 + 6 * 4 + 1, [VisionGrid(2, 2, 2, 6, interval)])
    assert positions[0, 2 + 6 * 4 - 1] == last
    assert positions[:, -1].tolist() == [following] * 3
    assert delta == following + 1 - positions.shape[1]


def test_fractions_of_an_interval_are_cut_off():
    positions, _ = mrope_positions(4, [VisionGrid(0, 1, 1, 4, 1.5)])
    assert positions[0].tolist() == [0, 1, 3, 4]


def test_text_alone():
    positions, delta = mrope_positions(3, [])
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert delta == 0
