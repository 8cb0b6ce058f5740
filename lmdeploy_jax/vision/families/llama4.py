"""Llama 4's images, as HuggingFace has them."""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import PermutedHeads, Rows
from lmdeploy_jax.vision.config import (
    ActivationConfig,
    LinearConfig,
    MergeConfig,
    PositionTable,
    RotaryConfig,
    Step,
    TowerConfig,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    VisionFamily,
    check_blocks,
    language_model,
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
from lmdeploy_jax.vision.processor import HALF, ImageProcessor
from lmdeploy_jax.vision.resize import MOST_TILES, BestFit, ImagePlan

NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    r"mlp\.fc1": "mlp.up",
    r"mlp\.fc2": "mlp.down",
}
UNTRAINED = ("attention_dropout", "projector_dropout", "norm_eps", "vision_feature_layer")


def llama4_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`Llama4Config`."""
    vision = fields.within("vision_config")
    image, patch = side(vision, "image_size", 448), side(vision, "patch_size", 14)
    if (tile := side(files, "size", image)) != image:
        raise files.unsupported("size", tile, f"the tower's image_size={image}")
    most = files.size("max_patches", 16, most=MOST_TILES)
    rule = BestFit(image, most, resample(files, "bilinear"), files.flag("resize_to_max_canvas", False))
    mean, std = normalisation(files, HALF, HALF)
    block = shuffled_block(vision, "pixel_shuffle_ratio")
    check_blocks(vision, "pixel_shuffle_ratio", block, image // patch)
    vision.require("vision_feature_select_strategy", {"default": True}, "default")
    steps = _projector(vision, block, fields.within("text_config").size("hidden_size", 5120))
    return VisionModelConfig(
        ImageProcessor(rule, patch, block, mean=mean, std=std), _tower(vision, image // patch, patch), steps
    )


def _projector(vision: Fields, block: int, out: int) -> tuple[Step, ...]:
    merged = block**2 * vision.size("hidden_size", 768)
    if (given := vision.size("intermediate_size", 5632)) != merged:
        raise vision.unsupported("intermediate_size", given, f"the {merged} that a block of patches has")
    inner = vision.size("projector_input_dim", 4096)
    for name in ("projector_output_dim", "vision_output_dim"):
        if (width := vision.size(name, inner)) != inner:
            raise vision.unsupported(name, width, f"projector_input_dim={inner}")
    if vision.flag("multi_modal_projector_bias", False):
        raise vision.unsupported("multi_modal_projector_bias", True, "false")
    return (
        MergeConfig(block**2),
        LinearConfig((merged,), inner, bias=False),
        ActivationConfig("gelu"),
        LinearConfig((inner,), inner, bias=False),
        ActivationConfig("gelu"),
        LinearConfig((inner,), out, bias=False),
    )


def _tower(vision: Fields, grid: int, patch: int) -> TowerConfig:
    """Its MLP is as wide as a block of patches, whatever that is of."""
    width, rope = vision.size("hidden_size", 768), vision.within("rope_parameters")
    for name in UNTRAINED:
        vision.get(name)
    tower = TowerConfig(
        layers=number_of_layers(vision, default=34),
        width=width,
        heads=number_of_heads(vision, width, unit=4),
        mlp_width=vision.size("intermediate_size", 5632),
        patch_shape=(vision.size("num_channels", 3), patch, patch),
        activation=vision.require("hidden_act", {"gelu": ACTIVATIONS["gelu"]}, "gelu"),
        norm="layer",
        norm_eps=1e-5,
        grid=grid,
        patch_bias=False,
        class_token=True,
        positions=PositionTable(grid, (grid**2 + 1, width), class_last=True),
        rotary=RotaryConfig(theta=rope.positive("rope_theta", vision.positive("rope_theta", 1e4))),
        pre_norm=True,
        post_norm=True,
    )
    rope.get("rope_type")
    vision.finish()
    return tower


def rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`vision_model.*` and `multi_modal_projector.*`."""
    model, adapter = r"vision_model\.", r"vision_model\.vision_adapter\.mlp\."
    attention, layout = r"self_attn\.", PermutedHeads(_half_order(config.tower.head_dim), split=True)
    return (
        *tower_rules(
            config.tower,
            model + r"model\.layers\.",
            NAMES,
            qkv=attention + "(q|k|v)_proj",
            out=attention + "o_proj",
            fused=False,
            layout=layout,
        ),
        Rule(model + r"patch_embedding\.linear\.weight", "tower.patch.weight", "", Rows(flat_columns=True)),
        Rule(model + "class_embedding", "tower.class_token", "", Rows(3)),
        Rule(model + "positional_embedding_vlm", "tower.positions"),
        *plain({model + "layernorm_pre": "tower.pre_norm", model + "layernorm_post": "tower.post_norm"}),
        *plain({adapter + "fc1": "projector.steps.1.linear", adapter + "fc2": "projector.steps.3.linear"}),
        *plain({r"multi_modal_projector\.linear_1": "projector.steps.5.linear"}),
        *language_model(r"language_model\..*"),
    )


def _half_order(head_dim: int) -> tuple[int, ...]:
    """The files rotate neighbours as pairs, first by columns, then by rows. Here an element rotates with that
    half a head further on, first by rows.
    """
    pairs = [*range(head_dim // 4, head_dim // 2), *range(head_dim // 4)]
    return tuple(2 * pair for pair in pairs) + tuple(2 * pair + 1 for pair in pairs)


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    """The tiles, line by line, and the whole picture last."""
    rows, columns = processor.tokens(plan)
    tile, tiles = "<|patch|>" * (rows * columns), ""
    if plan.views > 1:
        tiles = ("<|tile_x_separator|>".join([tile] * plan.columns) + "<|tile_y_separator|>") * plan.rows
    return f"<|image_start|>{tiles}<|image|>{tile}<|image_end|>"


PLACEHOLDER = Placeholder("<|image|>", "<|patch|>", expand, "<|image|>")
LLAMA4 = VisionFamily(llama4_config, rules, PLACEHOLDER)
