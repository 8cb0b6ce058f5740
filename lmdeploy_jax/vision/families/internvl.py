"""InternVL 2, 2.5, 3 and 3.5: as published (`InternVLChatModel`) and as HuggingFace has it (`...-hf`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.vision.config import (
    ActivationConfig,
    LinearConfig,
    MergeConfig,
    NormConfig,
    NormKind,
    PositionTable,
    Step,
    TowerConfig,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    LAYER,
    VisionFamily,
    check_blocks,
    language_model,
    layers_run,
    normalisation,
    number_of_heads,
    number_of_layers,
    plain,
    resample,
    shuffled_block,
    side,
    tower_rules,
)
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor
from lmdeploy_jax.vision.resize import FixedSize, GridRatio, ImagePlan, ResizeRule

NORMS: dict[str, NormKind] = {"layer_norm": "layer", "rms_norm": "rms"}
UNTRAINED = (
    "drop_path_rate", "dropout", "initializer_factor", "use_flash_attn", "layer_scale_init_value",
    "hidden_dropout_prob", "projection_dropout", "use_mask_token",
)  # fmt: skip


def published_config(fields: Fields, _: Fields) -> VisionModelConfig:
    """`InternVLChatConfig`. The image processor's file of these checkpoints is CLIP's, and not what is
    used.
    """
    vision = fields.within("vision_config")
    image = fields.size("force_image_size", side(vision, "image_size", 448))
    patch = side(vision, "patch_size", 14)
    rule: ResizeRule = FixedSize(image)
    if fields.flag("dynamic_image_size", False):
        least, most = fields.size("min_dynamic_patch", 1), fields.size("max_dynamic_patch", 6, most=4096)
        rule = GridRatio(image, least, most, fields.flag("use_thumbnail", False))
    if fields.flag("pad2square", False):
        raise fields.unsupported("pad2square", True, "false")
    processor = ImageProcessor(
        rule,
        patch,
        shuffled_block(fields, "downsample_ratio"),
        columns_first=fields.require("ps_version", {"v1": True, "v2": False}, "v1"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    names = {"qkv_bias": "qkv_bias", "qk_norm": "qk_normalization"}
    tower = _tower(vision, names, fields, "select_layer", image)
    return VisionModelConfig(processor, tower, _projector(fields, tower, "llm_config", "gelu"))


def hf_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`InternVLConfig`."""
    vision = fields.within("vision_config")
    image, patch = side(files, "size", 448), side(vision, "patch_size", 14)
    most = files.size("max_patches", 12, most=4096)
    rule = GridRatio(image, files.size("min_patches", 1), most, True, resample(files, "bicubic"))
    mean, std = normalisation(files, IMAGENET_MEAN, IMAGENET_STD)
    processor = ImageProcessor(rule, patch, shuffled_block(fields, "downsample_ratio"), mean=mean, std=std)
    fields.require("vision_feature_select_strategy", {"default": True}, "default")
    names = {"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm"}
    tower = _tower(vision, names, fields, "vision_feature_layer", image)
    activation = fields.require("projector_hidden_act", ACTIVATIONS, "gelu")
    return VisionModelConfig(processor, tower, _projector(fields, tower, "text_config", activation))


