"""Gemma 1, 2 and 3 (text): norms with weight 1 + w, scaled embeddings, GELU.

Gemma 2 adds norms behind each block, windows on some layers and soft caps; Gemma 3 has no soft caps but norms
on q and k, and a RoPE of its own for the layers with windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.converters.families.common import (
    ACTIVATION_NAMES,
    FULL,
    NONE,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.rope import read_rope, rope_from
from lmdeploy_jax.converters.families.tables import hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.models.config import DecoderConfig, RopeConfig

NORMS: Mapping[str, str] = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
TANH_GELU = ACTIVATION_NAMES | {"gelu": "gelu_tanh"}  # old Gemma configs say gelu and mean the approximation


def gemma_config(fields: Fields) -> DecoderConfig:
    """HF `GemmaConfig`."""
    head_dim = head_size(fields, 256)
    activation = fields.require("hidden_act", TANH_GELU, "gelu_pytorch_tanh")
    fields.get("hidden_activation")  # older configs say it again; transformers reads the field above
    rope = read_rope(fields, head_dim)
    return decoder_config(fields, head_dim=head_dim, rope=rope, **_shared(fields, activation, {}))


def gemma2_config(fields: Fields) -> DecoderConfig:
    """HF `Gemma2Config`: every other layer has a window, the first one too."""
    head_dim = head_size(fields, 256)
    cap = fields.optional_number("attn_logit_softcapping", 50.0)
    return _double_norm(fields, head_dim, read_rope(fields, head_dim), 2, 30.0, soft_cap=cap)


def gemma3_config(fields: Fields) -> DecoderConfig:
    """HF `Gemma3TextConfig`: every sixth layer sees everything, with a RoPE of its own. Its attention has no
    soft cap in any implementation, so that a config which asks for one is refused.
    """
    head_dim = head_size(fields, 256)
    pattern = fields.size("sliding_window_pattern", 6)
    ropes = fields.table("rope_parameters")
    if not ropes.keys() <= {FULL, SLIDING}:
        raise fields.unsupported(
            "rope_parameters", ropes, f"{FULL} and {SLIDING}, each with its own settings"
        )
    each = Fields(ropes, f"{fields.where}: rope_parameters")
    full, local = {**each.table(FULL), **fields.table("rope_scaling")}, each.table(SLIDING)
    theta = Fields(full, each.where).positive("rope_theta", fields.positive("rope_theta", 1e6))
    local_theta = each.within(SLIDING).positive("rope_theta", fields.positive("rope_local_base_freq", 1e4))
    local_rope = rope_from(fields, local, head_dim, local_theta)
    if local_rope.depends_on_length:
        raise fields.unsupported(f"rope_type of {SLIDING}", local_rope.kind, "kinds that ignore the length")
    return _double_norm(
        fields,
        head_dim,
        rope_from(fields, full, head_dim, theta),
        pattern,
        None,
        local_rope=local_rope,
        attention={"qk_norm": True},
    )


def gemma2_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """The usual names, with four norms a layer."""
    return hf_rules(config, tp, norms=NORMS)


def _double_norm(
    fields: Fields,
    head_dim: int,
    rope: RopeConfig,
    pattern: int,
    logit_cap: float | None,
    *,
    soft_cap: float | None = None,
    attention: Mapping[str, Any] = NONE,
    local_rope: RopeConfig | None = None,
) -> DecoderConfig:
    if fields.get("use_bidirectional_attention"):
        raise fields.unsupported("use_bidirectional_attention", True, "false")
    layers = count_layers(fields)
    default = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
    activation = fields.require("hidden_activation", ACTIVATION_NAMES, "gelu_pytorch_tanh")
    fields.get("hidden_act")
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=rope,
        local_rope=local_rope,
        windows=layer_windows(fields, default, fields.optional_size("sliding_window", 4096)),
        scale=fields.positive("query_pre_attn_scalar", 256) ** -0.5,
        soft_cap=soft_cap,
        logit_soft_cap=fields.optional_number("final_logit_softcapping", logit_cap),
        layer={"post_norm": True},
        **_shared(fields, activation, attention),
    )


def _shared(fields: Fields, activation: str, attention: Mapping[str, Any]) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {
        "mlp": {"activation": activation},
        "attention": {"qkv_bias": bias, "o_bias": bias, **attention},
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
        "norm_offset": 1.0,
        "embedding_multiplier": fields.size("hidden_size") ** 0.5,
    }
