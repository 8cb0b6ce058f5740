"""Pixtral's tower: in LLaVA's frame (Pixtral-12B) and in Mistral 3's, which merges patches."""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.vision.config import (
    Activation,
    ActivationConfig,
    LinearConfig,
    MergeConfig,
    NormConfig,
    RotaryConfig,
    Step,
    TowerConfig,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    LAYER,
    VisionFamily,
    gated_rule,
    language_model,
    layers_run,
    normalisation,
    number_of_heads,
    number_of_layers,
    plain,
    resample,
    side,
    tower_rules,
)
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import CLIP_MEAN, CLIP_STD, ImageProcessor
from lmdeploy_jax.vision.resize import ImagePlan, LongestEdge

EPS = 1e-5
TOWER = r"vision_tower\."
LAYERS = TOWER + r"transformer\.layers\."
PROJECTOR = r"multi_modal_projector\."


def pixtral_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`LlavaConfig` with Pixtral's tower."""
    fields.require("vision_feature_select_strategy", {"full": True}, "full")
    processor, tower = _processor(fields, files, merge=1, longest=1024), _tower(fields, "gelu")
    return VisionModelConfig(processor, tower, _mlp(fields, tower.width, bias=True, out=5120))


def mistral3_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`Mistral3Config`."""
    merge = fields.size("spatial_merge_size", 2)
    processor, tower = _processor(fields, files, merge, longest=1540), _tower(fields, "gelu")
    eps = fields.within("text_config").positive("rms_norm_eps", 1e-5)
    steps: tuple[Step, ...] = (
        NormConfig(tower.width, "rms", eps),
        MergeConfig(merge**2, channels_first=True),
        LinearConfig((merge**2 * tower.width,), tower.width, bias=False),
        *_mlp(fields, tower.width, bias=False, out=5120),
    )
    return VisionModelConfig(processor, tower, steps)


def _mlp(fields: Fields, width: int, *, bias: bool, out: int) -> tuple[Step, ...]:
    out = fields.within("text_config").size("hidden_size", out)
    bias = fields.flag("multimodal_projector_bias", bias)
    activation = fields.require("projector_hidden_act", ACTIVATIONS, "gelu")
    return LinearConfig((width,), out, bias), ActivationConfig(activation), LinearConfig((out,), out, bias)


def _processor(fields: Fields, files: Fields, merge: int, longest: int) -> ImageProcessor:
    patch = side(fields.within("vision_config"), "patch_size", 16)
    longest = files.within("size").size("longest_edge", longest)
    mean, std = normalisation(files, CLIP_MEAN, CLIP_STD)
    rule = LongestEdge(longest, patch * merge, resample(files, "bicubic"))
    return ImageProcessor(rule, patch, merge, mean=mean, std=std)


def _tower(fields: Fields, activation: Activation) -> TowerConfig:
    """`PixtralVisionConfig`."""
    vision = fields.within("vision_config")
    width, patch = vision.size("hidden_size", 1024), side(vision, "patch_size", 16)
    for name in ("image_size", "vocab_size", "model_type", "head_dim"):
        vision.get(name)
    rope = vision.within("rope_parameters")
    layers = number_of_layers(vision, default=24)
    tower = TowerConfig(
        layers=layers_run(fields, "vision_feature_layer", layers, -1),
        width=width,
        heads=number_of_heads(vision, width, unit=4),
        mlp_width=vision.size("intermediate_size", 4096),
        patch_shape=(vision.size("num_channels", 3), patch, patch),
        activation=vision.require("hidden_act", ACTIVATIONS, activation),
        norm="rms",
        norm_eps=EPS,
        gated=True,
        patch_bias=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        rotary=RotaryConfig("alternating", rope.positive("rope_theta", vision.positive("rope_theta", 1e4))),
        pre_norm=True,
    )
    vision.finish()
    return tower


def rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`vision_tower.*` and `multi_modal_projector.*`."""
    parts = {
        "attention_norm": "attention_norm",
        "ffn_norm": "mlp_norm",
        r"feed_forward\.down_proj": "mlp.down",
    }
    qkv, out = r"attention\.(q|k|v)_proj", r"attention\.o_proj"
    first = len(config.projector) - 3  # the MLP's steps are the last three
    return (
        *tower_rules(config.tower, LAYERS, parts, qkv=qkv, out=out, fused=False),
        gated_rule(LAYERS + r"(\d+)\.feed_forward\.", LAYER + r"mlp.gate_up.\3", r"\2"),
        *plain({TOWER + "patch_conv": "tower.patch", TOWER + "ln_pre": "tower.pre_norm"}),
        Rule(TOWER + r"patch_positional_embedding\..*", None),
        Rule(PROJECTOR + r"norm\.weight", "projector.steps.0.weight"),
        Rule(PROJECTOR + r"patch_merger\.merging_layer\.weight", "projector.steps.2.linear.weight"),
        *plain({PROJECTOR + "linear_1": f"projector.steps.{first}.linear"}),
        *plain({PROJECTOR + "linear_2": f"projector.steps.{first + 2}.linear"}),
        *language_model(r"language_model\..*", r"lm_head\..*"),
    )


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    """Line by line, with a break after each but the last."""
    rows, columns = processor.tokens(plan)
    return "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"


PLACEHOLDER = Placeholder("[IMG]", "[IMG]", expand, "[IMG]")
PIXTRAL = VisionFamily(pixtral_config, rules, PLACEHOLDER)
MISTRAL3 = VisionFamily(mistral3_config, rules, PLACEHOLDER)
