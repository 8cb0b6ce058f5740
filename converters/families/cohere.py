"""Cohere's Command R and A: attention and MLP side by side, one LayerNorm before both, rotation in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig

cohere_rules = partial(hf_rules, norms={"input_layernorm": "attention_norm"}, interleaved=True)


def cohere_config(fields: Fields) -> DecoderConfig:
    """HF `CohereConfig`, without norms of q and k (Command R+ has them)."""
    if fields.flag("use_qk_norm", False):
        raise fields.unsupported("use_qk_norm", True, "false")
    return _cohere(fields, None, None)


def cohere2_config(fields: Fields) -> DecoderConfig:
    """HF `Cohere2Config`: three of four layers have a window and rotate, the others neither."""
    layers = count_layers(fields)
    pattern = fields.size("sliding_window_pattern", 4)
    default = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
    windows = layer_windows(fields, default, fields.optional_size("sliding_window", 4096))
    if fields.flag("use_qk_norm", False):
        raise fields.unsupported("use_qk_norm", True, "false")
    fields.get("rotary_pct")
    return _cohere(fields, windows, [window is not None for window in windows])


def _cohere(
    fields: Fields, windows: Sequence[int | None] | None, rope_layers: Sequence[bool] | None
) -> DecoderConfig:
    head_dim = head_size(fields)
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=500000.0),
        windows=windows,
        rope_layers=rope_layers,
        attention={"qkv_bias": bias, "o_bias": bias},
        layer={"parallel": True},
        norm="layer",
        norm_eps=fields.positive("layer_norm_eps", 1e-5),
        logit_multiplier=fields.positive("logit_scale", 0.0625),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )
