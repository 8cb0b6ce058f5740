"""The CLIP tower, of LLaVA and Phi-3.5-vision."""

from __future__ import annotations

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Rows
from lmdeploy_jax.vision.config import PositionTable, TowerConfig
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    number_of_heads,
    number_of_layers,
    plain,
    side,
    tower_rules,
)

PARTS = {
    "layer_norm1": "attention_norm", "layer_norm2": "mlp_norm", r"mlp\.fc1": "mlp.up", r"mlp\.fc2":
    "mlp.down",
}  # fmt: skip
QKV, OUT = r"self_attn\.(q|k|v)_proj", r"self_attn\.out_proj"
UNUSED = ("projection_dim", "vocab_size", "initializer_factor", "torch_dtype")


def clip_tower(vision: Fields, image: int, layers: int) -> TowerConfig:
    """`CLIPVisionConfig`, of which `layers` layers run on views of `image` pixels a side."""
    width, patch = vision.size("hidden_size", 1024), side(vision, "patch_size", 14)
    trained = side(vision, "image_size", 336) // patch
    for name in UNUSED:
        vision.get(name)
    tower = TowerConfig(
        layers=layers,
        width=width,
        heads=number_of_heads(vision, width),
        mlp_width=vision.size("intermediate_size", 4 * width),
        patch_shape=(vision.size("num_channels", 3), patch, patch),
        activation=vision.require("hidden_act", ACTIVATIONS, "quick_gelu"),
        norm="layer",
        norm_eps=vision.positive("layer_norm_eps", 1e-5),
        grid=image // patch,
        patch_bias=False,
        class_token=True,
        positions=PositionTable(trained, (trained**2 + 1, width)),
        pre_norm=True,
    )
    number_of_layers(vision, default=24)
    vision.finish()
    return tower


def clip_rules(tower: TowerConfig, prefix: str) -> tuple[Rule, ...]:
    """The tensors behind `prefix`; what stands after the last layer is not used."""
    return (
        *tower_rules(tower, prefix + r"encoder\.layers\.", PARTS, qkv=QKV, out=OUT, fused=False),
        Rule(prefix + r"embeddings\.class_embedding", "tower.class_token", "", Rows(3)),
        Rule(prefix + r"embeddings\.position_embedding\.weight", "tower.positions"),
        Rule(prefix + r"embeddings\.position_ids", None),
        *plain(
            {
                prefix + r"embeddings\.patch_embedding": "tower.patch",
                prefix + "pre_layrnorm": "tower.pre_norm",
            }
        ),
        Rule(prefix + r"post_layernorm\..*", None),
    )
