"""Gemma 4's images, as HuggingFace has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Rows, Scalars, Stack
from lmdeploy_jax.vision.config import (
    LinearConfig,
    NormConfig,
    PoolConfig,
    PositionTable,
    RotaryConfig,
    StandardConfig,
    Step,
    TowerConfig,
    VisionModelConfig,
)
from lmdeploy_jax.vision.families.base import (
    ACTIVATIONS,
    LAYER,
    VisionFamily,
    language_model,
    normalisation,
    number_of_heads,
    number_of_layers,
    resample,
    side,
    tower_rules,
)
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.processor import HALF, ImageProcessor
from lmdeploy_jax.vision.resize import ImagePlan, PatchBudget

NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
    r"self_attn\.q_norm": "attention.q_norm",
    r"self_attn\.k_norm": "attention.k_norm",
    r"mlp\.down_proj\.linear": "mlp.down",
}

BOUNDS = ("input_min", "input_max", "output_min", "output_max")
PRODUCTS = {
    "attention.qkv": ("q", "k", "v"),
    "attention.out": ("o",),
    "mlp.gate_up": ("gate", "up"),
    "mlp.down": ("down",),
}


def gemma4_config(fields: Fields, files: Fields) -> VisionModelConfig:
    """`Gemma4Config`."""
    vision = fields.within("vision_config")
    patch, pool = side(vision, "patch_size", 16), vision.size("pooling_kernel_size", 3)
    for name, own in (("patch_size", patch), ("pooling_kernel_size", pool)):
        if (other := files.size(name, own)) != own:
            raise files.unsupported(name, other, f"the tower's {own}")
    rule = PatchBudget(patch * pool, files.size("max_soft_tokens", 280), resample(files, "bicubic"))
    # Levels become -1...1 in the model's own code.
    normalisation(files, (0.0,) * 3, (1.0,) * 3)
    standard = vision.flag("standardize", False)
    tower = _tower(vision, patch)
    out = fields.within("text_config").size("hidden_size", 2304)
    root = tower.width**0.5
    scaled = (StandardConfig(tower.width, root),) if standard else ()
    eps = tower.norm_eps if standard else tower.norm_eps / tower.width  # of rows `root` times as small
    steps: tuple[Step, ...] = (
        PoolConfig(pool**2),
        *scaled,
        NormConfig(tower.width, "rms", eps, weighted=False),
        LinearConfig((tower.width,), out, bias=False),
    )
    return VisionModelConfig(ImageProcessor(rule, patch, pool, mean=HALF, std=HALF), tower, steps)


def _tower(vision: Fields, patch: int) -> TowerConfig:
    width, rope = vision.size("hidden_size", 768), vision.within("rope_parameters")
    heads = number_of_heads(vision, width, default=12, unit=4)
    for name, expected in (("num_key_value_heads", heads), ("head_dim", width // heads)):
        if (given := vision.size(name, expected)) != expected:
            raise vision.unsupported(name, given, f"{expected}")
    if vision.flag("attention_bias", False):
        raise vision.unsupported("attention_bias", True, "false")
    rows = vision.size("position_embedding_size", 10240)
    for name in ("attention_dropout", "max_position_embeddings"):
        vision.get(name)
    rope.require("rope_type", {"axial": True, "default": True}, "axial")
    tower = TowerConfig(
        layers=number_of_layers(vision, default=16),
        width=width,
        heads=heads,
        mlp_width=vision.size("intermediate_size", 3072),
        patch_shape=(3, patch, patch),
        channels_last=True,
        activation=vision.require("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        norm="rms",
        norm_eps=vision.positive("rms_norm_eps", 1e-6),
        gated=True,
        patch_bias=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        positions=PositionTable(rows, (2, rows, width), by_axis=True),
        rotary=RotaryConfig("halves", rope.positive("rope_theta", 100.0)),
        clipped=vision.flag("use_clipped_linears", False),
        head_norms=True,
        post_norms=True,
    )
    vision.finish()
    return tower


def rules(config: VisionModelConfig, _: Sequence[str]) -> tuple[Rule, ...]:
    """`vision_tower.*` and `embed_vision.*`."""
    tower, layers = r"vision_tower\.", r"vision_tower\.encoder\.layers\."
    attention, last = r"self_attn\.", len(config.projector) - 1
    gate_up = Rule(
        layers + r"(\d+)\.mlp\.(gate|up)_proj\.linear\.weight",
        LAYER + "mlp.gate_up.weight",
        r"\2",
        Stack(("gate", "up")),
    )
    return (
        *tower_rules(
            config.tower,
            layers,
            NAMES,
            qkv=attention + r"(q|k|v)_proj\.linear",
            out=attention + r"o_proj\.linear",
            fused=False,
        ),
        gate_up,
        *(_bounds(layers, target, names) for target, names in PRODUCTS.items() if config.tower.clipped),
        Rule(
            tower + r"patch_embedder\.input_proj\.weight", "tower.patch.weight", "", Rows(flat_columns=True)
        ),
        Rule(tower + r"patch_embedder\.position_embedding_table", "tower.positions"),
        Rule(tower + "std_(bias|scale)", r"projector.steps.1.\1"),
        Rule(r"embed_vision\.embedding_projection\.weight", f"projector.steps.{last}.linear.weight"),
        *language_model(r"language_model\..*", r"lm_head\..*", r"(audio_tower|embed_audio)\..*"),
    )


def _bounds(layers: str, target: str, names: Sequence[str]) -> Rule:
    """Those of the products that are side by side in one."""
    parts = tuple(f"{name}.{bound}" for name in names for bound in BOUNDS)
    block = "self_attn" if target.startswith("attention") else "mlp"
    which = rf"{layers}(\d+)\.{block}\.({'|'.join(names)})_proj\.({'|'.join(BOUNDS)})"
    return Rule(which, f"{LAYER}{target}.bounds", r"\2.\3", Scalars(parts))


def expand(processor: ImageProcessor, plan: ImagePlan) -> str:
    rows, columns = processor.tokens(plan)
    return f"<|image>{'<|image|>' * (rows * columns)}<image|>"


PLACEHOLDER = Placeholder("<|image|>", "<|image|>", expand, "<|image|>")
GEMMA4 = VisionFamily(gemma4_config, rules, PLACEHOLDER)
BOTH_WAYS = replace(GEMMA4, bidirectional=True)


def family_of(text: Any) -> VisionFamily:
    """Large ones let an image's tokens see each other in layers with a window."""
    both = isinstance(text, Mapping) and text.get("use_bidirectional_attention") == "vision"
    return BOTH_WAYS if both else GEMMA4
