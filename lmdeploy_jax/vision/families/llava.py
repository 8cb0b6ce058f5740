"""LLaVA 1.5 and LLaVA-NeXT, as HuggingFace has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.vision.config import (
    ActivationConfig,
    LearnedRows,
    LinearConfig,
    Step,
    TowerConfig,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    VisionFamily,
    language_model,
    layers_run,
    normalisation,
    number_of_layers,
    plain,
    resample,
    side,
)
from lmdeploy_jax.vision.families.clip import clip_rules, clip_tower
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import CLIP_MEAN, CLIP_STD, ImageProcessor
from lmdeploy_jax.vision.resize import FixedSize, ImagePlan, Pinpoints, ResizeRule, ShortestEdge

NEWLINE = -1  # the learned row that ends a line
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def llava_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`LlavaConfig` with a CLIP tower."""
    edge = files.within("size").get("shortest_edge")
    image = _image_side(fields, files)
    rule: ResizeRule = FixedSize(image, resample(files, "bicubic"))
    if edge is not None or not files.table("size"):
        square = tuple(int(255 * value) for value in CLIP_MEAN) if files.flag("do_pad", False) else None
        edge = files.within("size").size("shortest_edge", image)
        rule = ShortestEdge(edge, image, resample(files, "bicubic"), square)  # type: ignore[arg-type]
    return _config(fields, files, rule, image, learned=False)


def next_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`LlavaNextConfig`."""
    image = _image_side(fields, files)
    rule = Pinpoints(image, _resolutions(fields, image), resample(files, "bicubic"))
    return _config(fields, files, rule, image, learned=True)


def _resolutions(fields: Fields, image: int) -> tuple[tuple[int, int], ...]:
    pairs = fields.items("image_grid_pinpoints", PINPOINTS)
    known = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    if len(known) < len(pairs) or not all(_is_multiple(edge, image) for pair in known for edge in pair):
        raise fields.unsupported("image_grid_pinpoints", pairs, f"pairs of multiples of {image}")
    return tuple((height, width) for height, width in known)


def _is_multiple(edge: Any, image: int) -> bool:
    return type(edge) is int and 0 < edge <= 1000 * image and edge % image == 0


def _image_side(fields: Fields, files: Fields) -> int:
    trained = side(fields.within("vision_config"), "image_size", 336)
    return side(files, "crop_size", trained)


def _config(
    fields: Fields, files: Fields, rule: ResizeRule, image: int, *, learned: bool
) -> VisionModelConfig:
    vision = fields.within("vision_config")
    vision.require("model_type", {"clip_vision_model": True}, "clip_vision_model")
    fields.require("vision_feature_select_strategy", {"default": True}, "default")
    layers = layers_run(fields, "vision_feature_layer", number_of_layers(vision, default=24), -2)
    mean, std = normalisation(files, CLIP_MEAN, CLIP_STD)
    processor = ImageProcessor(rule, side(vision, "patch_size", 14), mean=mean, std=std)
    tower = clip_tower(vision, image, layers)
    return VisionModelConfig(processor, tower, _projector(fields, tower, learned))


def _projector(fields: Fields, tower: TowerConfig, learned: bool) -> tuple[Step, ...]:
    out = fields.within("text_config").size("hidden_size", 4096)
    bias = fields.flag("multimodal_projector_bias", True)
    steps: tuple[Step, ...] = (
        LinearConfig((tower.width,), out, bias),
        ActivationConfig(fields.require("projector_hidden_act", ACTIVATIONS, "gelu")),
        LinearConfig((out,), out, bias),
    )
    return (*steps, LearnedRows((out,))) if learned else steps


def rules(config: VisionModelConfig, names: Sequence[str]) -> tuple[Rule, ...]:
    """`vision_tower.*`, in old files with `vision_model.` behind it, and `multi_modal_projector.*`."""
    old = any("vision_tower.vision_model." in name for name in names)
    projector = r"multi_modal_projector\."
    return (
        *clip_rules(config.tower, r"vision_tower\.vision_model\." if old else r"vision_tower\."),
        *plain(
            {
                projector + "linear_1": "projector.steps.0.linear",
                projector + "linear_2": "projector.steps.2.linear",
            }
        ),
        Rule("image_newline", "projector.steps.3.rows"),
        *language_model(r"language_model\..*", r"lm_head\..*"),
    )


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    rows, columns = processor.tokens(plan)
    return "<image>" * (rows * columns)


def next_rows(config: VisionModelConfig, plan: ImagePlan) -> np.ndarray:
    """The whole picture, then the tiles as one picture, line by line, without what was padding."""
    return _next_rows(config.processor, plan)


def _next_rows(processor: ImageProcessor, plan: ImagePlan) -> np.ndarray:
    rows, columns = processor.tokens(plan)
    whole = rows * columns
    tiles = np.arange(whole, plan.views * whole).reshape(plan.rows, plan.columns, rows, columns)
    picture = tiles.swapaxes(1, 2).reshape(plan.rows * rows, plan.columns * columns)
    picture = _unpadded(picture, plan.source)
    lines = np.pad(picture, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([np.arange(whole), lines.reshape(-1)]).astype(np.int32)


def _unpadded(picture: np.ndarray, source: tuple[int, int]) -> np.ndarray:
    """The part that the picture itself fills, by the rounding of the checkpoints' own code."""
    (rows, columns), (height, width) = picture.shape, source
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return picture[padding : rows - padding]
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return picture[:, padding : columns - padding]


def next_expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    return "<image>" * len(_next_rows(processor, plan))


LLAVA = VisionFamily(llava_config, rules, Placeholder("<image>", "<image>", expand, "<image>\n"))
LLAVA_NEXT = VisionFamily(
    next_config, rules, Placeholder("<image>", "<image>", next_expand, "<image>\n"), next_rows
)
