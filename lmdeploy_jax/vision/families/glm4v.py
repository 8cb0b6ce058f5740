"""GLM-4.1V: positions of a table beside rotation, patches merged by a convolution, a gated projector."""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.vision.config import (
    ActivationConfig,
    GatedConfig,
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
    LAYER,
    VisionFamily,
    gated_rule,
    language_model,
    number_of_heads,
    number_of_layers,
    plain,
    side,
    tower_rules,
)
from lmdeploy_jax.vision.families.smart import count, patch_shape, smart_processor
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import CLIP_MEAN, CLIP_STD, ImageProcessor
from lmdeploy_jax.vision.resize import ImagePlan

PIXELS = (112 * 112, 28 * 28 * 15000)


def glm4v_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`Glm4vConfig`. The image processor counts a still image as two frames."""
    vision = fields.within("vision_config")
    processor = smart_processor(
        vision, files, patch=14, pixels=PIXELS, normal=(CLIP_MEAN, CLIP_STD), frames=2, enlarges=True
    )
    width, grid = vision.size("hidden_size", 1536), side(vision, "image_size", 336) // processor.patch
    inner, bias = vision.size("intermediate_size", 13696), vision.flag("attention_bias", False)
    activation = vision.require("hidden_act", ACTIVATIONS, "silu")
    tower = TowerConfig(
        layers=number_of_layers(vision, "depth", 24),
        width=width,
        heads=number_of_heads(vision, width, "num_heads", 12, unit=4),
        mlp_width=vision.size("out_hidden_size", 4096),
        patch_shape=patch_shape(vision, processor),
        activation=activation,
        norm="rms",
        norm_eps=vision.positive("rms_norm_eps", 1e-5),
        gated=True,
        qkv_bias=bias,
        out_bias=False,
        mlp_bias=False,
        positions=PositionTable(grid, (grid**2, width)),
        rotary=RotaryConfig(),
        patch_norm=True,
        post_norm=True,
    )
    out = vision.size("out_hidden_size", 4096)
    vision.finish()
    steps: tuple[Step, ...] = (
        MergeConfig(processor.merge**2, channels_first=True),
        LinearConfig((width, processor.merge, processor.merge), out),
        LinearConfig((out,), out, bias=False),
        NormConfig(out, eps=1e-5),
        ActivationConfig("gelu"),
        GatedConfig(out, inner, out, activation),
    )
    return VisionModelConfig(processor, tower, steps)


def rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`model.visual.*`."""
    visual = r"model\.visual\."
    blocks, merger = visual + r"blocks\.", visual + r"merger\."
    parts = {"norm1": "attention_norm", "norm2": "mlp_norm", r"mlp\.down_proj": "mlp.down"}
    return (
        *tower_rules(config.tower, blocks, parts, qkv=r"attn\.qkv", out=r"attn\.proj", fused=True),
        gated_rule(blocks + r"(\d+)\.mlp\.", LAYER + r"mlp.gate_up.\3", r"\2"),
        *plain(
            {visual + r"patch_embed\.proj": "tower.patch", visual + "post_conv_layernorm": "tower.patch_norm"}
        ),
        Rule(visual + r"embeddings\.position_embedding\.weight", "tower.positions"),
        *plain(
            {visual + "post_layernorm": "tower.post_norm", visual + "downsample": "projector.steps.1.linear"}
        ),
        *plain(
            {
                merger + "proj": "projector.steps.2.linear",
                merger + "post_projection_norm": "projector.steps.3",
            }
        ),
        gated_rule(merger, r"projector.steps.5.gate_up.\2", r"\1"),
        *plain({merger + "down_proj": "projector.steps.5.down"}),
        *language_model(r"model\.language_model\..*", r"lm_head\..*"),
    )


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    """The delimiters around it are the template's."""
    return "<|image|>" * count(processor, plan)


PLACEHOLDER = Placeholder("<|image|>", "<|image|>", expand, "<|begin_of_image|><|image|><|end_of_image|>")
GLM4V = VisionFamily(glm4v_config, rules, PLACEHOLDER, mrope=True)
