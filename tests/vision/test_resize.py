"""Resize rules give the pixels of transformers' PIL image processors, and their sizes and counts."""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision import pixels
from lmdeploy_jax.vision.processor import CLIP_MEAN, CLIP_STD, HALF, ImageProcessor, block_order
from lmdeploy_jax.vision.resize import (
    BestFit,
    FixedSize,
    GridRatio,
    HDTransform,
    LongestEdge,
    NaViT,
    PanAndScan,
    PatchBudget,
    Pinpoints,
    ResizeRule,
    ShortestEdge,
    SmartResize,
)
from tests.vision.pictures import SIZES, picture
from tests.vision.pillow import processed

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ROUNDING = 2e-6  # transformers multiplies by 1 / 255 and subtracts; here it is one division


def theirs(family: str, image: Image.Image, **options: Any) -> Any:
    return processed(getattr(transformers, family)(**options), image, "np")


def images(processor: ImageProcessor, image: Image.Image) -> np.ndarray:
    """The normalised views, [views, C, H, W]."""
    views = np.stack(processor.rule.views(image))
    return pixels.normalize(views, processor.mean, processor.std).transpose(0, 3, 1, 2)


def check(processor: ImageProcessor, image: Image.Image, want: np.ndarray) -> None:
    got = images(processor, image)
    np.testing.assert_allclose(got, want, atol=ROUNDING, rtol=0)
    plan = processor.plan(image.height, image.width)
    assert (plan.views, 3, plan.height, plan.width) == got.shape


