"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.vision.config import (
    ActivationConfig,
    LinearConfig,
    MergeConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    Step,
    TowerConfig,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    LAYER,
    VideoFamily,
    VisionFamily,
    gated_rule,
    language_model,
    layer_numbers,
    number_of_heads,
    number_of_layers,
    plain,
    tower_rules,
)
from lmdeploy_jax.vision.families.smart import count, patch_shape, pixel_bounds, smart_processor
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import CLIP_MEAN, CLIP_STD, ImageProcessor
from lmdeploy_jax.vision.resize import ImagePlan
from lmdeploy_jax.vision.video import VideoRule

PIXELS = (56 * 56, 28 * 28 * 1280)
BLOCKS = r"visual\.blocks\."
EPS = 1e-6


def qwen2_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`Qwen2VLConfig`. Its vision part calls the tower's width `embed_dim`, the language model's
    `hidden_size`.
    """
    vision = fields.within("vision_config")
    processor = _processor(vision, files)
    width = vision.size("embed_dim", 1280)
    tower = TowerConfig(
        layers=number_of_layers(vision, "depth", 32),
        width=width,
        heads=number_of_heads(vision, width, "num_heads", unit=4),
        mlp_width=width * vision.size("mlp_ratio", 4),
        patch_shape=patch_shape(vision, processor),
        activation=vision.require("hidden_act", ACTIVATIONS, "quick_gelu"),
        norm="layer",
        norm_eps=EPS,
        patch_bias=False,
        rotary=RotaryConfig(),
    )
    out = vision.size("hidden_size", 3584)
    _finish(vision)
    return VisionModelConfig(processor, tower, _projector(width, processor.merge, "layer", out))


def qwen2_5_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`Qwen2_5_VLConfig`: windows in most layers."""
    vision = fields.within("vision_config")
    processor = _processor(vision, files)
    width, layers = vision.size("hidden_size", 1280), number_of_layers(vision, "depth", 32)
    window = vision.size("window_size", 112) // processor.patch // processor.merge * processor.merge
    if not window:
        raise vision.unsupported("window_size", window, "at least a block of patches")
    tower = TowerConfig(
        layers=layers,
        width=width,
        heads=number_of_heads(vision, width, "num_heads", unit=4),
        mlp_width=vision.size("intermediate_size", 3420),
        patch_shape=patch_shape(vision, processor),
        activation=vision.require("hidden_act", ACTIVATIONS, "silu"),
        norm="rms",
        norm_eps=EPS,
        gated=True,
        patch_bias=False,
        rotary=RotaryConfig(),
        window=window**2,
        full_layers=layer_numbers(vision, "fullatt_block_indexes", [7, 15, 23, 31], layers),
    )
    out = vision.size("out_hidden_size", 3584)
    vision.get("tokens_per_second")  # see `qwen2_5_video`
    _finish(vision)
    return VisionModelConfig(processor, tower, _projector(width, processor.merge, "rms", out))


def _processor(vision: Fields, files: Fields) -> ImageProcessor:
    return smart_processor(vision, files, patch=14, pixels=PIXELS, normal=(CLIP_MEAN, CLIP_STD))


def _finish(vision: Fields) -> None:
    for name in ("in_chans", "spatial_patch_size"):  # said twice in released files
        vision.get(name)
    vision.finish()


def _projector(width: int, merge: int, norm: NormKind, out: int) -> tuple[Step, ...]:
    merged = merge**2 * width
    return (
        NormConfig(width, norm, EPS),
        MergeConfig(merge**2),
        LinearConfig((merged,), merged),
        ActivationConfig("gelu"),
        LinearConfig((merged,), out),
    )


def rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`visual.*`."""
    parts = {"norm1": "attention_norm", "norm2": "mlp_norm", r"mlp\.fc1": "mlp.up", r"mlp\.fc2": "mlp.down"}
    if config.tower.gated:
        parts = {"norm1": "attention_norm", "norm2": "mlp_norm", r"mlp\.down_proj": "mlp.down"}
    return (
        *tower_rules(config.tower, BLOCKS, parts, qkv=r"attn\.qkv", out=r"attn\.proj", fused=True),
        gated_rule(BLOCKS + r"(\d+)\.mlp\.", LAYER + r"mlp.gate_up.\3", r"\2"),
        *plain({r"visual\.patch_embed\.proj": "tower.patch", r"visual\.merger\.ln_q": "projector.steps.0"}),
        *plain({r"visual\.merger\.mlp\.0": "projector.steps.2.linear"}),
        *plain({r"visual\.merger\.mlp\.2": "projector.steps.4.linear"}),
        *language_model(r"model\.(language_model\.)?(layers|embed_tokens|norm)\..*", r"lm_head\..*"),
    )


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    """The delimiters around it are the template's."""
    return "<|image_pad|>" * count(processor, plan)


PLACEHOLDER = Placeholder(
    "<|image_pad|>", "<|image_pad|>", expand, "<|vision_start|><|image_pad|><|vision_end|>"
)
VIDEO_PIXELS = (128 * 28 * 28, 768 * 28 * 28)  # of a frame


def expand_video(processor: ImageProcessor, plan: ImagePlan) -> str:
    return "<|video_pad|>" * count(processor, plan)


def qwen2_video(_: Fields, files: Fields) -> VideoRule:
    """`Qwen2VLVideoProcessor`."""
    return VideoRule(*pixel_bounds(files, VIDEO_PIXELS))


def qwen2_5_video(fields: Fields, files: Fields) -> VideoRule:
    """The same, views standing as far apart as they do in time."""
    speed = fields.within("vision_config").positive("tokens_per_second", 4)
    return replace(qwen2_video(fields, files), tokens_per_second=speed)


VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEO_PLACEHOLDER = Placeholder("<|video_pad|>", "<|video_pad|>", expand_video, VIDEO, "videos")
QWEN2_VL = VisionFamily(
    qwen2_config, rules, PLACEHOLDER, mrope=True, video=VideoFamily(qwen2_video, VIDEO_PLACEHOLDER)
)
QWEN2_5_VL = VisionFamily(
    qwen2_5_config, rules, PLACEHOLDER, mrope=True, video=VideoFamily(qwen2_5_video, VIDEO_PLACEHOLDER)
)
