"""Kimi-VL: MoonViT, whose learned positions are spread over any grid, beside rotation."""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import PermutedHeads
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
from lmdeploy_jax.vision.families.smart import count
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import HALF, ImageProcessor
from lmdeploy_jax.vision.resize import ImagePlan, NaViT

EPS = 1e-5
ENCODER = r"vision_tower\.encoder\."


def kimi_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`KimiVLConfig`."""
    vision = fields.within("vision_config")
    patch, merge = side(vision, "patch_size", 14), side(vision, "merge_kernel_size", 2)
    if not files.flag("pad_input", True):
        raise files.unsupported("pad_input", False, "true")
    rule = NaViT(
        patch, patch * merge, files.size("in_token_limit", 4096), resample=resample(files, "bicubic")
    )
    mean, std = normalisation(files, HALF, HALF)
    processor = ImageProcessor(rule, patch, merge, mean=mean, std=std)
    tower = _tower(vision, patch)
    out, merged = fields.within("text_config").size("hidden_size", 2048), merge**2 * tower.width
    steps: tuple[Step, ...] = (
        NormConfig(tower.width, eps=EPS),
        MergeConfig(merge**2),
        LinearConfig((merged,), merged),
        ActivationConfig("gelu"),
        LinearConfig((merged,), out),
    )
    return VisionModelConfig(processor, tower, steps)


def _tower(vision: Fields, patch: int) -> TowerConfig:
    """`MoonViTConfig`."""
    width, table = vision.size("hidden_size", 1152), vision.size("init_pos_emb_height", 64)
    if (other := vision.size("init_pos_emb_width", table)) != table:
        raise vision.unsupported("init_pos_emb_width", other, f"init_pos_emb_height={table}")
    tower = TowerConfig(
        layers=number_of_layers(vision, default=27),
        width=width,
        heads=number_of_heads(vision, width, unit=4),
        mlp_width=vision.size("intermediate_size", 4304),
        patch_shape=(3, patch, patch),
        activation="gelu_tanh",
        norm="layer",
        norm_eps=EPS,
        positions=PositionTable(table, (table, table, width)),
        rotary=RotaryConfig(),
        post_norm=True,
    )
    vision.finish()
    return tower


def rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`vision_tower.*` and `multi_modal_projector.*`."""
    projector, blocks = r"multi_modal_projector\.", ENCODER + r"blocks\."
    parts = {"norm0": "attention_norm", "norm1": "mlp_norm", r"mlp\.fc0": "mlp.up", r"mlp\.fc1": "mlp.down"}
    layout = PermutedHeads(_half_order(config.tower.head_dim))
    return (
        *tower_rules(config.tower, blocks, parts, qkv="wqkv", out="wo", fused=True, layout=layout),
        *plain(
            {
                r"vision_tower\.patch_embed\.proj": "tower.patch",
                ENCODER + "final_layernorm": "tower.post_norm",
            }
        ),
        Rule(r"vision_tower\.patch_embed\.pos_emb\.weight", "tower.positions"),
        *plain(
            {projector + "pre_norm": "projector.steps.0", projector + "linear_1": "projector.steps.2.linear"}
        ),
        *plain({projector + "linear_2": "projector.steps.4.linear"}),
        *language_model(r"language_model\..*"),
    )


def _half_order(head_dim: int) -> tuple[int, ...]:
    """The files rotate neighbours as pairs, by columns and rows in turn. Here an element rotates with that
    half a head further on, first by rows, then by columns.
    """
    pairs = [*range(1, head_dim // 2, 2), *range(0, head_dim // 2, 2)]
    return tuple(2 * pair for pair in pairs) + tuple(2 * pair + 1 for pair in pairs)


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    """The delimiters around it are the template's."""
    return "<|media_pad|>" * count(processor, plan)


PLACEHOLDER = Placeholder(
    "<|media_pad|>",
    "<|media_pad|>",
    expand,
    "<|media_start|>image<|media_content|><|media_pad|><|media_end|>",
)
KIMI_VL = VisionFamily(kimi_config, rules, PLACEHOLDER)