@pytest.mark.parametrize("size", SIZES)
def test_fixed_size(size):
    image = picture(*size)
    options = {"size": {"height": 56, "width": 56}, "image_mean": HALF, "image_std": HALF}
    want = theirs("Gemma3ImageProcessorPil", image, **options)["pixel_values"]
    check(ImageProcessor(FixedSize(56, "bilinear"), 14, mean=HALF, std=HALF), image, want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("square", [None, (122, 116, 104)])
def test_shortest_edge(size, square):
    image = picture(*size)
    options = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    want = theirs("LlavaImageProcessorPil", image, do_pad=square is not None, **options)["pixel_values"]
    check(ImageProcessor(ShortestEdge(28, 28, square=square), 14), image, want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("most", [1, 6, 12])
def test_grid_ratio(size, most):
    image = picture(*size)
    options = {"size": {"height": 56, "width": 56}, "crop_to_patches": True, "max_patches": most}
    want = theirs("GotOcr2ImageProcessorPil", image, **options)["pixel_values"]
    check(ImageProcessor(GridRatio(56, most=most), 14), image, want)


@pytest.mark.parametrize("size", SIZES)
def test_pinpoints(size):
    image = picture(*size)
    resolutions = tuple((height // 6, width // 6) for height, width in PINPOINTS)
    options = {
        "image_grid_pinpoints": [list(pair) for pair in resolutions],
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
    }
    want = theirs("LlavaNextImageProcessorPil", image, **options)["pixel_values"][0]
    check(ImageProcessor(Pinpoints(56, resolutions), 14), image, want)


def functions_of(module: str, *names: str) -> dict[str, Any]:
    """Some of a module of transformers that cannot be imported without torchvision; they can do without."""
    tree = ast.parse((Path(transformers.__file__).parent / module).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    found: dict[str, Any] = {"torch": torch, "math": math, "defaultdict": defaultdict, "lru_cache": lru_cache}
    found["SizeDict"] = SizeDict
    exec(compile(tree, module, "exec"), found)
    return found


@pytest.mark.parametrize("enlarge", [False, True])
def test_best_fit_has_the_canvases_of_transformers(enlarge):
    """And the picture's size on it."""
    names = ("get_factors", "find_supported_resolutions", "get_best_fit", "get_max_res_without_distortion")
    code = functions_of("models/llama4/image_processing_llama4.py", *names)
    side, rng = 24, np.random.default_rng(0)
    resolutions = torch.tensor(code["find_supported_resolutions"](16, SizeDict(height=side, width=side)))
    rule = BestFit(side, 16, enlarge=enlarge)
    sizes = [(24, 24), (48, 48), (23, 24), (1, 400), (96, 96), *rng.integers(1, 300, (200, 2)).tolist()]
    for height, width in sizes:
        canvas = code["get_best_fit"]((height, width), resolutions, enlarge).tolist()
        plan = rule.plan(height, width)
        assert [side * plan.rows, side * plan.columns] == canvas, (height, width)
        inner = canvas if enlarge else [min(max(height, side), canvas[0]), min(max(width, side), canvas[1])]
        rows, columns = code["get_max_res_without_distortion"]((height, width), inner)
        views = rule.views(Image.new("RGB", (width, height), (255, 255, 255)))
        tiles = np.stack(views[: plan.rows * plan.columns]).reshape(plan.rows, plan.columns, side, side, 3)
        whole = tiles.swapaxes(1, 2).reshape(*canvas, 3)
        assert (whole[: max(rows, 1), : max(columns, 1)] == 255).all()
        assert whole.sum() == 255 * 3 * max(rows, 1) * max(columns, 1), (height, width)
        assert len(views) == plan.views == plan.rows * plan.columns + (plan.rows * plan.columns > 1)


@pytest.mark.parametrize("size", [*SIZES, (100, 400), (400, 101), (100, 119), (121, 100)])
def test_pan_and_scan(size):
    image = picture(*size)
    options = {
        "size": {"height": 56, "width": 56},
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 30,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    want = theirs("Gemma3ImageProcessorPil", image, **options)["pixel_values"]
    check(ImageProcessor(PanAndScan(56, 30, 4, 1.2), 14, mean=HALF, std=HALF), image, want)


PACKED: dict[str, tuple[str, dict[str, Any], ImageProcessor]] = {
    "qwen2_vl": (
        "Qwen2VLImageProcessorPil",
        {"min_pixels": 3136, "max_pixels": 200 * 784},
        ImageProcessor(SmartResize(28, 3136, 200 * 784), 14, merge=2, frames=2),
    ),
    "qwen3_vl": (
        "Qwen2VLImageProcessorPil",
        {"min_pixels": 65536, "max_pixels": 2**18, "patch_size": 16, "image_mean": HALF, "image_std": HALF},
        ImageProcessor(SmartResize(32, 65536, 2**18), 16, merge=2, frames=2, mean=HALF, std=HALF),
    ),
    "glm4v": (
        "Glm4vImageProcessorPil",
        {"size": {"shortest_edge": 112 * 112, "longest_edge": 784 * 300}},
        ImageProcessor(SmartResize(28, 112 * 112, 784 * 300, frames=2, enlarges=True), 14, merge=2, frames=2),
    ),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("size", SIZES)
def test_smart_resize(name, size):
    family, options, processor = PACKED[name]
    image = picture(*size)
    try:
        want = theirs(family, image, **options)
    except ValueError:
        with pytest.raises(RequestError, match="at most 200 times"):
            processor(image)
        return
    done = processor(image)
    assert (1, *done.grid) == tuple(want["image_grid_thw"][0])
    assert done.patches.dtype == np.uint8
    vectors = done.patches[0].reshape(-1, 3, done.patches.shape[2] // 3)
    got = pixels.normalize(vectors.swapaxes(1, 2), processor.mean, processor.std).swapaxes(1, 2)
    np.testing.assert_allclose(got.reshape(len(vectors), -1), want["pixel_values"], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("size", [size for size in SIZES if 4000 not in size])
def test_longest_edge(size):
    image = picture(*size)
    options = {"size": {"longest_edge": 256}, "patch_size": {"height": 16, "width": 16}}
    want = theirs("PixtralImageProcessorPil", image, **options)["pixel_values"]
    check(ImageProcessor(LongestEdge(256, 16), 16), image, want)


def test_patch_budget_has_the_sizes_of_transformers():
    rule, rng = PatchBudget(48, 280), np.random.default_rng(0)
    for height, width in [
        (600, 800),
        (48, 48),
        (1, 4000),
        (3000, 2),
        *rng.integers(1, 3000, (300, 2)).tolist(),
    ]:
        plan = rule.plan(height, width)
        assert (plan.height, plan.width) == get_aspect_ratio_preserving_size(height, width, 16, 280 * 9, 3)
        assert plan.height * plan.width <= rule.most_pixels


def test_a_line_keeps_one_block_of_pixtral():
    """transformers resizes such a picture to a height of nothing, and fails."""
    assert images(ImageProcessor(LongestEdge(256, 16), 16), picture(1, 4000)).shape == (1, 3, 16, 256)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((600, 800), (600, 800), (616, 812)),
        ((1, 1), (1, 1), (28, 28)),
        ((1500, 1000), (1101, 734), (1120, 756)),
        ((20, 8000), (17, 7168), (28, 7168)),
    ],
)
def test_navit(size, resized, padded):
    """By the formula of Kimi's own processor, whose port in transformers needs torchvision."""
    image, rule = picture(*size), NaViT(14, 28, most=4096)
    (view,) = rule.views(image)
    assert view.shape == (*padded, 3)
    height, width = resized
    np.testing.assert_array_equal(view[:height, :width], pixels.resize(image, height, width, "bicubic"))
    assert not view[height:].any()
    assert not view[:, width:].any()


@pytest.mark.parametrize("size", [*(size for size in SIZES if 4000 not in size), (9, 400), (400, 9)])
@pytest.mark.parametrize("most", [4, 16])
def test_hd_transform(size, most):
    """By PyTorch, with the steps of Phi-3.5-vision's own processor."""
    import torch

    image, side = picture(*size), 28
    flipped = image.transpose(Image.Transpose.TRANSPOSE) if image.width < image.height else image
    ratio, scale = flipped.width / flipped.height, 1
    while scale * np.ceil(scale / ratio) <= most:
        scale += 1
    width = (scale - 1) * side
    height = int(width / ratio)
    whole = math.ceil(height / side) * side
    top = int((whole - height) / 2)
    hd = np.full((whole, width, 3), 255, np.uint8)
    hd[top : top + height] = np.asarray(pixels.resize(flipped, height, width, "bilinear"))
    hd = hd.swapaxes(0, 1) if flipped is not image else hd
    tensor = torch.tensor(pixels.normalize(hd, CLIP_MEAN, CLIP_STD)).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(tensor, size=(side, side), mode="bicubic")
    rows, columns = hd.shape[0] // side, hd.shape[1] // side
    tiles = tensor.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    got = images(ImageProcessor(HDTransform(side, most), 14), image)
    np.testing.assert_allclose(got, torch.cat([small, tiles]).numpy(), atol=2e-5, rtol=0)


def test_a_line_is_too_thin_for_hd():
    with pytest.raises(RequestError, match="9000 pixels wide and 1 high"):
        HDTransform(336, 4).plan(1, 9000)


@pytest.mark.parametrize(
    "rule",
    [
        FixedSize(896),
        ShortestEdge(336, 336),
        ShortestEdge(336, 336, square=(0, 0, 0)),
        GridRatio(448),
        GridRatio(448, most=1024),
        Pinpoints(336, PINPOINTS),
        PanAndScan(896, 256, 4, 1.2),
    ],
)
def test_a_line_may_not_become_gigabytes(rule):
    """A file of a hundred bytes may hold one."""
    with pytest.raises(RequestError, match="crop it or pad it"):
        rule.views(Image.new("RGB", (1, 300_000)))


@pytest.mark.parametrize("bounds", [{"least": 3, "most": 2}, {"most": 1025}, {"most": 2**31 - 1}])
def test_numbers_of_tiles_have_bounds(bounds):
    with pytest.raises(RequestError, match="max_dynamic_patch"):
        GridRatio(448, **bounds)
    with pytest.raises(RequestError, match="num_crops"):
        HDTransform(336, 1025)


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        (GridRatio(448), {(600, 800): (3, 4, 13), (1080, 1920): (2, 4, 9), (1024, 1024): (3, 3, 10),
                          (448, 448): (1, 1, 1), (300, 3000): (1, 10, 11)}),
        (GridRatio(448, most=6), {(600, 800): (2, 3, 7), (1080, 1920): (1, 2, 3), (2000, 2000): (2, 2, 5)}),
        (Pinpoints(336, PINPOINTS), {(600, 800): (2, 2, 5), (100, 100): (1, 2, 3)}),
        (BestFit(336), {(600, 800): (2, 3, 7), (336, 336): (1, 1, 1), (1080, 1920): (3, 5, 16)}),
        (HDTransform(336, 16), {(600, 800): (3, 4, 13)}),
        (HDTransform(336, 4), {(600, 800): (2, 2, 5)}),
    ],
)  # fmt: skip
def test_released_tile_sizes(rule: ResizeRule, sizes: dict[tuple[int, int], tuple[int, int, int]]) -> None:
    for size, expected in sizes.items():
        plan = rule.plan(*size)
        assert (plan.rows, plan.columns, plan.views) == expected, size


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        (SmartResize(28, 3136, 1003520), {(600, 800): (588, 812), (1080, 1920): (728, 1316),
                                          (100, 100): (112, 112), (20, 20): (56, 56),
                                          (3000, 4000): (840, 1148),
                                          (28, 4000): (28, 4004), (427, 640): (420, 644)}),
        (SmartResize(28, 3136, 12845056), {(1080, 1920): (1092, 1932), (3000, 4000): (2996, 4004)}),
        (SmartResize(32, 65536, 16777216), {(600, 800): (608, 800), (100, 100): (256, 256)}),
        (LongestEdge(1024, 16), {(600, 800): (608, 800), (1080, 1920): (576, 1024)}),
        (LongestEdge(1540, 28), {(600, 800): (616, 812), (1080, 1920): (868, 1540)}),
    ],
)  # fmt: skip
def test_released_packed_sizes(rule: ResizeRule, sizes: dict[tuple[int, int], tuple[int, int]]) -> None:
    for size, expected in sizes.items():
        plan = rule.plan(*size)
        assert (plan.height, plan.width) == expected, size


def test_block_order():
    positions = np.stack(np.meshgrid(range(4), range(4), indexing="ij"), axis=-1)
    blocks = block_order(positions, 2).tolist()
    assert blocks[:4] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert blocks[4:8] == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert block_order(positions, 2, columns_first=True)[4:8].tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
