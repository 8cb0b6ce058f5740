"""Pixels, tower and projector give the rows that transformers' language model reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.converters.vision import LoadedVisionModel, load_vision, read_vision
from lmdeploy_jax.errors import CheckpointError, RequestError, UnsupportedModelError
from lmdeploy_jax.parallel.mesh import make_mesh
from lmdeploy_jax.vision.inputs import VisionInputs
from lmdeploy_jax.vision.packing import pack, result_index, size_of
from lmdeploy_jax.vision.pixels import normalize
from lmdeploy_jax.vision.processor import ProcessedImage
from tests.vision.oracle import CONFIGS, hf_features, hf_model, save_checkpoint
from tests.vision.pictures import picture

TOLERANCE = 1e-4


def in_full(*names: str) -> list[Any]:
    """Families that are like others in what a test is about, and left to the long runs."""
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


def compiled(model: LoadedVisionModel) -> Callable[[VisionInputs], np.ndarray]:
    """Runs a model, compiled without LLVM's optimisations: the tests' time is compilation."""
    fast = {"xla_backend_optimization_level": 0}
    step = jax.jit(lambda leaves, inputs: model.merge(leaves)(inputs), compiler_options=fast)
    return lambda inputs: np.asarray(step(model.leaves, inputs))


def features(model: LoadedVisionModel, images: Sequence[Image.Image]) -> np.ndarray:
    """The rows [1 + k, rows, D] of all images, from one run with room to spare."""
    return rows_of(model, [model.config.processor(image) for image in images])


def rows_of(model: LoadedVisionModel, done: Sequence[ProcessedImage]) -> np.ndarray:
    config = model.config
    views = [view for image in done for view in image.views]
    unit = config.tower.window or (16 if config.tower.grid is None else 1)
    size = -(-(sum(size_of(config, view.grid) for view in views) + 1) // unit) * unit
    counts = [image.patches.shape[0] * image.patches.shape[1] // config.processor.merge**2 for image in done]
    output = sum(counts) + 3
    result = compiled(model)(pack(config, views, size, output))
    firsts = np.cumsum([0, *counts])
    own = [model.family.rows(config, image.plan) for image in done]
    index = [result_index(rows, first, output) for rows, first in zip(own, firsts, strict=False)]
    return result[:, np.concatenate(index)]


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert worst < TOLERANCE, f"relative error {worst:.2e}"


LIKE_OTHERS = ("gemma4_small", "qwen3_vl_moe", "qwen3_5_moe", "internvl_moe", "glm4v_moe")


@pytest.mark.parametrize("name", [*(n for n in CONFIGS if n not in LIKE_OTHERS), *in_full(*LIKE_OTHERS)])
def test_rows_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(name, tmp_path)
    images = [picture(60, 85), picture(31, 40, seed=1)]
    ours = features(load_vision(folder), images)
    for mine, theirs in zip(ours, hf_features(name, folder, images), strict=True):
        assert_close(mine, theirs)


def test_norms_and_sums_within_products_change_nothing(tmp_path: Path) -> None:
    """Of LayerNorm with weights and biases; a tower whose products have no biases stays as it is."""
    folder, images = save_checkpoint("internvl", tmp_path / "layer"), [picture(60, 85)]
    fused = load_vision(folder, fused=True)
    assert fused.config.tower.fused
    assert_close(features(fused, images)[0], features(load_vision(folder), images)[0])
    assert not load_vision(save_checkpoint("internvl_6b", tmp_path / "rms"), fused=True).config.tower.fused


def test_the_first_pixel_shuffle_lists_columns_first(tmp_path: Path) -> None:
    """`ps_version` v1 leaves each tile's tokens transposed; it is what a config without the field means."""
    folder, images = save_checkpoint("internvl", tmp_path), [picture(60, 85)]
    config = json.loads((folder / "config.json").read_text())
    del config["ps_version"]
    (folder / "config.json").write_text(json.dumps(config))
    theirs = hf_features("internvl", folder, images)[0]
    turned = theirs.reshape(-1, 2, 2, theirs.shape[1]).swapaxes(1, 2).reshape(theirs.shape)
    assert_close(features(load_vision(folder), images)[0], turned)


def test_overrides_of_the_config_reach_the_tower(tmp_path: Path) -> None:
    folder, images = save_checkpoint("llava", tmp_path), [picture(60, 85)]
    overrides = {"vision_feature_layer": -1}
    usual, (found,) = (
        features(load_vision(folder), images),
        features(load_vision(folder, hf_overrides=overrides), images),
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | overrides))
    assert not np.allclose(found, usual[0])
    np.testing.assert_array_equal(found, features(load_vision(folder), images)[0])


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_towers_of_older_files_have_one_name_more(name: str, tmp_path: Path) -> None:
    folder, images = save_checkpoint(name, tmp_path), [picture(60, 85)]
    want = features(load_vision(folder), images)
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors")
    np.testing.assert_array_equal(features(load_vision(folder), images), want)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = save_checkpoint("qwen2_5_vl", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (name,) = [key for key in tensors if key.endswith("blocks.1.attn.proj.weight")]
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"missing tensor {name}")):
        load_vision(folder)


def test_a_text_model_takes_no_images(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match=r"'LlamaForCausalLM'.* take no images here"):
        load_vision(tmp_path)


@pytest.mark.parametrize(
    "name", ["internvl_hf", "qwen3_vl", *in_full("qwen2_5_vl", "llava_next", "gemma3", "glm4v")]
)
def test_sixteen_bits(name: str, tmp_path: Path) -> None:
    """Nothing in between is widened by mistake: the rows are of the weights' dtype, and near the wide
    ones.
    """
    folder, images = save_checkpoint(name, tmp_path), [picture(60, 85)]
    wide, narrow = (
        features(load_vision(folder), images),
        features(load_vision(folder, dtype="bfloat16"), images),
    )
    assert narrow.dtype == jax.numpy.bfloat16
    assert np.abs(narrow.astype(np.float32) - wide).max() < 0.1 * np.abs(wide).max()


def test_every_device_of_a_mesh_holds_all(tmp_path: Path) -> None:
    mesh = make_mesh(1)
    model = load_vision(save_checkpoint("llava", tmp_path), mesh=mesh)
    assert {leaf.sharding for leaf in model.leaves} == {NamedSharding(mesh, PartitionSpec())}


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v", *in_full("qwen2_vl", "qwen3_vl")])
def test_videos(name: str, tmp_path: Path) -> None:
    """Pairs of frames, each a view; five frames are three pairs, the last frame being repeated."""
    folder = save_checkpoint(name, tmp_path)
    model = load_vision(folder)
    processor = model.config.processor
    done = processor.video([picture(20, 33, seed=seed) for seed in range(5)])
    assert done.plan.views == len(done.patches) == 3
    shape = (*done.patches.shape[:2], 3, -1)
    values = normalize(done.patches.reshape(shape).swapaxes(2, 3), processor.mean, processor.std)
    values = torch.tensor(values.swapaxes(2, 3).reshape(-1, done.patches.shape[2]))
    theirs = hf_model(name, folder).get_video_features(values, torch.tensor([[3, *done.grid]]))
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in theirs.pooler_output])
    assert_close(rows_of(model, [done])[0], rows.numpy())


def test_frames_of_several_sizes_are_no_video(tmp_path: Path) -> None:
    _, config = read_vision(save_checkpoint("qwen2_vl", tmp_path))
    for frames in ([], [picture(20, 33), picture(33, 20)]):
        with pytest.raises(RequestError, match="all of one size"):
            config.processor.video(frames)
