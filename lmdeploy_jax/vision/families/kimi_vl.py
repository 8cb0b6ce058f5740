"""Kimi-VL: MoonViT, whose learned positions are spread over any grid, beside rotation. Kimi K2.5: the same of
one frame, by other names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

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
# transformers saves them a place further down.
PATCHES = (r"vision_tower\.patch_embed\.", ENCODER + r"patch_embed\.")
K25_UNUSED = ("init_pos_emb_time", "init_pos_emb_type", "init_pos_emb_interpolation_mode", "merge_type",
              "mm_hidden_size", "text_hidden_size", "mm_projector_type", "video_attn_type")  # fmt: skip


def kimi_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`KimiVLConfig`."""
    vision = fields.within("vision_config")
    patch = side(vision, "patch_size", 14)
    if not files.flag("pad_input", True):
        raise files.unsupported("pad_input", False, "true")
    most = files.size("in_token_limit", 4096)
    return _model(fields, vision, files, patch, most, 512, EPS, width=2048)


def kimi_k25_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """The published `KimiK25Config`, and the one that transformers saves."""
    raw = fields.table("vision_config")
    vision = Fields({_name(name): value for name, value in raw.items()}, f"{fields.where}: vision_config")
    eps = vision.positive("projector_ln_eps", fields.positive("projection_layer_norm_eps", EPS))
    if vision.get("projector_hidden_act", "gelu") != "gelu":
        raise vision.unsupported("projector_hidden_act", vision.get("projector_hidden_act"), "gelu")
    for name in K25_UNUSED:
        vision.get(name)
    own = files.within("media_proc_cfg")
    patch = side(vision, "patch_size", 14)
    most = own.size("in_patch_limit", files.size("max_patches", 16384))
    edge = own.size("patch_limit_on_one_side", files.within("size").size("max_height", 512))
    settings = own if own.raw else files
    return _model(fields, vision, settings, patch, most, edge, eps, width=7168)


def _name(published: str) -> str:
    """Kimi K2.5's name of a field, as Kimi-VL has it."""
    published = published.removeprefix("vt_")
    return f"init_{published}" if published.startswith("pos_emb_") else published


def _model(
    fields: Fields,
    vision: Fields,
    files: Fields,
    patch: int,
    most: int,
    edge: int,
    eps: float,
    *,
    width: int,
) -> VisionModelConfig:
    """most: patches of an image, edge: of one side; eps: of the projector's norm; width: of the language
    model by default.
    """
    merge = side(vision, "merge_kernel_size", 2)
    rule = NaViT(patch, patch * merge, most, edge, resample=resample(files, "bicubic"))
    mean, std = normalisation(files, HALF, HALF)
    processor = ImageProcessor(rule, patch, merge, mean=mean, std=std)
    tower = _tower(vision, patch)
    out, merged = fields.within("text_config").size("hidden_size", width), merge**2 * tower.width
    steps: tuple[Step, ...] = (
        NormConfig(tower.width, eps=eps),
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


PROJECTOR = (r"multi_modal_projector\.", "linear_1", "linear_2")
K25_PROJECTOR = (r"mm_projector\.", r"proj\.0", r"proj\.2")


def rules(
    config: VisionModelConfig, _: Sequence[str], names: tuple[str, str, str] = PROJECTOR
) -> tuple[Rule, ...]:
    """`vision_tower.*` and the projector's `names`: where it is, and its two products."""
    (projector, first, second), blocks = names, ENCODER + r"blocks\."
    parts = {"norm0": "attention_norm", "norm1": "mlp_norm", r"mlp\.fc0": "mlp.up", r"mlp\.fc1": "mlp.down"}
    layout = PermutedHeads(_half_order(config.tower.head_dim))
    return (
        *tower_rules(config.tower, blocks, parts, qkv="wqkv", out="wo", fused=True, layout=layout),
        *plain({patches + "proj": "tower.patch" for patches in PATCHES}),
        *(Rule(patches + r"pos_emb\.weight", "tower.positions") for patches in PATCHES),
        *plain({ENCODER + "final_layernorm": "tower.post_norm"}),
        *plain({projector + "pre_norm": "projector.steps.0", projector + first: "projector.steps.2.linear"}),
        *plain({projector + second: "projector.steps.4.linear"}),
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
K25_PLACEHOLDER = replace(PLACEHOLDER, item="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>")
KIMI_K25 = VisionFamily(kimi_k25_config, partial(rules, names=K25_PROJECTOR), K25_PLACEHOLDER)