def _tower(vision: Fields, names: dict[str, str], outer: Fields, layer: str, image: int) -> TowerConfig:
    """`names`: how the layout calls two features; `layer`: how it calls the layer that features come from."""
    width, patch = vision.size("hidden_size", 1024), side(vision, "patch_size", 14)
    check_blocks(outer, "downsample_ratio", shuffled_block(outer, "downsample_ratio"), image // patch)
    trained, layers = side(vision, "image_size", 448) // patch, number_of_layers(vision, default=24)
    for name in UNTRAINED:
        vision.get(name)
    qk_norm = vision.flag(names["qk_norm"], False)
    features: dict[str, Any] = {
        "layers": layers_run(outer, layer, layers, -1),
        "width": width,
        "heads": number_of_heads(vision, width),
        "mlp_width": vision.size("intermediate_size", 4096),
        "patch_shape": (vision.size("num_channels", 3), patch, patch),
        "activation": vision.require("hidden_act", ACTIVATIONS, "gelu"),
        "norm": vision.require("norm_type", NORMS, "layer_norm"),
        "norm_eps": vision.positive("layer_norm_eps", 1e-6),
        "qkv_bias": vision.flag(names["qkv_bias"], False),
    }
    features["post_norm"] = not vision.flag("use_mean_pooling", True) and features["layers"] == layers
    if not vision.flag("use_absolute_position_embeddings", True):
        raise vision.unsupported("use_absolute_position_embeddings", False, "true")
    vision.finish()
    table = PositionTable(trained, (1, trained**2 + 1, width))
    return TowerConfig(
        grid=image // patch, class_token=True, positions=table, layer_scale=True, qk_norm=qk_norm, **features
    )


def _projector(fields: Fields, tower: TowerConfig, text: str, activation: Any) -> tuple[Step, ...]:
    count, out = shuffled_block(fields, "downsample_ratio") ** 2, fields.within(text).size("hidden_size")
    width = count * tower.width
    return (
        MergeConfig(count),
        NormConfig(width, eps=1e-5),
        LinearConfig((width,), out),
        ActivationConfig(activation),
        LinearConfig((out,), out),
    )


def published_rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`vision_model.*` and `mlp1.*`."""
    layer = r"vision_model\.encoder\.layers\."
    parts = {
        "norm1": "attention_norm", "norm2": "mlp_norm", r"mlp\.fc1": "mlp.up", r"mlp\.fc2": "mlp.down",
        r"attn\.q_norm": "attention.q_norm", r"attn\.k_norm": "attention.k_norm",
    }  # fmt: skip
    return (
        *tower_rules(config.tower, layer, parts, qkv=r"attn\.qkv", out=r"attn\.proj", fused=True),
        Rule(layer + r"(\d+)\.ls1", LAYER + "attention_scale"),
        Rule(layer + r"(\d+)\.ls2", LAYER + "mlp_scale"),
        *_embeddings(r"vision_model\.embeddings\.", "class_embedding", "position_embedding"),
        *plain({r"vision_model\.embeddings\.patch_embedding": "tower.patch"}),
        *plain({r"mlp1\.0": "projector.steps.1", r"mlp1\.1": "projector.steps.2.linear"}),
        *plain({r"mlp1\.3": "projector.steps.4.linear"}),
        *language_model(r"language_model\..*"),
    )


def hf_rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`vision_tower.*` and `multi_modal_projector.*`."""
    layer, projector = r"vision_tower\.encoder\.layer\.", r"multi_modal_projector\."
    parts = {
        "layernorm_before": "attention_norm", "layernorm_after": "mlp_norm",
        r"mlp\.fc1": "mlp.up", r"mlp\.fc2": "mlp.down",
        r"attention\.q_norm": "attention.q_norm", r"attention\.k_norm": "attention.k_norm",
    }  # fmt: skip
    qkv, out = r"attention\.(q|k|v)_proj", r"attention\.projection_layer"
    return (
        *tower_rules(config.tower, layer, parts, qkv=qkv, out=out, fused=False),
        Rule(layer + r"(\d+)\.lambda_1", LAYER + "attention_scale"),
        Rule(layer + r"(\d+)\.lambda_2", LAYER + "mlp_scale"),
        *_embeddings(r"vision_tower\.embeddings\.", "cls_token", "position_embeddings"),
        Rule(r"vision_tower\.embeddings\.mask_token", None),
        *plain({r"vision_tower\.embeddings\.patch_embeddings\.projection": "tower.patch"}),
        *plain({r"vision_tower\.layernorm": "tower.post_norm"}),
        *plain(
            {
                projector + "layer_norm": "projector.steps.1",
                projector + "linear_1": "projector.steps.2.linear",
            }
        ),
        *plain({projector + "linear_2": "projector.steps.4.linear"}),
        *language_model(r"language_model\..*", r"lm_head\..*"),
    )


def _embeddings(prefix: str, class_token: str, positions: str) -> tuple[Rule, ...]:
    return (
        Rule(prefix + class_token, "tower.class_token"),
        Rule(prefix + positions, "tower.positions"),
    )


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    """Every view's tokens in one row between the two ends."""
    rows, columns = processor.tokens(plan)
    return f"<img>{'<IMG_CONTEXT>' * (plan.views * rows * columns)}</img>"


PLACEHOLDER = Placeholder("<IMG_CONTEXT>", "<IMG_CONTEXT>", expand, "<IMG_CONTEXT>\n")
PUBLISHED = VisionFamily(published_config, published_rules, PLACEHOLDER)
HF = VisionFamily(hf_config, hf_rules, PLACEHOLDER)
