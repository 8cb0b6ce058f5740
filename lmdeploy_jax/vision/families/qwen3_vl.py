"""Qwen3-VL: learned positions beside rotation, and DeepStack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.vision.config import (
    ActivationConfig,
    LinearConfig,
    MergeConfig,
    NormConfig,
    PositionTable,
    RotaryConfig,
    Step,
    TowerConfig,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    VideoFamily,
    VisionFamily,
    language_model,
    layer_numbers,
    number_of_heads,
    number_of_layers,
    plain,
    tower_rules,
)
from lmdeploy_jax.vision.families.qwen2_vl import EPS, PLACEHOLDER, VIDEO
from lmdeploy_jax.vision.families.smart import patch_shape, pixel_bounds, smart_processor
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import HALF, ImageProcessor
from lmdeploy_jax.vision.resize import ImagePlan
from lmdeploy_jax.vision.video import VideoRule

PIXELS = (256 * 256, 4096 * 4096)


def qwen3_config(fields: Fields, files: Fields, deepstack: Sequence[int] = (8, 16, 24)) -> VisionModelConfig:
    """`Qwen3VLConfig`; without `deepstack` by default, `Qwen3_5Config`."""
    vision = fields.within("vision_config")
    processor = smart_processor(vision, files, patch=16, pixels=PIXELS, normal=(HALF, HALF))
    width, entries = vision.size("hidden_size", 1152), vision.size("num_position_embeddings", 2304)
    side = math.isqrt(entries)
    if side**2 != entries:
        raise vision.unsupported("num_position_embeddings", entries, "a square number")
    layers = number_of_layers(vision, "depth", 27)
    tower = TowerConfig(
        layers=layers,
        width=width,
        heads=number_of_heads(vision, width, "num_heads", unit=4),
        mlp_width=vision.size("intermediate_size", 4304),
        patch_shape=patch_shape(vision, processor),
        activation=vision.require("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        norm="layer",
        norm_eps=EPS,
        positions=PositionTable(side, (entries, width), "bilinear", align_corners=True),
        rotary=RotaryConfig(),
        deepstack=layer_numbers(vision, "deepstack_visual_indexes", list(deepstack), layers),
    )
    out = vision.size("out_hidden_size", 3584)
    vision.finish()
    merged = processor.merge**2 * width
    first = NormConfig(width, eps=EPS), MergeConfig(processor.merge**2)
    later = MergeConfig(processor.merge**2), NormConfig(merged, eps=EPS)
    rest = LinearConfig((merged,), merged), ActivationConfig("gelu"), LinearConfig((merged,), out)
    main: tuple[Step, ...] = (*first, *rest)
    return VisionModelConfig(processor, tower, main, (*later, *rest))


def rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`model.visual.*`."""
    visual = r"model\.visual\."
    parts = {
        "norm1": "attention_norm", "norm2": "mlp_norm",
        r"mlp\.linear_fc1": "mlp.up", r"mlp\.linear_fc2": "mlp.down",
    }  # fmt: skip
    blocks, deepstack = visual + r"blocks\.", visual + r"deepstack_merger_list\.(\d+)\."
    linear = {"1": "2", "2": "4"}  # the number of a projector's product -> that of its step
    return (
        *tower_rules(config.tower, blocks, parts, qkv=r"attn\.qkv", out=r"attn\.proj", fused=True),
        *plain({visual + r"patch_embed\.proj": "tower.patch", visual + r"merger\.norm": "projector.steps.0"}),
        Rule(visual + r"pos_embed\.weight", "tower.positions"),
        *plain({visual + rf"merger\.linear_fc{i}": f"projector.steps.{n}.linear" for i, n in linear.items()}),
        Rule(deepstack + r"norm\.(weight|bias)", r"deepstack.\1.steps.1.\2"),
        *(
            Rule(deepstack + rf"linear_fc{i}\.(weight|bias)", rf"deepstack.\1.steps.{n}.linear.\2")
            for i, n in linear.items()
        ),
        *language_model(r"model\.language_model\..*", r"lm_head\..*"),
    )


VIDEO_PIXELS = (128 * 32 * 32, 768 * 32 * 32)  # of all frames together


def expand_video(processor: ImageProcessor, plan: ImagePlan) -> str:
    """View by view, each after its time."""
    rows, columns = processor.tokens(plan)
    view = f"<|vision_start|>{'<|video_pad|>' * (rows * columns)}<|vision_end|>"
    return "".join(f"<{seconds:.1f} seconds>{view}" for seconds in plan.times)


def qwen3_video(_: Fields, files: Fields) -> VideoRule:
    """`Qwen3VLVideoProcessor`."""
    return VideoRule(*pixel_bounds(files, VIDEO_PIXELS), dated=True)


VIDEO_PLACEHOLDER = Placeholder(VIDEO, "<|video_pad|>", expand_video, VIDEO, "videos")
_VIDEO = VideoFamily(qwen3_video, VIDEO_PLACEHOLDER)
QWEN3_VL = VisionFamily(qwen3_config, rules, PLACEHOLDER, mrope=True, video=_VIDEO)
QWEN3_5 = VisionFamily(partial(qwen3_config, deepstack=()), rules, PLACEHOLDER, mrope=True, video=_VIDEO)
