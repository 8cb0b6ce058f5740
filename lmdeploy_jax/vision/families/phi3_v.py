"""Phi-3.5-vision: CLIP over an HD picture's tiles, lines and views divided by learned features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.vision.config import (
    ActivationConfig,
    LearnedRows,
    LinearConfig,
    MergeConfig,
    Step,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    VisionFamily,
    check_blocks,
    language_model,
    layers_run,
    normalisation,
    number_of_layers,
    plain,
    side,
)
from lmdeploy_jax.vision.families.clip import clip_rules, clip_tower
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import CLIP_MEAN, CLIP_STD, ImageProcessor
from lmdeploy_jax.vision.resize import HDTransform, ImagePlan

MERGE = 2
NEWLINE, SEPARATOR = -1, -2  # the learned rows that end a line, and stand before the whole picture
VISION = r"model\.vision_embed_tokens\."


def phi3_v_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`Phi3VConfig`, whose tower is CLIP-L/14-336 wherever it says nothing else."""
    embedding, vision = fields.within("embd_layer"), fields.within("img_processor")
    embedding.require("hd_transform_order", {"sub_glb": True}, "sub_glb")
    embedding.require("projection_cls", {"mlp": True}, "mlp")
    for name in ("use_hd_transform", "with_learnable_separator"):
        if not embedding.flag(name, True):
            raise embedding.unsupported(name, False, "true")
    for name in ("image_dim_out", "model_name", "name", "num_img_tokens", "type_feature"):
        vision.get(name)
    image = side(vision, "image_size", 336)
    patch = side(vision, "patch_size", 14)
    check_blocks(vision, "image_size", MERGE, image // patch)
    layers = layers_run(vision, "layer_idx", number_of_layers(vision, default=24), -2)
    tower = clip_tower(vision, image, layers)
    mean, std = normalisation(files, CLIP_MEAN, CLIP_STD)
    rule = HDTransform(image, files.size("num_crops", 4, most=1024))
    processor = ImageProcessor(rule, patch, MERGE, mean=mean, std=std)
    merged, out = MERGE**2 * tower.width, fields.size("hidden_size", 3072)
    steps: tuple[Step, ...] = (
        MergeConfig(MERGE**2),
        LearnedRows((1, 1, 1, merged)),
        LearnedRows((1, 1, merged)),
        LinearConfig((merged,), out),
        ActivationConfig("gelu"),
        LinearConfig((out,), out),
    )
    return VisionModelConfig(processor, tower, steps)


def rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`model.vision_embed_tokens.*`."""
    projection = VISION + r"img_projection\."
    return (
        *clip_rules(config.tower, VISION + r"img_processor\.vision_model\."),
        Rule(VISION + "sub_GN", "projector.steps.1.rows"),
        Rule(VISION + "glb_GN", "projector.steps.2.rows"),
        *plain({projection + "0": "projector.steps.3.linear", projection + "2": "projector.steps.5.linear"}),
        *language_model(VISION + r"wte\..*", r"model\.(layers|embed_tokens|norm)\..*", r"lm_head\..*"),
    )


def rows(config: VisionModelConfig, plan: ImagePlan) -> np.ndarray:
    """The tiles as one picture, line by line, then the whole picture, line by line."""
    return _rows(config.processor, plan)


def _rows(processor: ImageProcessor, plan: ImagePlan) -> np.ndarray:
    high, wide = processor.tokens(plan)
    whole = np.arange(high * wide).reshape(high, wide)
    tiles = np.arange(high * wide, plan.views * high * wide).reshape(plan.rows, plan.columns, high, wide)
    picture = tiles.swapaxes(1, 2).reshape(plan.rows * high, plan.columns * wide)
    return np.concatenate([_lines(picture), [SEPARATOR], _lines(whole)]).astype(np.int32)


def _lines(picture: np.ndarray) -> np.ndarray:
    return np.pad(picture, ((0, 0), (0, 1)), constant_values=NEWLINE).reshape(-1)


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    return "<|image|>" * len(_rows(processor, plan))


PLACEHOLDER = Placeholder("<|image_{number}|>", "<|image|>", expand, "<|image_{number}|>\n")
PHI3_V = VisionFamily(phi3_v_config, rules, PLACEHOLDER, rows)
