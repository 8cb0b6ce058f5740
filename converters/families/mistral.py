"""Mistral: a Llama whose layers may all have a sliding window. Ministral: some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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

MINISTRAL3_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def mistral_config(fields: Fields) -> DecoderConfig:
    """HF `MistralConfig`, whose layers are all alike."""
    config = ministral_config(fields)
    if len(set(config.layers)) > 1:
        raise fields.unsupported("layer_types", fields.get("layer_types"), "the same for all layers")
    return config


def ministral3_config(fields: Fields) -> DecoderConfig:
    """HF `Ministral3Config`: queries grow with their position."""
    head_dim = head_size(fields, 128)
    given = dict(fields.table("rope_scaling") or fields.table("rope_parameters") or MINISTRAL3_ROPE)
    settings = Fields(given, f"{fields.where}: rope_parameters")
    beta = settings.number("llama_4_scaling_beta")
    for name in ("llama_4_scaling_beta", "max_position_embeddings"):
        given.pop(name, None)
    rope = read_rope(Fields({**fields.raw, "rope_scaling": given}, fields.where), head_dim, theta=1e6)
    window = fields.optional_size("sliding_window", None)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=replace(rope, llama_4_scaling_beta=beta),
        windows=(window,) * count_layers(fields),
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def ministral_config(fields: Fields) -> DecoderConfig:
    """HF `MinistralConfig`. A config that does not name a window has one of 4096."""
    head_dim = head_size(fields)
    window = fields.optional_size("sliding_window", 4096)
    default = [FULL if window is None else SLIDING] * count_layers(fields)
    windows = layer_windows(fields, default, window)
    return decoder_config(fields, head_dim=head_dim, rope=read_rope(fields, head_dim), windows=windows)
