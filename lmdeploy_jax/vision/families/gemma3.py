"""Gemma 3 from 4B on: SigLIP, pooled to a fixed number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.vision.config import (
    LinearConfig,
    NormConfig,
    PoolConfig,
    PositionTable,
    Step,
    TowerConfig,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    VisionFamily,
    language_model,
    normalisation,
    number_of_heads,
    number_of_layers,
    plain,
    resample,
    side,
    tower_rules,
)
from lmdeploy_jax.vision.families.clip import OUT, PARTS, QKV
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import HALF, ImageProcessor
from lmdeploy_jax.vision.resize import FixedSize, ImagePlan, PanAndScan, ResizeRule


def gemma3_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`Gemma3Config`."""
    vision = fields.within("vision_config")
    patch = side(vision, "patch_size", 14)
    grid = side(vision, "image_size", 896) // patch
    tokens = fields.size("mm_tokens_per_image", 256)
    pool = grid // math.isqrt(tokens)
    if math.isqrt(tokens) ** 2 != tokens or not pool or grid % pool:
        raise fields.unsupported("mm_tokens_per_image", tokens, f"the square of a divisor of {grid}")
    mean, std = normalisation(files, HALF, HALF)
    processor = ImageProcessor(_rule(files, grid * patch), patch, pool, mean=mean, std=std)
    tower = _tower(vision, grid, patch)
    out = fields.within("text_config").size("hidden_size", 2304)
    steps: tuple[Step, ...] = (
        PoolConfig(pool**2),
        NormConfig(tower.width, "rms", tower.norm_eps, offset=1.0),
        LinearConfig((tower.width,), out, bias=False, transposed=True),
    )
    return VisionModelConfig(processor, tower, steps)


def _rule(files: Fields, image: int) -> ResizeRule:
    given = side(files, "size", image)
    if given != image:
        raise files.unsupported("size", given, f"{image}, as the tower has it")
    chosen = resample(files, "bilinear")
    if not files.flag("do_pan_and_scan", False):
        return FixedSize(image, chosen)
    return PanAndScan(
        image,
        files.size("pan_and_scan_min_crop_size", 256),
        files.size("pan_and_scan_max_num_crops", 4),
        files.positive("pan_and_scan_min_ratio_to_activate", 1.2),
        chosen,
    )


def _tower(vision: Fields, grid: int, patch: int) -> TowerConfig:
    """`SiglipVisionConfig`."""
    width = vision.size("hidden_size", 1152)
    vision.get("vision_use_head")  # of the pooled picture, which nobody reads
    tower = TowerConfig(
        layers=number_of_layers(vision, default=27),
        width=width,
        heads=number_of_heads(vision, width),
        mlp_width=vision.size("intermediate_size", 4304),
        patch_shape=(vision.size("num_channels", 3), patch, patch),
        activation=vision.require("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        norm="layer",
        norm_eps=vision.positive("layer_norm_eps", 1e-6),
        grid=grid,
        positions=PositionTable(grid, (grid**2, width)),
        post_norm=True,
    )
    vision.finish()
    return tower


def rules(config: VisionModelConfig, names: Sequence[str]) -> tuple[Rule, ...]:
    """`vision_tower.*`, in old files with `vision_model.` behind it, and `multi_modal_projector.*`."""
    old = any("vision_tower.vision_model." in name for name in names)
    tower, projector = r"vision_tower\." + (r"vision_model\." if old else ""), r"multi_modal_projector\."
    return (
        *tower_rules(config.tower, tower + r"encoder\.layers\.", PARTS, qkv=QKV, out=OUT, fused=False),
        Rule(tower + r"embeddings\.position_embedding\.weight", "tower.positions"),
        Rule(tower + r"embeddings\.position_ids", None),
        Rule(tower + r"head\..*", None),
        *plain(
            {
                tower + r"embeddings\.patch_embedding": "tower.patch",
                tower + "post_layernorm": "tower.post_norm",
            }
        ),
        Rule(projector + r"mm_soft_emb_norm\.weight", "projector.steps.1.weight"),
        Rule(projector + "mm_input_projection_weight", "projector.steps.2.weight"),
        *language_model(r"language_model\..*", r"lm_head\..*"),
    )


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    """Crops of a long picture are named in words."""
    rows, columns = processor.tokens(plan)
    view = f"\n\n<start_of_image>{'<image_soft_token>' * (rows * columns)}<end_of_image>\n\n"
    if plan.views == 1:
        return view
    crops = " ".join([view] * (plan.views - 1))
    return f"Here is the original image {view} and here are some crops to help you see better {crops}"


PLACEHOLDER = Placeholder("<start_of_image>", "<image_soft_token>", expand, "<start_of_image>")
GEMMA3 = VisionFamily(gemma3_config, rules, PLACEHOLDER, bidirectional=True)
