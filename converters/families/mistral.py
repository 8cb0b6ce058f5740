"""Mistral: a Llama whose layers may all have a sliding window. Ministral: some of them."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def mistral_config(fields: Fields) -> DecoderConfig:
    """HF `MistralConfig`, whose layers are all alike."""
    config = ministral_config(fields)
    if len(set(config.layers)) > 1:
        raise fields.unsupported("layer_types", fields.get("layer_types"), "the same for all layers")
    return config


def ministral_config(fields: Fields) -> DecoderConfig:
    """HF `MinistralConfig`. A config that does not name a window has one of 4096."""
    head_dim = head_size(fields)
    window = fields.optional_size("sliding_window", 4096)
    default = [FULL if window is None else SLIDING] * count_layers(fields)
    windows = layer_windows(fields, default, window)
    return decoder_config(fields, head_dim=head_dim, rope=read_rope(fields, head_dim), windows=windows)
