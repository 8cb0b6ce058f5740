"""SmolLM3: a Llama in which every fourth layer has no RoPE."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
    used_window,
)
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def smollm3_config(fields: Fields) -> DecoderConfig:
    """HF `SmolLM3Config`: a 1 in `no_rope_layers` is a layer with RoPE; windows are on the others."""
    head_dim, layers = head_size(fields), count_layers(fields)
    interval = fields.size("no_rope_layer_interval", 4)
    rotated = fields.items("no_rope_layers", [(i + 1) % interval != 0 for i in range(layers)])
    if len(rotated) < layers or not all(flag in (0, 1) for flag in rotated):
        raise fields.unsupported("no_rope_layers", rotated, f"{layers} entries, each 0 or 1")
    window = used_window(fields, None)
    default = [FULL if window is None or rotated[i] else SLIDING for i in range(layers)]
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=2000000.0),
        rope_layers=tuple(bool(flag) for flag in rotated[:layers]),
        windows=layer_windows(fields, default, window),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        attention={"qkv_bias": bias, "o_bias": bias},
        mlp={"bias": fields.flag("mlp_bias", False)},
    )
